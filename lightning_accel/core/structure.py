"""Law 3: structure changes in one place.

Whatever changes what a module is made of is written down as a :class:`Change` on the module, travels in the checkpoint
under ``checkpoint["lightning_accel"]["structure"]``, and is replayed on a freshly built module *before* weights are
restored. A capability registers how its kind of change is replayed and undone; this file knows no kind by name.
"""

import pickle
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib import import_module
from inspect import Parameter, signature
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch import callbacks as lightning_callbacks
from torch import nn

from lightning_accel.core.arguments import checked
from lightning_accel.core.checkpoints import foreign_in, load_without_objects
from lightning_accel.core.patching import patches_of_run, place
from lightning_accel.core.trainers import callbacks_of
from lightning_accel.errors import InvalidArgumentError, LightningAccelError, MissingFileError

CHECKPOINT_KEY = "lightning_accel"
_RECORD = "_lightning_accel_record"
_ROOMS = {  # where each kind registers itself
    "quantize": "lightning_accel.quantization.graph.prepare",
    "quantize_weights": "lightning_accel.quantization.weight_only.layers",
    "remove_channels": "lightning_accel.pruning.channels.slices",
}
Resized = dict[str, list[list[Any]]]  # by parameter name: [dimension, size before, kept indices]


@dataclass(frozen=True)
class Change:
    """One change of structure.

    Args:
        kind: registered name of the kind of change.
        owner: ``state_key`` of the callback that made it.
        args: what is needed to make it again; plain Python values only, so that records can be compared.
    """

    kind: str
    owner: str
    args: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class ChangeHandler:
    """How changes of one kind are made and unmade.

    Args:
        replay: makes the change on a module that does not have it.
        undo: takes it back; raises ``ValueError`` if it can't be taken back.
        save: state of a change that a checkpoint holds besides its arguments (ranges, for instance).
        restore: gives a replayed change that state.
        resized: what became of each parameter's shape. Changes that resize are made on averaged copies too.
    """

    replay: Callable[[nn.Module, Change], None]
    undo: Callable[[nn.Module, Change], None]
    save: Callable[[nn.Module, Change], dict[str, Any]] = lambda module, change: {}
    restore: Callable[[nn.Module, Change, dict[str, Any]], None] = lambda module, change, state: None
    resized: Callable[[Change], Resized] = lambda change: {}


_HANDLERS: dict[str, ChangeHandler] = {}


def register(name: str, handler: ChangeHandler) -> None:
    """Register a kind of change under its name."""
    _HANDLERS[name] = handler


def record_of(module: nn.Module) -> list[Change]:
    """The changes made to a module, oldest first."""
    result: list[Change] = module.__dict__.setdefault(_RECORD, [])
    return result


def _handler_of(change: Change) -> ChangeHandler:
    if change.kind not in _HANDLERS and change.kind in _ROOMS:
        import_module(_ROOMS[change.kind])
    if change.kind not in _HANDLERS:
        raise InvalidArgumentError(
            f"The checkpoint must hold changes of a known kind ({sorted(_ROOMS)}), but got {change.kind!r}. "
            "It was written by a newer lightning-accel: update it."
        )
    return _HANDLERS[change.kind]


def apply(module: nn.Module, change: Change) -> None:
    """Make a change and write it into the module's record."""
    _handler_of(change).replay(module, change)
    record_of(module).append(change)


def undo(module: nn.Module, change: Change) -> None:
    """Undo the newest change."""
    _handler_of(change).undo(module, change)
    record_of(module).remove(change)


def resized(change: Change) -> Resized:
    """Effect of a change on the shapes of parameters: ``{name: [[dimension, size before, kept indices], ...]}``."""
    return _handler_of(change).resized(change)


def replay(module: nn.Module, changes: list[Change]) -> list[Change]:
    """Bring a module to exactly the structure described by ``changes``, whatever it has now.

    Returns:
        The changes that were made now: those that the module did not have yet.

    Raises:
        InvalidArgumentError: the module has a change that can't be undone, such as other channels removed.
    """
    have = record_of(module)
    common = next((i for i, pair in enumerate(zip(have, changes, strict=False)) if pair[0] != pair[1]), None)
    common = min(len(have), len(changes)) if common is None else common
    for change in reversed(have[common:]):
        undo(module, change)
    for change in changes[common:]:
        apply(module, change)
    if changes:
        keep_record(module)
    return changes[common:]


def save_record(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Write the record of a module, and the state of its changes, into a checkpoint."""
    changes = record_of(module)
    entry = checkpoint.setdefault(CHECKPOINT_KEY, {})
    entry["structure"] = [asdict(change) for change in changes]
    entry["states"] = [_handler_of(change).save(module, change) for change in changes]


def load_record(checkpoint: dict[str, Any]) -> list[Change]:
    """The record in a checkpoint; empty if there is none."""
    return [Change(**entry) for entry in checkpoint.get(CHECKPOINT_KEY, {}).get("structure", [])]


def keep_record(module: nn.Module) -> None:
    """Let every checkpoint of a LightningModule hold its record, also one of weights alone, or without a callback of this library."""
    if hasattr(module, "on_save_checkpoint") and not isinstance(vars(module).get("on_save_checkpoint"), _SavesRecord):
        place(module, "on_save_checkpoint", _SavesRecord(module))


class _SavesRecord:
    """Replaces a module's ``on_save_checkpoint``: Lightning calls those of callbacks only with ``save_weights_only=False``."""

    def __init__(self, module: nn.Module) -> None:
        self._module, self._before = module, vars(module).get("on_save_checkpoint")

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        if self._before is None:
            type(self._module).on_save_checkpoint(self._module, checkpoint)  # type: ignore[attr-defined]  # a LightningModule has one
        else:
            self._before(checkpoint)
        save_record(self._module, checkpoint)


def before_next_restore(trainer: Trainer, module: LightningModule, action: Callable[[dict[str, Any]], None]) -> None:
    """Call ``action`` with the checkpoint that the Trainer restores next, before its weights are loaded.

    In ``setup`` it isn't known yet which checkpoint the Trainer will load. The one thing that it calls between reading
    the file and loading the weights, in fit as in test, is the module's ``on_load_checkpoint``.
    """
    no_restore(module)
    hook = _BeforeRestore(module, action)
    hook.remove = patches_of_run(trainer).swap(module, "on_load_checkpoint", hook)


def no_restore(module: LightningModule) -> None:
    """Cancel the action for the next restore: there was none, or it is over."""
    present = module.__dict__.get("on_load_checkpoint")
    if isinstance(present, _BeforeRestore):
        present.remove()


class _BeforeRestore:
    """Replaces a module's ``on_load_checkpoint`` for one call."""

    def __init__(self, module: LightningModule, action: Callable[[dict[str, Any]], None]) -> None:
        self._module, self._action = module, action
        self.remove: Callable[[], object]

    def __call__(self, checkpoint: dict[str, Any]) -> None:
        self.remove()
        self._action(checkpoint)
        self._module.on_load_checkpoint(checkpoint)

    def __deepcopy__(self, memo: dict[int, Any]) -> "_BeforeRestore":
        return self  # a copied module is not the one that is restored


def read_plain(path: str | Path, argument: str) -> Any:
    """Read what ``torch.save`` wrote, on the CPU and without unpickling foreign code.

    Objects that ``weights_only=True`` refuses become placeholders, see :mod:`~lightning_accel.core.checkpoints`.

    Args:
        path: the file.
        argument: whose value the path is, for the messages.

    Raises:
        MissingFileError: there is no such file.
        InvalidArgumentError: the file is damaged.
    """
    path = Path(path)
    if (path / ".metadata").is_file():
        raise InvalidArgumentError(
            f"Argument `{argument}` must be a checkpoint file, but got {str(path)!r}, a folder of shards. Train with "
            "ModelParallelStrategy(save_distributed_checkpoint=False), also from this one: `fit(..., ckpt_path=...)` reads the folder, and "
            "writes files from then on."
        )
    if not path.is_file():
        raise MissingFileError(
            f"Argument `{argument}` must be a checkpoint file, but got {str(path)!r}, which does not exist."
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError:  # an object, or a damaged file
        read: Callable[[], Any] = partial(load_without_objects, path)
    except Exception as error:  # torch.load raises a dozen unrelated types for a damaged file
        raise _unreadable(path, argument, error) from error
    try:
        return read()
    except Exception as error:
        raise _unreadable(path, argument, error) from error


def _unreadable(path: Path, argument: str, error: Exception) -> InvalidArgumentError:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip()  # torch writes in colours
    reason = text.splitlines()[0] if text else type(error).__name__
    return InvalidArgumentError(
        f"Argument `{argument}` must be a readable checkpoint, but got {str(path)!r}: {reason}. The file is damaged or half-written."
    )


def read_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint on the CPU without unpickling foreign code (``weights_only=True``).

    Raises:
        MissingFileError: there is no such file.
        InvalidArgumentError: the file is damaged, or no Lightning checkpoint.
    """
    checkpoint = read_plain(path, "ckpt_path")
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise InvalidArgumentError(
            f"Argument `ckpt_path` must be a Lightning checkpoint with a `state_dict`, but got {str(path)!r} without one."
        )
    return checkpoint


@checked()
def load_from_checkpoint(cls: type[LightningModule], ckpt_path: str | Path, **init: Any) -> LightningModule:
    """Build a module, replay its structural changes and load its weights, so that it computes what was trained.

    Args:
        cls: the user's LightningModule class.
        ckpt_path: checkpoint written during a run with callbacks of this library (a plain one works too).
        init: constructor arguments; they go over the hyper-parameters in the checkpoint.

    Returns:
        The module in eval mode on the CPU. A quantization-aware trained one computes with its fake-quants.

    Raises:
        MissingFileError: there is no such file.
        InvalidArgumentError: the file is damaged, or a hyper-parameter in it is an object, which isn't unpickled, and ``init`` lacks it.
    """
    checkpoint = read_checkpoint(ckpt_path)
    arguments = constructor_arguments(cls, checkpoint, init)
    try:
        signature(cls).bind(**arguments)
    except TypeError as error:
        raise InvalidArgumentError(
            f"The arguments of {cls.__name__}{signature(cls)} must be in the checkpoint's hyper-parameters or be passed, but got "
            f"{sorted(arguments)}: {error}. Pass it: load_from_checkpoint({cls.__name__}, path, name=...)."
        ) from error
    module = cls(**arguments)
    module.configure_model()
    try:
        load_into(module, checkpoint)
    except RuntimeError as error:
        if isinstance(error, LightningAccelError) or not str(error).startswith("Error(s) in loading state_dict"):
            raise
        raise InvalidArgumentError(
            f"Argument `ckpt_path` must be a checkpoint of {cls.__name__}, built with the same arguments, but got {ckpt_path}: "
            f"{' '.join(str(error).split())[:400]}"
        ) from error
    return module.eval()


def constructor_arguments(
    cls: type[LightningModule], checkpoint: Mapping[str, Any], init: Mapping[str, Any]
) -> dict[str, Any]:
    """Arguments of a module's constructor: the checkpoint's hyper-parameters, as far as it takes them, and what goes over them.

    Raises:
        InvalidArgumentError: a hyper-parameter is an object, which isn't unpickled, and nothing goes over it.
    """
    accepted = signature(cls.__init__).parameters.values()
    takes_any = any(p.kind is Parameter.VAR_KEYWORD for p in accepted)
    names = {p.name for p in accepted}
    kept = {k: v for k, v in checkpoint.get("hyper_parameters", {}).items() if takes_any or k in names}
    objects = {k: path for k, v in kept.items() if k not in init and (path := foreign_in(v))}
    if objects:
        name, path = next(iter(objects.items()))
        listed = ", ".join(f"{k}=..." for k in objects)
        raise InvalidArgumentError(
            f"Argument `{name}` of {cls.__name__} must be passed, but got none, and the checkpoint's hyper-parameter holds a {path}, which "
            f"isn't unpickled, since that could run code. Build it anew: load_from_checkpoint({cls.__name__}, path, {listed}); its "
            "weights are in the checkpoint if it is a submodule."
        )
    return {**kept, **init}


def load_into(module: LightningModule, checkpoint: dict[str, Any]) -> None:
    """Bring a module to the structure and the weights of a checkpoint that was read."""
    replay(module, load_record(checkpoint))
    module.on_load_checkpoint(checkpoint)
    module.load_state_dict(checkpoint["state_dict"])
    restore_states(module, checkpoint)


def restore_states(module: nn.Module, checkpoint: dict[str, Any]) -> None:
    """Give each replayed change the state in the checkpoint."""
    states = checkpoint.get(CHECKPOINT_KEY, {}).get("states", [])
    for change, state in zip(record_of(module), states, strict=False):  # a float checkpoint has none
        _handler_of(change).restore(module, change, state)


def average_models(trainer: Trainer) -> Iterator[nn.Module]:
    """The averaged copies (EMA, SWA) of the module that the trainer's callbacks keep."""
    averaged = getattr(lightning_callbacks, "WeightAveraging", None)  # since Lightning 2.6
    for averaging in () if averaged is None else callbacks_of(trainer, averaged):
        if averaging._average_model is not None:
            yield averaging._average_model.module
    for stochastic in callbacks_of(trainer, lightning_callbacks.StochasticWeightAveraging):
        if stochastic._average_model is not None:
            yield stochastic._average_model
