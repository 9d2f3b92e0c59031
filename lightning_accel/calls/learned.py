"""Learn from the user's own steps which module they call, and with what of a batch."""

import weakref
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call, WholeCall, call_from_batch, canonical_call
from lightning_accel.calls.containers import is_record, items_of, map_items
from lightning_accel.calls.contexts import kept_buffers, mode, own_forward, own_signature
from lightning_accel.calls.copies import converted
from lightning_accel.calls.loaders import first_batch, first_validation_batch
from lightning_accel.calls.observed import (
    TRAINING,
    VALIDATION,
    SeenStep,
    has_step,
    observe,
    runs,
    shipped_call,
)
from lightning_accel.core import structure
from lightning_accel.core.patching import current_run
from lightning_accel.errors import InvalidArgumentError

_Path = tuple[Any, ...]
_STEPS = (VALIDATION, TRAINING)  # what ships is called as in evaluation


@dataclass
class _Learned:
    """Steps seen in a run, for one structure of one module."""

    run: Any
    module: weakref.ReferenceType[nn.Module]
    changes: int
    steps: dict[tuple[str, frozenset[str], int | None], SeenStep]


_RUNS: "weakref.WeakKeyDictionary[L.Trainer, _Learned]" = weakref.WeakKeyDictionary()


def seen_step(
    trainer: L.Trainer, pl_module: L.LightningModule, step: str, path: str = "", samples: int | None = None
) -> SeenStep:
    """One step of the user's on its first batch, observed once in a run.

    Args:
        trainer: in ``fit``, its module and data attached.
        pl_module: the LightningModule.
        step: ``"training_step"`` or ``"validation_step"``.
        path: of an inner submodule whose arguments are wanted.
        samples: number of samples of a map-style dataset; ``None``: the batch size of the loader.
    """
    run, changes = current_run(trainer), len(structure.record_of(pl_module))
    learned = _RUNS.get(trainer)
    stale = learned is None or learned.module() is not pl_module or learned.changes != changes
    if learned is None or stale or (run is not None and learned.run is not run):
        learned = _RUNS[trainer] = _Learned(run, weakref.ref(pl_module), changes, {})
    key = (step, frozenset({path} - {""}), samples)
    if key not in learned.steps:
        learned.steps[key] = _observed(trainer, pl_module, *key)
    return learned.steps[key]


def _observed(
    trainer: L.Trainer, pl_module: L.LightningModule, step: str, keep: frozenset[str], samples: int | None
) -> SeenStep:
    if not has_step(pl_module, step):
        return SeenStep(step)
    get = first_batch if step == TRAINING else first_validation_batch
    batch = get(trainer, pl_module.device, samples)
    return SeenStep(step) if batch is None else observe(pl_module, trainer, step, batch, keep)


def learned_call(
    trainer: L.Trainer, pl_module: L.LightningModule, path: str, samples: int | None = None
) -> Call | None:
    """How the user's steps call a module, without targets; ``None`` if neither step calls it.

    Args:
        trainer: in ``fit``, its module and data attached.
        pl_module: the LightningModule.
        path: of the submodule; ``""`` for the LightningModule's ``forward``.
        samples: as for :func:`seen_step`.
    """
    part = pl_module.get_submodule(path)
    for step in _STEPS:
        call = seen_step(trainer, pl_module, step, path, samples).first(path)
        if call is not None:
            return _shipped(part, call)
    return None


def passed_on_call(trainer: L.Trainer, pl_module: L.LightningModule, samples: int | None = None) -> Call | None:
    """How the steps call a network instead of ``forward``, if ``forward`` takes the same arguments, as one that passes them on.

    Args:
        trainer: in ``fit``, its module and data attached.
        pl_module: the LightningModule.
        samples: as for :func:`seen_step`.
    """
    seen = (seen_step(trainer, pl_module, step, "", samples) for step in _STEPS)
    return next((found[1] for step in seen if (found := _passed_on(pl_module, step))), None)


def _passed_on(pl_module: nn.Module, seen: SeenStep) -> tuple[str, Call] | None:
    """Path and call of the largest network that a step calls and whose arguments ``forward`` takes."""
    for path in _by_size(pl_module, seen.outermost):
        call = seen.first(path)
        with suppress(TypeError):  # other arguments than those of `forward`
            if call is not None and accepts(pl_module, shipped := _shipped(pl_module, call)):
                return path, shipped
    return None


def _by_size(pl_module: nn.Module, paths: Iterable[str]) -> list[str]:
    """Paths of submodules that have parameters, the largest first."""
    sizes = {path: sum(p.numel() for p in pl_module.get_submodule(path).parameters()) for path in paths}
    return sorted((path for path in sizes if sizes[path]), key=lambda path: -sizes[path])


def accepts(part: nn.Module, call: Call) -> bool:
    """Whether a module takes a call in evaluation mode; it is left as it was."""
    device = next((tensor.device for tensor in part.parameters()), torch.device("cpu"))
    with mode(part, False), own_forward(part), kept_buffers(part):
        return runs(part, converted(call, lambda tensor: tensor.to(device)))


def _shipped(part: nn.Module, call: Call) -> Call:
    with mode(part, False), own_forward(part), kept_buffers(part):
        return canonical_call(own_signature(part), *shipped_call(part, call))


def called_path(trainer: L.Trainer, pl_module: L.LightningModule) -> str | None:
    """The network that ``training_step`` calls: the LightningModule itself, or the largest submodule that the step calls.

    Returns:
        Its path, ``""`` for ``forward``; ``None`` if no call was seen.
    """
    called = seen_step(trainer, pl_module, TRAINING).outermost
    if "" in called:
        return ""
    return next(iter(_by_size(pl_module, called)), None)


def why_unseen(trainer: L.Trainer, pl_module: L.LightningModule) -> str:
    """Sentence on how the observation of ``training_step`` ended early, for messages; empty if it didn't."""
    error = seen_step(trainer, pl_module, TRAINING).error
    return f" The trial run of `training_step` on the first batch ended with {error}." if error else ""


def learned_inputs(
    trainer: L.Trainer | None, pl_module: nn.Module, part: nn.Module, batch: Any
) -> "LearnedInputs | ReplayedInputs | None":
    """The user's way from a batch to the arguments of a module, as their steps go it; ``None`` if it isn't seen.

    Args:
        trainer: its module and data attached; ``None`` outside of a run.
        pl_module: the LightningModule; another module has no steps.
        part: it, or one of its submodules.
        batch: of the data that the result will be used for, as ``validation_step`` gets it.
    """
    path = next((name for name, module in pl_module.named_modules() if module is part), None)
    if path is None:
        return None
    keep = frozenset({path} - {""})
    for step in _STEPS:
        if not has_step(pl_module, step):
            continue
        seen = observe(pl_module, trainer, step, batch, keep)
        call = seen.first(path)
        if call is not None and _took_sample(call, batch) and _fits(part, batch):
            continue
        if call is not None:
            return _inputs(trainer, pl_module, part, path, step, _shipped(part, call), batch)
        if part is pl_module and not _fits(part, batch) and (found := _passed_on(pl_module, seen)):
            return _inputs(trainer, pl_module, part, found[0], step, found[1], batch)
    return None


def _inputs(
    trainer: L.Trainer | None, pl_module: nn.Module, part: nn.Module, path: str, step: str, call: Call, batch: Any
) -> "LearnedInputs | ReplayedInputs":
    template = _template(call, dict(_places(batch)))
    return ReplayedInputs(trainer, pl_module, part, path, step) if template is None else LearnedInputs(template)


def _took_sample(call: Call, batch: Any) -> bool:
    """Whether a step, given inputs without targets, took the first sample for the inputs: ``batch[0]``."""
    if not isinstance(batch, torch.Tensor) or not len(batch):
        return False
    given = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return any(leaf.shape == batch.shape[1:] and torch.equal(leaf.to(batch), batch[0]) for leaf in given)


def _fits(part: nn.Module, batch: Any) -> bool:
    """Whether a module takes a batch by its signature."""
    with suppress(InvalidArgumentError):
        return accepts(part, call_from_batch(part, batch))
    return False


@dataclass(frozen=True)
class ReplayedInputs:
    """Maps a batch to a call by a run of the user's step on a copy, where the step computes the arguments.

    Args:
        trainer: that the step may ask.
        pl_module: the LightningModule.
        part: module whose call is meant.
        path: of what the step calls: the module, or a network whose arguments the module passes on.
        step: ``"training_step"`` or ``"validation_step"``.
    """

    trainer: L.Trainer | None
    pl_module: nn.Module
    part: nn.Module
    path: str
    step: str

    leading = None

    def __call__(self, batch: Any) -> WholeCall:
        """The call for a batch.

        Raises:
            InvalidArgumentError: the step doesn't call the module for this batch.
        """
        seen = observe(self.pl_module, self.trainer, self.step, batch, frozenset({self.path} - {""}))
        call = seen.first(self.path)
        if call is None:
            what = f"`{self.path}`" if self.path else "`forward`"
            raise InvalidArgumentError(
                f"Argument `inputs` must map each batch to the arguments of {what}, since `{self.step}` doesn't call it with every "
                f"batch, but got None. {seen.error}".rstrip()
            )
        return WholeCall(*_shipped(self.part, call))


@dataclass(frozen=True)
class _Place:
    """Position of a tensor in a batch."""

    path: _Path


class _UnknownError(Exception):
    """A tensor that isn't in the batch: the step computes it."""


class LearnedInputs:
    """Maps a batch to a call: each tensor argument is an element of the batch.

    Args:
        template: the call, with :class:`_Place` for tensors.
    """

    def __init__(self, template: Call) -> None:
        self._template = template

    def __call__(self, batch: Any) -> WholeCall:
        """The call for a batch."""

        def filled(value: Any) -> Any:
            if isinstance(value, _Place):
                return _at(batch, value.path)
            return map_items(value, filled)

        return WholeCall(*filled(self._template))

    @property
    def leading(self) -> int | None:
        """Number of leading elements of a sequence that the call takes; ``None`` if it takes others."""
        used = {place.path[0] for place in _all_places(self._template) if place.path}
        return len(used) if used == set(range(len(used))) else None


def _template(call: Call, places: Mapping[int, _Path]) -> Call | None:
    def placed(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            if id(value) not in places:
                raise _UnknownError
            return _Place(places[id(value)])
        return map_items(value, placed)

    try:
        args, kwargs = placed(call)
    except _UnknownError:
        return None
    return args, kwargs


def _all_places(value: Any) -> Iterator[_Place]:
    if isinstance(value, _Place):
        yield value
    elif isinstance(value, Mapping) or is_record(value):
        yield from _all_places(list((items_of(value) if is_record(value) else value).values()))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _all_places(item)


def _places(value: Any, path: _Path = ()) -> Iterator[tuple[int, _Path]]:
    """Each tensor of a batch with its position: keys, indices, and names of a dataclass's fields."""
    if isinstance(value, torch.Tensor):
        yield id(value), path
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _places(item, (*path, key))
    elif isinstance(value, list | tuple):
        for i, item in enumerate(value):
            yield from _places(item, (*path, i))
    elif is_record(value):
        yield from _places(items_of(value), path)


def _at(value: Any, path: _Path) -> Any:
    for step in path:
        value = getattr(value, step) if is_record(value) else value[step]
    return value
