"""Hyper-parameters of a student that is configured inside of a :class:`DistillationModule` in YAML."""

import copy
from collections.abc import Callable, Iterable
from importlib import import_module
from typing import Any

import lightning as L
from torch import nn

_INSTANTIATOR = "lightning.pytorch.cli.instantiate_module"


def _import(path: Any) -> Any:
    """What an import path names, or None."""
    if not isinstance(path, str):
        return None
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name, None)
    except (ImportError, ValueError):
        return None


def _store(student: L.LightningModule, config: dict[str, Any], names: Iterable[str] | None = None) -> None:
    """Make a class config the hyper-parameters of a module, the way LightningCLI does for the model it builds."""
    own = {**config.get("init_args", {}), **config.get("dict_kwargs", {})}
    if names is not None:
        own = {name: own[name] for name in names if name in own}
    own |= {"_class_path": config["class_path"], "_instantiator": _INSTANTIATOR}
    student.remove_ignored_hparams([name for name in student.hparams if name not in own])
    student._set_hparams(own)
    object.__setattr__(student, "_hparams_initial", copy.deepcopy(student.hparams))


def keep_own_hparams_(student: L.LightningModule, wrapper: type) -> None:
    """Replace the config of the whole model, which ``LightningCLI`` gives to nested modules too, by the student's part.

    Without this the student's checkpoints could only be loaded where ``wrapper`` can be imported.

    Args:
        student: module whose ``save_hyperparameters`` ran under ``LightningCLI``; others are left alone.
        wrapper: class at the top of the config.
    """
    top = _import(student.hparams.get("_class_path"))
    config = student.hparams.get("student")
    if isinstance(top, type) and issubclass(top, wrapper) and isinstance(config, dict) and "class_path" in config:
        _store(student, config)


def nested_instantiator(cli: Any, otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """An instantiator for ``LightningCLI`` that shows nested modules their own arguments, not the whole model's.

    A student may then read ``self.hparams.width`` in its constructor. To be registered before Lightning's own::

        def _add_instantiators(self):
            super()._add_instantiators()
            instantiator = nested_instantiator(self, _InstantiatorFn(cli=self, key="model"))
            self.parser.add_instantiator(instantiator, LightningModule, subclasses=True, prepend=True)

    Args:
        cli: the ``LightningCLI``.
        otherwise: instantiator of the model at the top of the config.
    """

    def instantiate(class_type: type, *args: Any, applied_instantiation_links: dict[str, Any], **kwargs: Any) -> Any:
        cli._dump_config()
        model = cli.config_dump.get("model") or {}
        if "class_path" not in model or _import(model["class_path"]) is class_type:
            return otherwise(class_type, *args, applied_instantiation_links=applied_instantiation_links, **kwargs)
        module = class_type(*args, **kwargs)
        config = model.get("init_args", {}).get("student")
        if isinstance(config, dict) and _import(config.get("class_path")) is class_type:
            hparams = module.hparams
            if any(
                isinstance(value, nn.Module) for value in hparams.values()
            ):  # the checkpoint is to hold plain values
                _store(module, config, list(hparams))
        return module

    return instantiate
