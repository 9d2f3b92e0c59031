"""Base of the losses: computation in float32, and logits of any layout as rows."""

import math
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from lightning_accel.distillation.scheduled import Scheduled, bounds
from lightning_accel.errors import InvalidArgumentError


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
        InvalidArgumentError: ``dim`` is needed or out of range, or the mask has another shape or selects nothing.
    """
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
    if logits.ndim == 2 and dim in (1, -1) and mask is None:
        return logits  # already rows; views would cost more than the loss
    rows = logits.movedim(dim, -1)
    return positions(rows, mask).reshape(-1, logits.shape[dim])


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
    """

    adapts = True
    needs_all_logits = False
    layers = "none"

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{type(self).__name__}({settings})"
