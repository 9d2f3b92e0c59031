"""Terms of a distillation loss: losses, weights, and the layers that they compare."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lightning_accel.core.arguments import check_arguments, fits, shown
from lightning_accel.distillation.layers.paths import expand
from lightning_accel.distillation.layers.selection import split_path
from lightning_accel.distillation.losses.base import check_positive
from lightning_accel.distillation.losses.registry import (
    has_temperature,
    layers_of,
    loss_names,
    name_of,
    named_loss,
)
from lightning_accel.distillation.losses.signature import required, wants
from lightning_accel.distillation.scheduled import Number, Scheduled
from lightning_accel.errors import InvalidArgumentError

Layer = str | list[str] | None


class LossTerm:
    """A term of a distillation loss: a loss, its weight, and the layers that it compares.

    Args:
        loss: a name (``"kd"``, ``"hint"``, ...) or a callable ``(student, teacher) -> scalar``, which may have further
            parameters named ``target``, ``mask`` and ``batch``.
        weight: at least 0; may be :class:`Scheduled`.
        student_layer: path(s) of layers of the student, with ``*`` for parts of names; ``None`` compares the logits. Brackets
            select from a tuple or dict: ``"encoder[0]"``, ``"[hidden_states][-1]"`` (of what ``forward`` returns).
        teacher_layer: the same number of layers of the teacher; ``None``: the same paths.
        name: name in logs and in the checkpoint; ``None``: the name of the loss.
        adapter: whether a trained layer maps student features to the teacher's channels if they differ; ``None``: as required
            by the loss.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> LossTerm("hint", weight=0.3, student_layer="layer2", teacher_layer="layer3")
        LossTerm(HintLoss(), weight=0.3, student_layer='layer2', teacher_layer='layer3')
    """

    def __init__(
        self,
        loss: Callable[..., Any] | str,
        weight: Number = 1.0,
        student_layer: Layer = None,
        teacher_layer: Layer = None,
        name: str | None = None,
        adapter: bool | None = None,
    ) -> None:
        check_arguments(
            LossTerm.__init__,
            {"student_layer": student_layer, "teacher_layer": teacher_layer, "name": name, "adapter": adapter},
        )
        if not isinstance(loss, str) and not callable(loss):
            raise InvalidArgumentError(f"Argument `loss` must be a name or a callable, but got {shown(loss)}.")
        if not fits(weight, float | Scheduled):
            raise InvalidArgumentError(f"Argument `weight` must be a number or a Scheduled, but got {shown(weight)}.")
        check_positive("weight", weight, zero=True)
        if teacher_layer is not None and student_layer is None:
            raise InvalidArgumentError(
                f"Argument `student_layer` must be given with `teacher_layer`, but got None with {teacher_layer!r}."
            )
        self.name = name or (loss if isinstance(loss, str) else name_of(loss))
        self.loss: Callable[..., Tensor] = named_loss(loss) if isinstance(loss, str) else loss
        if isinstance(self.loss, nn.Module) and any(p.requires_grad for p in self.loss.parameters()):
            raise InvalidArgumentError(
                f"Argument `losses` must hold no parameters to train, but got a {type(self.loss).__name__} with some: which no "
                "optimizer would update; pass a loss without parameters."
            )
        if isinstance(loss, str) and layers_of(loss) == "required" and student_layer is None:
            raise InvalidArgumentError(
                f"Argument `student_layer` must name a layer for the loss {loss!r}, but got None. "
                f'Give it: `LossTerm("{loss}", student_layer="layer3", teacher_layer="layer3")`.'
            )
        self.wants, self.requires = wants(self.loss), required(self.loss)
        self.weight = weight
        self.student_layer = student_layer
        self.teacher_layer = student_layer if teacher_layer is None else teacher_layer
        self.adapter = bool(getattr(self.loss, "adapts", True)) if adapter is None else adapter

    def __repr__(self) -> str:
        layers = f", student_layer={self.student_layer!r}, teacher_layer={self.teacher_layer!r}"
        return f"LossTerm({self.loss!r}, weight={self.weight!r}{layers if self.student_layer else ''})"


@dataclass(frozen=True)
class Pair:
    """Two layers that a term compares; ``None`` represents the logits."""

    student: str | None
    teacher: str | None
    key: str  # key of the adapter in the checkpoint


def pairs_of(term: LossTerm, student: nn.Module, teacher: nn.Module) -> list[Pair]:
    """Resolve the layers of a term in the networks.

    Raises:
        InvalidArgumentError: a path doesn't exist, or numbers of layers differ.
    """
    if term.student_layer is None or term.teacher_layer is None:
        return [Pair(None, None, term.name)]
    ours = expand(student, term.student_layer, "student_layer")
    theirs = expand(teacher, term.teacher_layer, "teacher_layer")
    if len(ours) != len(theirs):
        raise InvalidArgumentError(
            f"Argument `teacher_layer` must lead to as many layers as `student_layer`, but got {len(theirs)} "
            f"({', '.join(theirs)}) for {len(ours)} ({', '.join(ours)}). List the layers one by one."
        )
    return [Pair(a, b, f"{term.name}:{a}:{b}") for a, b in zip(ours, theirs, strict=True)]


def make_terms(
    losses: Any, temperature: Number | None = None, student_layer: Layer = None, teacher_layer: Layer = None
) -> list[LossTerm]:
    """Create the terms of a distillation loss.

    Args:
        losses: a name, a callable or a :class:`LossTerm`; a list of them; or a mapping from names to weights or terms.
        temperature: temperature of all named losses that have one.
        student_layer: layers for named losses that compare layers.
        teacher_layer: corresponding layers of the teacher.

    Raises:
        InvalidArgumentError: an unknown name, an invalid weight, an unused temperature or layer, or no loss.
    """
    terms: list[LossTerm] = []
    used = {"temperature": temperature is None, "student_layer": student_layer is None}

    def add(loss: Any, weight: Any = 1.0, name: str | None = None) -> None:
        if isinstance(loss, LossTerm):
            terms.append(loss)
            return
        layers: tuple[Layer, Layer] = (None, None)
        if isinstance(loss, str) and loss in loss_names():
            name = name or loss
            if layers_of(loss) != "none" and student_layer is not None:
                layers, used["student_layer"] = (student_layer, teacher_layer), True
            if layers_of(loss) == "required" and layers[0] is None:
                LossTerm(loss)  # raises with an example
            if temperature is not None and has_temperature(loss):
                loss, used["temperature"] = named_loss(loss, temperature), True
        terms.append(LossTerm(loss, weight, *layers, name=name))

    if isinstance(losses, Mapping):
        for name, value in losses.items():
            if isinstance(value, LossTerm):
                value.name = name
                add(value)
            elif isinstance(value, Scheduled | int | float) and not isinstance(value, bool):
                add(name, value)
            else:
                raise InvalidArgumentError(
                    f"Argument `losses` must give a weight or a LossTerm for {name!r}, but got {value!r}. "
                    "Write `LossTerm(loss, weight=...)`."
                )
    elif isinstance(losses, Sequence) and not isinstance(losses, str):
        for loss in losses:
            add(loss)
    else:
        add(losses)
    _check_terms(terms, used, temperature, student_layer, teacher_layer)
    return terms


def _check_terms(terms: list[LossTerm], used: dict[str, bool], *settings: Any) -> None:
    temperature, student_layer, teacher_layer = settings
    if not terms:
        raise InvalidArgumentError("Argument `losses` must hold a loss, but got none.")
    if not used["temperature"]:
        raise InvalidArgumentError(
            f"Argument `temperature` must be left out unless `losses` names a loss that has one, but got {temperature}. Give "
            "it to the loss."
        )
    if not used["student_layer"] or (student_layer is None and teacher_layer is not None):
        raise InvalidArgumentError(
            f"Argument `student_layer` must go with a named loss of features, but got {student_layer!r} (`teacher_layer`: "
            f"{teacher_layer!r}). Give layers to the loss: `LossTerm(loss, student_layer=..., teacher_layer=...)`."
        )
    for term in terms:
        for argument, paths in (("student_layer", term.student_layer), ("teacher_layer", term.teacher_layer)):
            for path in [paths] if isinstance(paths, str) else paths or []:
                split_path(path, argument)
    names = [term.name for term in terms]
    taken: dict[str, int] = {}
    for term in terms:  # number losses with the same name
        if names.count(term.name) > 1:
            taken[term.name] = taken.get(term.name, 0) + 1
            term.name = f"{term.name}_{taken[term.name]}"
