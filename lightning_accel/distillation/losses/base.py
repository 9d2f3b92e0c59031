"""Base of the losses: computation in float32, and logits of any layout as rows."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightning_accel.distillation.scheduled import Scheduled, bounds
from lightning_accel.errors import InvalidArgumentError

_MANY = 16  # values that are hardly all in [0, 1] by chance, if they are logits


def in_float32(loss: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Compute a loss ``(student, teacher, ...)`` in float32 (or float64, if an input is), also under autocast.

    Autocast would run the matrix products inside in half precision, even of float32 tensors.
    """

    @wraps(loss)
    def computed(student: Tensor, teacher: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        dtype = torch.promote_types(torch.promote_types(student.dtype, teacher.dtype), torch.float32)
        student, teacher = student.to(dtype), teacher.to(dtype)
        device = student.device.type
        if not torch.is_autocast_enabled(device):  # entering the context takes longer than a loss of a few logits
            return loss(student, teacher, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return loss(student, teacher, *args, **kwargs)

    return computed


def check_same_shape(student: Tensor, teacher: Tensor, what: str = "Logits") -> None:
    """Raise unless tensors have the same shape.

    Raises:
        InvalidArgumentError: shapes differ.
    """
    if student.shape != teacher.shape:
        raise InvalidArgumentError(
            f"{what} of student and teacher must have the same shape, but got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}."
        )


def as_rows(logits: Tensor, dim: int | None, mask: Tensor | None = None, what: str = "SoftTargetLoss") -> Tensor:
    """Reshape logits of any layout to one row per position.

    Args:
        logits: ``(N, C)``; with ``dim``, classes may lie in any dimension: ``(N, T, C)``, ``(N, C, H, W)``.
        dim: dimension of the classes; ``None`` requires ``(N, C)``.
        mask: the layout without the classes; positions that are False or 0 (padding) are left out.
        what: name of the loss, for messages.

    Returns:
        ``(P, C)``: all positions, or those selected by the mask.

    Raises:
        InvalidArgumentError: ``dim`` is needed or out of range, there is one logit alone, or the mask has another shape or selects
            nothing.
    """
    if logits.ndim < 2:
        check_classes(logits, None, what)
    if dim is None and logits.ndim != 2:
        raise InvalidArgumentError(
            f"Argument `dim` must name the dimension of the classes unless logits are (N, C), but got None with shape "
            f"{tuple(logits.shape)}. Use `losses={what}(dim=...)`."
        )
    dim = 1 if dim is None else dim
    if not -logits.ndim <= dim < logits.ndim:
        raise InvalidArgumentError(
            f"Argument `dim` must be a dimension of the logits {tuple(logits.shape)}, but got {dim}."
        )
    check_classes(logits, dim, what)
    if logits.ndim == 2 and dim in (1, -1) and mask is None:
        return logits  # already rows; views would cost more than the loss
    rows = logits.movedim(dim, -1)
    return positions(rows, mask).reshape(-1, logits.shape[dim])


def check_classes(logits: Tensor, dim: int | None, what: str, least: int = 2) -> None:
    """Raise unless logits are of several classes: a softmax over one logit is 1, whatever the network computes.

    Args:
        logits: of any layout.
        dim: dimension of the classes; ``None`` is that of ``(N, C)``.
        what: name of the loss, for messages.
        least: number of classes below which the loss is constant.

    Raises:
        InvalidArgumentError: there are fewer classes.
    """
    count = logits.shape[1 if dim is None else dim] if logits.ndim > 1 else 1
    if count < least:
        few = (
            "one class is always certain"
            if count == 1
            else f"of {count} classes it sees the order alone, and has no gradient"
        )
        raise InvalidArgumentError(
            f"Logits must have at least {least} classes for {what}, but got shape {tuple(logits.shape)}: {few}. Use "
            '`losses="multilabel"` for a logit of its own for each label (binary: one), trained with a sigmoid, or '
            '`losses="regression"` for numbers.'
        )


def check_are_logits(values: Tensor, dim: int | None, who: str, loss: str) -> None:
    """Raise if values are probabilities already: the output of a softmax.

    Args:
        values: of any layout, as :func:`as_rows` takes them.
        dim: dimension of the classes; ``None`` is that of ``(N, C)``.
        who: ``"student"`` or ``"teacher"``, for messages.
        loss: name of the loss, for messages.

    Raises:
        InvalidArgumentError: all values are in [0, 1], and those of each position sum up to 1.
    """
    dim = 1 if dim is None else dim
    exact = 1e-3 if values.dtype in (torch.float32, torch.float64) else 2e-2  # sums in half precision
    values = values.detach().float()
    inside = bool(((values >= 0) & (values <= 1)).all()) and not bool((values == values.round()).all())
    if inside and bool(((values.sum(dim) - 1).abs() < exact).all()):
        argument = "outputs" if who == "student" else "teacher_outputs"
        raise InvalidArgumentError(
            f"Argument `{argument}` must lead to logits of the {who} for the loss {loss!r}, but got probabilities: all values are in "
            "[0, 1], and those of each position sum up to 1. Name what precedes the softmax, or take the logarithm: "
            f"`{argument}=lambda output: output.clamp_min(1e-6).log()`."
        )


def are_sigmoids(values: Tensor) -> bool:
    """Whether values may be probabilities of single labels: there are many, and all are in [0, 1]."""
    values = values.detach()
    return (
        values.numel() >= _MANY
        and bool(((values >= 0) & (values <= 1)).all())
        and not bool((values == values.round()).all())
    )


def positions(values: Tensor, mask: Tensor | None) -> Tensor:
    """Reshape vectors ``(..., C)`` to ``(P, C)``, restricted to a mask ``(...)``.

    Raises:
        InvalidArgumentError: the mask has another shape, or selects nothing.
    """
    rows = values.reshape(-1, values.shape[-1])
    if mask is None:
        return rows
    if mask.shape != values.shape[:-1]:
        raise InvalidArgumentError(
            f"Argument `mask` must have an element for each position, {tuple(values.shape[:-1])}, but got "
            f"{tuple(mask.shape)}."
        )
    rows = rows[mask.reshape(-1).to(rows.device) != 0]
    if not len(rows):
        raise InvalidArgumentError("Argument `mask` must leave a position, but got one that leaves none in a batch.")
    return rows


def check_positive(argument: str, value: Any, *, zero: bool = False) -> None:
    """Raise unless a setting is, at all times, a finite number above 0 (or at least 0).

    Raises:
        InvalidArgumentError: it is out of its range.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | Scheduled):
        raise InvalidArgumentError(f"Argument `{argument}` must be a number, or `Scheduled`, but got {value!r}.")
    low, high = bounds(value)
    if not (math.isfinite(high) and low >= 0 and (low > 0 or zero)):
        raise InvalidArgumentError(
            f"Argument `{argument}` must be {'0 or above' if zero else 'above 0'}, but got {value}."
        )


class Loss:
    """Base of the losses here: settings in attributes, shown by ``repr``.

    Attributes:
        adapts: whether an adapter maps student features to the teacher's channels before the loss.
        needs_all_logits: whether it needs more than the probabilities of a few classes and the sum of the rest.
        layers: whether it compares layers: ``"none"`` (logits alone), ``"optional"`` or ``"required"``.
        outputs: kind of logits that it compares: ``"classes"``, of which one is right, ``"labels"``, of which each is right or wrong,
            or ``"any"`` numbers.
    """

    outputs = "any"

    adapts = True
    needs_all_logits = False
    layers = "none"

    def check(self, logits: Tensor) -> None:
        """Raise if the loss is constant for logits of this shape.

        Raises:
            InvalidArgumentError: it is.
        """
        if self.outputs == "classes":
            as_rows(logits, getattr(self, "dim", None), None, type(self).__name__)

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"
