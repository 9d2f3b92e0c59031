"""State and computation of a distillation; not an ``nn.Module``, so that nothing in it is registered."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from copy import copy
from dataclasses import dataclass, field
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn

from lightning_accel.core import structure
from lightning_accel.core.finite import nan_input, nan_weight
from lightning_accel.core.optimizers import ownership_of
from lightning_accel.core.strategies import shards
from lightning_accel.distillation.adapters import (
    channels_of,
    keep_channels_,
    kept_channels,
    make_adapter,
    replace_parameters_,
    takes,
)
from lightning_accel.distillation.by_hand import StepCalls
from lightning_accel.distillation.cache.teacher_cache import Signals, TeacherCache
from lightning_accel.distillation.layers.paths import once, recorded
from lightning_accel.distillation.layers.selection import logits_in, select_tensor, selection_of, split_path
from lightning_accel.distillation.losses.base import Loss, are_sigmoids, check_are_logits, check_same_shape
from lightning_accel.distillation.scheduled import Number, Scheduled, find_scheduled
from lightning_accel.distillation.targets import Where, find, fits, usual_target
from lightning_accel.distillation.teachers.base import network_of
from lightning_accel.distillation.teachers.ema import EMATeacher
from lightning_accel.distillation.terms import LossTerm, Pair
from lightning_accel.errors import InvalidArgumentError, RunError

LOGITS = ""
Answer = tuple[Mapping[str, Any], Any]  # outputs of layers in a call, and output of the network


@dataclass
class Distillation:
    """Teacher, losses, and their connection to the student.

    Args:
        teacher: the frozen teacher.
        terms: losses with weights and layers.
        alpha: weight of the distillation loss.
        outputs: location of the student's logits; path, callable or None.
        teacher_outputs: location of the logits in the teacher's output; callable, selection such as ``"[logits]"``, or None.
        target: location of the target in a batch.
        mask: location of the padding mask in a batch.
        cache: cache of the teacher's outputs.
        task_loss: for a plain ``nn.Module`` student, ``(logits, target) -> scalar``.
        optimizer: for a plain ``nn.Module`` student, ``parameters -> Optimizer``.
        evaluate: whether to compute the losses in validation and test.
    """

    teacher: nn.Module
    terms: list[LossTerm]
    alpha: Number
    outputs: str | Callable[[Any], Tensor] | None = None
    teacher_outputs: str | Callable[[Any], Tensor] | None = None
    target: Where = None
    mask: Where = None
    cache: TeacherCache | None = None
    task_loss: Callable[[Any, Any], Tensor] | None = None
    optimizer: Callable[..., Any] | None = None
    evaluate: bool = False
    in_charge: bool = field(default=True, kw_only=True)  # of the teacher's device, not of copies of the student (EMA)
    verified: bool = field(default=False, kw_only=True)  # logits were recorded exactly once in a step
    checked: set[str] = field(default_factory=set, kw_only=True)  # terms whose outputs were looked at in this fit
    pairs: dict[str, list[Pair]] = field(default_factory=dict, kw_only=True)  # term -> resolved layers
    adapters: dict[str, nn.Module] = field(default_factory=dict, kw_only=True)
    restored: dict[str, Any] | None = field(default=None, kw_only=True)  # from a checkpoint, until the start of fit
    ema: EMATeacher | None = field(default=None, init=False)  # the averaged teacher, if there is one
    index: Tensor | None = field(default=None, kw_only=True)  # indices of the samples in the present batch
    digests: Tensor | None = field(default=None, kw_only=True)  # digest of the first sample
    step: StepCalls | None = field(default=None, kw_only=True)  # the student's calls, inside of a training step
    by_hand: bool = field(default=False, kw_only=True)  # whether a step has asked for its losses itself

    def __post_init__(self) -> None:
        self.ema = next((m for m in self.teacher.modules() if isinstance(m, EMATeacher)), None)

    def modules(self) -> Iterator[nn.Module]:
        """Modules that move between devices with the student."""
        own = (self.teacher, self.task_loss, *(term.loss for term in self.terms), *self.adapters.values())
        return (m for m in own if isinstance(m, nn.Module))

    def scheduled(self) -> dict[str, Scheduled]:
        """Scheduled numbers by name in the logs."""
        found = {f"distillation/{name}": s for name, s in find_scheduled(self).items()}
        for term in self.terms:
            for name, number in find_scheduled(term).items():
                found[f"distillation/{term.name}/{name}"] = number
        return found

    @property
    def needs_logits(self) -> bool:
        """Whether a term compares logits."""
        return any(term.student_layer is None for term in self.terms)

    def student_layers(self) -> list[str]:
        """Paths of the student's layers that terms compare."""
        return [pair.student for pairs in self.pairs.values() for pair in pairs if pair.student is not None]

    def teacher_layers(self) -> list[str]:
        """Paths of the teacher's layers that terms compare."""
        return [pair.teacher for pairs in self.pairs.values() for pair in pairs if pair.teacher is not None]

    def teach(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Signals:
        """Run the teacher; returns its logits and layers."""
        return self.teacher_signals(*self.call_teacher(args, kwargs))

    @torch.no_grad()
    def call_teacher(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Answer:
        """Call the teacher. ``no_grad``, not ``inference_mode``: tensors of the latter can't enter a loss."""
        network, paths = network_of(self.teacher), self.teacher_layers()
        modules = [module for path in paths if (module := split_path(path, "teacher_layer")[0])]
        with recorded(network, list(dict.fromkeys(modules))) as found:
            try:
                return found, self.teacher(*args, **kwargs)
            except Exception as error:
                error.add_note(
                    "Raised by the teacher, which is called with the arguments of the student's recorded call."
                )
                raise

    def teacher_signals(self, found: Mapping[str, Any], output: Any) -> Signals:
        """Logits and layers of the teacher's output."""
        signals = {path: _signal(found, output, path, "teacher_layer") for path in self.teacher_layers()}
        if self.needs_logits:
            signals[LOGITS] = logits_in(output, self.teacher_outputs, "teacher_outputs")
        return signals

    def student_signals(self, found: Mapping[str, Any], output: Any) -> Signals:
        """Logits and layers of the student in a step."""
        signals = {path: _signal(found, output, path, "student_layer") for path in self.student_layers()}
        if self.needs_logits:
            outputs = self.outputs if callable(self.outputs) else selection_of(self.outputs)
            signals[LOGITS] = logits_in(output, outputs, "outputs")
        return signals

    def losses(self, student: Signals, teacher: Signals, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of all terms, and each of them unweighted by name."""
        target = find(batch, self.target, "target")
        mask = find(batch, self.mask, "mask")
        masked = False
        parts: dict[str, Tensor] = {}
        for term in self.terms:
            asked, values = term.wants, []
            for pair in self.pairs[term.name]:
                ours, theirs = student[pair.student or LOGITS], teacher[pair.teacher or LOGITS]
                if pair.key in self.adapters:
                    ours = self.adapters[pair.key](ours)
                if pair.student is None and ours.shape != theirs.shape:
                    check_same_shape_of_logits(ours, theirs)
                if term.name not in self.checked:
                    self.checked.add(term.name)
                    if pair.student is None:
                        check_outputs(term, ours, theirs, usual_target(batch) if self.target is None else target)
                others = {"target": target, "batch": batch}
                if mask is not None and fits(mask, ours):
                    others["mask"] = mask
                    masked = masked or "mask" in asked
                if target is None and "target" in term.requires:
                    raise InvalidArgumentError(
                        f"Argument `target` must say where the target is in a batch for the loss {term.name!r}, but got None, "
                        f'and a {type(batch).__name__} has none under a usual name. Give `target="labels"`, an index or a callable.'
                    )
                values.append(term.loss(ours, theirs, **{k: v for k, v in others.items() if k in asked}))
            parts[term.name] = torch.stack(values).mean() if len(values) > 1 else values[0]
            _check_scalar(term.name, parts[term.name])
        if mask is not None and self.mask is not None and not masked:
            raise InvalidArgumentError(
                f"Argument `mask` must fit what a loss compares, but got a mask {tuple(mask.shape)} that none of "
                f"{', '.join(parts)} takes."
            )
        weighted = [(float(term.weight), parts[term.name]) for term in self.terms]
        first, *rest = [part if weight == 1 else weight * part for weight, part in weighted]
        return sum(rest, start=first), parts

    @torch.no_grad()
    def check_logits(self, student: Tensor, teacher: Tensor) -> None:
        """Check that losses accept the logits; losses that need a target are skipped.

        Raises:
            InvalidArgumentError: shapes differ, or a loss raises an error.
        """
        check_same_shape_of_logits(student, teacher)
        for term in self.terms:
            check_outputs(term, student, teacher, None)
            if not term.requires:
                _check_scalar(term.name, term.loss(student, teacher))

    def build_adapters(self, student: Signals, teacher: Signals, network: nn.Module) -> None:
        """Create missing adapters in the network's dtype; matching ones are kept."""
        for term in self.terms:
            for pair in self.pairs[term.name]:
                if pair.student is None or pair.teacher is None or not term.adapter:
                    continue
                ours, theirs = student[pair.student], teacher[pair.teacher]
                present = self.adapters.get(pair.key)
                if present is not None and takes(present) == channels_of(ours):
                    continue
                if ours.ndim != theirs.ndim or channels_of(ours) != channels_of(theirs):
                    self.adapters[pair.key] = make_adapter(ours, theirs, dtype_of(network))

    def follow(self, student: Signals, teacher: Signals, network: nn.Module, trainer: L.Trainer | None) -> list[str]:
        """Recreate adapters of layers with a changed number of channels; returns their names."""
        stale = {
            pair.key: self.adapters.pop(pair.key)
            for term in self.terms
            for pair in self.pairs[term.name]
            if pair.key in self.adapters
            and takes(self.adapters[pair.key]) != channels_of(student[pair.student or LOGITS])
        }
        grown = len(self.adapters)
        self.build_adapters(student, teacher, network)
        if (stale or len(self.adapters) > grown) and trainer is not None:
            old = [p for a in stale.values() for p in a.parameters()]
            for optimizer in trainer.optimizers:
                replace_parameters_(optimizer, old, [])
            self.train_adapters(network, trainer)
            share_(self.adapters, trainer)
        return list(stale)

    def train_adapters(self, network: nn.Module, trainer: L.Trainer) -> None:
        """Add the adapters to the optimizers: each to the one that updates its layer of the student."""
        if self.adapters and shards(trainer):
            raise InvalidArgumentError(
                f"Argument `student_layer` must name layers as wide as the teacher's where ranks hold rows of tensors (FSDP2), but got "
                f"{sorted(self.adapters)}, which need an adapter: an optimizer can't step it with sharded tensors. Choose others, or train "
                "with DDP."
            )
        ownership = ownership_of(trainer)
        layers = {pair.key: pair.student or "" for pairs in self.pairs.values() for pair in pairs}
        for key, adapter in self.adapters.items():
            path = split_path(layers[key], "student_layer")[0]
            owners: list[torch.optim.Optimizer] = []
            while path and not owners:  # a layer without parameters: what is around it
                owners = ownership.owners(network.get_submodule(path).parameters())
                path = path.rpartition(".")[0]
            owners = owners or ownership.owners(network.parameters()) or ownership.optimizers
            replace_parameters_(owners[0], [], list(adapter.parameters()))

    def change(self, change: structure.Change, order: Sequence[str], trainer: L.Trainer | None) -> None:
        """Resize adapters and an averaged teacher after a change of the student's parameters.

        Args:
            change: the change of the student.
            order: names of the student's parameters in order.
            trainer: Trainer whose optimizers have state of the adapters.
        """
        resized = structure.resized(change)
        resized = {name: resized[name] for name in order if name in resized}
        for pair in (pair for pairs in self.pairs.values() for pair in pairs if pair.key in self.adapters):
            adapter = self.adapters[pair.key]
            layer, _ = split_path(pair.student or "", "student_layer")
            kept = kept_channels(layer, takes(adapter), resized) if layer else None
            if kept is not None:
                keep_channels_(adapter, kept, trainer.optimizers if trainer is not None else ())
        if self.ema is not None and resized:
            self.ema.change_(change)

    def __deepcopy__(self, memo: dict[int, Any]) -> "Distillation":
        other = copy(self)  # averaged models copy the student but share its teacher
        other.in_charge, other.step = False, None
        return other


def dtype_of(module: nn.Module) -> torch.dtype:
    """Dtype of a network's parameters."""
    return next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)


def share_(adapters: Mapping[str, nn.Module], trainer: L.Trainer) -> None:
    """Broadcast the adapters of rank zero, since ranks draw different random numbers."""
    if trainer.world_size > 1:
        for parameter in (p for adapter in adapters.values() for p in adapter.parameters()):
            torch.distributed.broadcast(parameter.data, src=0)


def _check_scalar(name: str, value: Any) -> None:
    if not (isinstance(value, Tensor) and value.ndim == 0):
        raise InvalidArgumentError(
            f"Argument `losses` must return a scalar Tensor, but the loss {name!r} returned {value!r}."
        )


def check_same_shape_of_logits(student: Tensor, teacher: Tensor) -> None:
    """Raise unless logits have the same shape.

    Raises:
        InvalidArgumentError: shapes differ.
    """
    try:
        check_same_shape(student, teacher)
    except ValueError as error:
        raise InvalidArgumentError(f"{error} Select them with `outputs` and `teacher_outputs`.") from None


def check_first_losses(
    student: nn.Module, losses: Mapping[str, Tensor], signals: tuple[Signals, Signals], batch: Any
) -> None:
    """Check that the losses of the first step are numbers.

    Args:
        student: the trained network.
        losses: by name; that of ``training_step`` is the student's own.
        signals: outputs of student and teacher.
        batch: of the step.

    Raises:
        RunError: one is NaN; the message names it, and where NaN comes from.
    """
    bad = [name for name, loss in losses.items() if bool(loss.detach().isnan().any())]
    if not bad:
        return
    found = nan_input(batch) or nan_weight(student)
    for who, values in zip(("student", "teacher"), signals, strict=True):
        for path, value in values.items():
            if not found and bool(value.detach().isnan().any()):
                found = f"{path or 'the output'} of the {who} has NaN, although its weights and inputs are numbers"
    found = found or "weights, inputs and outputs are numbers: look at the loss itself"
    raise RunError(f"The loss {bad[0]!r} must be a number in the first step, but got NaN: {found}.")


def check_outputs(term: LossTerm, student: Tensor, teacher: Tensor, target: Tensor | None) -> None:
    """Check that a loss of logits fits what the networks compute and what the labels are.

    Args:
        term: the loss; those without an attribute ``outputs`` take anything.
        student: its logits.
        teacher: logits of the same shape.
        target: of the batch, if there is one.

    Raises:
        InvalidArgumentError: the loss is constant for this shape, or gets probabilities where it needs logits.
    """
    kind = getattr(term.loss, "outputs", "any")
    if kind not in ("classes", "labels"):
        return
    if isinstance(term.loss, Loss):
        term.loss.check(student)
    dim = getattr(term.loss, "dim", None)
    for who, values in (("student", student), ("teacher", teacher)):
        if values.ndim > 1 and values.shape[1 if dim is None else dim] > 1:
            check_are_logits(values, dim, who, term.name)
        if kind == "labels" and are_sigmoids(values):
            rank_zero_warn(
                f"The loss {term.name!r} applies a sigmoid to the {who}'s outputs, and all of them are in [0, 1] already: select the "
                "logits in front of the network's own sigmoid with `outputs` and `teacher_outputs`."
            )
    if kind == "classes" and target is not None and target.shape == student.shape:
        _check_exclusive(term.name, target, 1 if dim is None else dim)


def _check_exclusive(name: str, target: Tensor, dim: int) -> None:
    """Warn if a target has a value for each logit and isn't a distribution over classes."""
    values = target.detach().float()
    if bool((values >= 0).all()) and bool(((values.sum(dim) - 1).abs() < 1e-3).all()):
        return  # one-hot, or soft labels
    labels = bool(((values == 0) | (values == 1)).all())
    rank_zero_warn(
        f"The loss {name!r} compares probabilities of classes of which one is right, but the target has "
        + (
            'several or no labels of 1 in a sample. Use `losses="multilabel"`.'
            if labels
            else 'numbers for each output that are no probabilities. Use `losses="regression"`.'
        )
    )


def _signal(found: Mapping[str, Any], output: Any, path: str, argument: str) -> Tensor:
    module, keys = split_path(path, argument)
    return select_tensor(once(dict(found), module, argument) if module else output, keys, path, argument)
