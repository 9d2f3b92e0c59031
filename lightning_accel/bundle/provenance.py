"""The command and configuration that started a run."""

import inspect
import math
import shlex
import sys
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.cli import SaveConfigCallback

from lightning_accel.core.trainers import callbacks_of

_TRAINER = ("max_epochs", "max_steps", "precision", "accumulate_grad_batches", "gradient_clip_val", "world_size")
_PLAIN = (bool, int, float, str, type(None))


def run_of(trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, Any]:
    """Command and configuration of this run, as plain values.

    Args:
        trainer: in ``fit``.
        pl_module: its module.

    Returns:
        ``command`` (program and arguments of the process), ``config`` (the whole configuration as YAML; ``None`` without a
        ``LightningCLI``), and without one ``settings``: hyper-parameters of module and datamodule, and of the Trainer.
    """
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    saved = callbacks_of(trainer, SaveConfigCallback)
    if saved:
        return {"command": command, "config": saved[0].parser.dump(saved[0].config, skip_unset=False)}
    settings = {type(pl_module).__name__: _plain(pl_module.hparams)}
    datamodule = getattr(trainer, "datamodule", None)
    if datamodule is not None:
        settings[type(datamodule).__name__] = _plain(datamodule.hparams)
    settings["Trainer"] = {name: getattr(trainer, name) for name in _TRAINER}
    settings["callbacks"] = {
        f"{i} {type(c).__name__}": _arguments(c) for i, c in enumerate(callbacks_of(trainer, L.Callback))
    }
    return {"command": command, "config": None, "settings": {name: value for name, value in settings.items() if value}}


def _arguments(callback: L.Callback) -> str:
    """The constructor's arguments that aren't its defaults, as far as the callback keeps them under their names."""
    owners = (callback, getattr(callback, "settings", None))
    found = []
    for name, parameter in inspect.signature(type(callback).__init__).parameters.items():
        value = next(
            (vars(owner)[name] for owner in owners if name in getattr(owner, "__dict__", {})), parameter.default
        )
        told = _plain_argument(value)
        # Texts are compared: whether two tensors or tables are equal isn't one answer.
        if name != "self" and value is not parameter.default and told != _plain_argument(parameter.default):
            found.append(f"{name}={told}")
    return ", ".join(found)


def _plain_argument(value: Any) -> str:
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_plain_argument, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {_plain_argument(v)}' for key, v in value.items())}}}"
    if isinstance(value, _PLAIN):
        return str(value)
    name = getattr(value, "name", None)
    return name if isinstance(name, str) else type(value).__name__


def _plain(parameters: Any) -> dict[str, Any]:
    return {str(k): _plain_value(v) for k, v in dict(parameters).items()}


def _plain_value(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no number for it
    return value if isinstance(value, _PLAIN) else type(value).__name__
