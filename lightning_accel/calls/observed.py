"""Observe how the user's own steps call their network: run them on a copy, and record the calls."""

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from copy import deepcopy
from dataclasses import dataclass, field
from inspect import BoundArguments, Parameter, Signature, signature
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.trainer.states import RunningStage
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset

from lightning_accel.calls.batches import Call, canonical_call, is_target
from lightning_accel.calls.containers import register
from lightning_accel.calls.contexts import isolated_random, own_forwards, own_signature, unlogged
from lightning_accel.calls.manual import own_distillation, own_optimizers
from lightning_accel.calls.user_code import innermost_line
from lightning_accel.core.packages import counterpart, is_lightning_module, is_overridden
from lightning_accel.core.patching import Patches, removed, swapped

TRAINING, VALIDATION = "training_step", "validation_step"
_STAGES = {TRAINING: RunningStage.TRAINING, VALIDATION: RunningStage.VALIDATING}
_UNWATCHED = (nn.ModuleList, nn.ModuleDict)  # have no forward


@dataclass(frozen=True)
class SeenCall:
    """One call of a submodule in a step.

    Args:
        path: of the submodule; ``""`` for the LightningModule.
        outermost: whether the step called it, and not another submodule's ``forward``.
        call: positional and keyword arguments as passed; ``None`` for an inner call that nobody asked for.
    """

    path: str
    outermost: bool
    call: Call | None = field(repr=False)


@dataclass(frozen=True)
class SeenStep:
    """Calls of one run of a step.

    Args:
        step: ``"training_step"`` or ``"validation_step"``.
        calls: in order.
        error: of the step, one line; empty if it ran to its end.
        batch: that it got.
    """

    step: str
    calls: tuple[SeenCall, ...] = ()
    error: str = ""
    batch: Any = field(default=None, repr=False)

    def first(self, path: str) -> Call | None:
        """The first recorded call of a submodule."""
        return next((seen.call for seen in self.calls if seen.path == path and seen.call is not None), None)

    @property
    def outermost(self) -> list[str]:
        """Paths of the submodules that the step itself called, each once, in order."""
        return list(dict.fromkeys(seen.path for seen in self.calls if seen.outermost))


def users_module(pl_module: nn.Module) -> nn.Module:
    """The module whose steps are the user's: the student of a DistillationModule, whose teacher takes no part."""
    student = getattr(pl_module, "student", None) if hasattr(pl_module, "teacher") else None
    return student if is_lightning_module(student) else pl_module


def has_step(pl_module: nn.Module, step: str) -> bool:
    """Whether the user's module has a step of its own that takes a batch."""
    module = users_module(pl_module)
    if not is_lightning_module(module) or not is_overridden(step, module):
        return False
    return "dataloader_iter" not in signature(getattr(module, step)).parameters


def observe(
    pl_module: nn.Module, trainer: L.Trainer | None, step: str, batch: Any, keep: frozenset[str] = frozenset()
) -> SeenStep:
    """Run a step of the user's on a copy of the module, and record how it calls the submodules.

    The module, the random state and the loggers stay as they are. A step that raises has called what it called up to there.

    Args:
        pl_module: the LightningModule.
        trainer: that the step may ask; ``None`` outside of a run.
        step: ``"training_step"`` or ``"validation_step"``.
        batch: as the step gets it.
        keep: paths of inner submodules whose arguments are recorded, too.
    """
    with isolated_random():
        try:
            module = trial_copy(users_module(pl_module), trainer)
        except Exception as error:  # a module may hold anything
            return SeenStep(step, (), f"the module can't be copied: {one_line(error)}", batch)
        return run_step(module, trainer, step, batch, keep)


def run_step(
    module: Any, trainer: L.Trainer | None, step: str, batch: Any, keep: frozenset[str] = frozenset()
) -> SeenStep:
    """Run a step on a copy from :func:`trial_copy`, and record how it calls the submodules. Buffers of the copy change."""
    calls: list[SeenCall] = []
    depth = [0]
    error = ""
    patches = Patches()

    def watch(path: str, part: nn.Module) -> None:
        forward = part.forward

        def seen(*args: Any, **kwargs: Any) -> Any:
            outermost = depth[0] == 0
            wanted = outermost or path in keep
            calls.append(SeenCall(path, outermost, pytree.tree_map(_detached, (args, kwargs)) if wanted else None))
            depth[0] += 1
            try:
                return forward(*args, **kwargs)
            finally:
                depth[0] -= 1

        patches.swap(part, "forward", seen)

    validating = step == VALIDATION
    try:
        for path, part in module.named_modules():
            if not isinstance(part, _UNWATCHED):
                watch(path, part)
        if validating:
            module.eval()
        own_distillation(module, patches)
        if not validating and not module.automatic_optimization:
            own_optimizers(module, trainer, patches)
        with (
            unlogged(module),
            _quiet(trainer, _STAGES[step]),
            torch.inference_mode(False),
            torch.set_grad_enabled(not validating),
        ):
            own = pytree.tree_map(lambda leaf: leaf, batch)  # a step may take keys out of its batch
            getattr(module, step)(*_arguments(getattr(module, step), own))
    except Exception as raised:  # whatever a step raises before its first real run
        error = one_line(raised)
    finally:
        patches.undo()
    return SeenStep(step, tuple(calls), error, batch)


def _arguments(step: Callable[..., Any], batch: Any) -> list[Any]:
    """The batch and as many zeros for ``batch_idx`` and ``dataloader_idx`` as the step requires, as Lightning passes them."""
    kinds = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
    own = signature(step).parameters.values()
    if any(p.kind is Parameter.VAR_POSITIONAL for p in own):
        return [batch, 0]
    return [batch, 0, 0][: sum(p.kind in kinds for p in own)]


def _detached(leaf: Any) -> Any:
    return (
        leaf.detach() if isinstance(leaf, torch.Tensor) and leaf.requires_grad else leaf
    )  # the batch's own stay themselves


@contextmanager
def _quiet(trainer: L.Trainer | None, stage: RunningStage) -> Iterator[None]:
    """The Trainer in a stage, with loggers that write nothing."""
    with ExitStack() as stack:
        if trainer is None:
            yield
            return
        stack.enter_context(swapped(trainer.state, "stage", stage))
        if trainer.loggers:
            stack.enter_context(swapped(trainer, "_loggers", [counterpart(DummyLogger, trainer)()]))
        yield


def trial_copy(module: nn.Module, trainer: L.Trainer | None, shared: Sequence[Any] = ()) -> Any:
    """A copy of a module that refers to the same Trainer and the same data.

    Args:
        module: to copy.
        trainer: that the module may hold.
        shared: further objects that the copy refers to, such as a teacher.
    """
    shared = (
        [*shared] if trainer is None else [*shared, trainer, getattr(trainer, "datamodule", None), *trainer.loggers]
    )
    parts = list(module.modules())
    for part in parts:
        shared += [value for value in vars(part).values() if isinstance(value, Dataset | DataLoader)]
    memo = {id(value): value for value in shared if value is not None}
    with ExitStack() as stack:
        for part in parts:
            if "_trainer" in vars(part):
                stack.enter_context(removed(part, "_trainer"))
        stack.enter_context(own_forwards(module))
        copy = deepcopy(module, memo)
    originals = dict(module.named_modules())
    for path, part in copy.named_modules():
        if "_trainer" in vars(originals.get(path, part)):
            vars(part)["_trainer"] = vars(originals[path])["_trainer"]
    return copy


def one_line(error: BaseException) -> str:
    """Text of an error in the user's code, with the line that raised it."""
    frames = [(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)]
    text, line = " ".join(str(error).split())[:300], innermost_line(frames)
    return f"{type(error).__name__}: {text}{f' (at {line})' if line else ''}"


def shipped_call(module: nn.Module, call: Call) -> Call:
    """A call without targets where ``forward`` has a default for them, and without keys of dicts that it doesn't read.

    A deployed network has no labels. The network is run in evaluation mode to see what it reads and which arguments only a loss
    depends on; it is left as it was.

    Args:
        module: a copy whose own ``forward`` is run.
        call: as a step made it.
    """
    sig = own_signature(module)
    bound = sig.bind(*call[0], **call[1])
    for name, parameter in sig.parameters.items():
        if name not in bound.arguments:
            continue
        value = bound.arguments[name]
        if parameter.kind is Parameter.VAR_KEYWORD:
            bound.arguments[name] = {k: v for k, v in value.items() if not is_target(k)}
        elif parameter.default is None and is_target(name):
            del bound.arguments[name]
    for name, key in _only_for_a_loss(module, sig, bound):
        bound.arguments = _without(bound.arguments, name, key)
    bare = canonical_call(sig, bound.args, bound.kwargs)
    whole = canonical_call(sig, *call)
    return _only_read(module, bare if runs(module, bare) else whole)


def _only_for_a_loss(module: nn.Module, sig: Signature, bound: BoundArguments) -> list[tuple[str, str]]:
    """Arguments that are targets by what they do: without one of them a scalar is missing, and all other results are the same.

    Returns:
        Name of each, with its key if it is among the ``**kwargs``.
    """
    found: list[tuple[str, str]] = []
    try:
        whole = _outcome(module, bound)
    except Exception:  # whatever a forward raises; it is told by what runs the network next
        return found
    scalars = {path for path, tensor in whole.items() if tensor.ndim == 0}
    for name, key in _optional_tensors(sig, bound) if scalars else ():
        try:
            rest = _outcome(module, BoundArguments(sig, _without(bound.arguments, name, key)))
        except Exception:  # it needs the argument
            continue
        missing = whole.keys() - rest.keys()
        same = all(path in whole and torch.equal(whole[path], tensor) for path, tensor in rest.items())
        if rest and missing and missing <= scalars and same:
            found.append((name, key))
    return found


def _optional_tensors(sig: Signature, bound: BoundArguments) -> Iterator[tuple[str, str]]:
    for name, value in bound.arguments.items():
        if sig.parameters[name].kind is Parameter.VAR_KEYWORD:
            yield from ((name, key) for key, item in value.items() if isinstance(item, torch.Tensor))
        elif isinstance(value, torch.Tensor) and sig.parameters[name].default is None:
            yield name, ""


def _without(arguments: Mapping[str, Any], name: str, key: str) -> dict[str, Any]:
    """Arguments by name without one of them, or without a key of the ``**kwargs``."""
    if not key:
        return {k: v for k, v in arguments.items() if k != name}
    return {**arguments, name: {k: v for k, v in arguments[name].items() if k != key}}


def _outcome(module: nn.Module, bound: BoundArguments) -> dict[Any, torch.Tensor]:
    """Tensors of a module's result by their place in it."""
    with isolated_random(), torch.no_grad(), torch.inference_mode(False):
        leaves, _ = pytree.tree_flatten_with_path(register(module(*bound.args, **bound.kwargs)))
    return {path: leaf for path, leaf in leaves if isinstance(leaf, torch.Tensor)}


def _only_read(module: nn.Module, call: Call) -> Call:
    dicts = [leaf for leaf in (*call[0], *call[1].values()) if type(leaf) is dict]
    if not dicts:
        return call
    watched = {id(value): _Watched(value) for value in dicts}

    def replaced(value: Any) -> Any:
        return watched.get(id(value), value)

    if not runs(module, (tuple(map(replaced, call[0])), {k: replaced(v) for k, v in call[1].items()})):
        return call

    def reduced(value: Any) -> Any:
        return {k: v for k, v in value.items() if k in watched[id(value)].read} if id(value) in watched else value

    return tuple(map(reduced, call[0])), {k: reduced(v) for k, v in call[1].items()}


class _Watched(dict[Any, Any]):
    """A dict that remembers which of its keys were read."""

    def __init__(self, value: Mapping[Any, Any]) -> None:
        super().__init__(value)
        self.read: set[Any] = set()

    def __getitem__(self, key: Any) -> Any:
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key: Any, default: Any = None) -> Any:
        self.read.add(key)
        return super().get(key, default)

    def pop(self, key: Any, *default: Any) -> Any:
        self.read.add(key)
        return super().pop(key, *default)

    def __iter__(self) -> Iterator[Any]:
        self.read.update(super().keys())
        return super().__iter__()

    def keys(self) -> Any:
        self.read.update(super().keys())
        return super().keys()

    def items(self) -> Any:
        self.read.update(super().keys())
        return super().items()

    def values(self) -> Any:
        self.read.update(super().keys())
        return super().values()

    def copy(self) -> Any:
        self.read.update(super().keys())
        return super().copy()


def runs(module: nn.Module, call: Call) -> bool:
    """Whether a module takes a call, in the mode that it is in, and returns a tensor. Its buffers may change."""
    try:
        with isolated_random(), torch.no_grad(), torch.inference_mode(False):
            result = module(*call[0], **call[1])
    except Exception:  # whatever a forward raises for arguments that it needs
        return False
    return any(isinstance(leaf, torch.Tensor) for leaf in pytree.tree_leaves(result)) or _has_tensor(result)


def _has_tensor(value: Any) -> bool:
    """Whether an object that pytree doesn't know, such as a dataclass, holds a tensor."""
    return any(isinstance(item, torch.Tensor) for item in getattr(value, "__dict__", {}).values())
