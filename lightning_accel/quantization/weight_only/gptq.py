"""GPTQ on a group grid: round column by column and spread each error over the columns that are left (https://arxiv.org/abs/2210.17323)."""

from collections.abc import Sequence

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.group_grid import GroupGrid


def gptq_weight(weight: torch.Tensor, hessian: torch.Tensor, grid: GroupGrid, damping: float = 0.01) -> torch.Tensor:
    """Round a weight so that the error of the layer's output is small, not that of the weight.

    The element of largest magnitude in each group keeps the extreme integer, which determines the scale. So the result is on the
    grid: rounding it again changes nothing.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``, sum of ``x xᵀ`` over the inputs of the layer. If it is 0, as for an expert that no token was sent to, the
            weight is rounded to the nearest.
        grid: bits and group.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        Values on the grid, ``(out, in)`` in float32.

    Raises:
        InvalidArgumentError: shapes differ, or ``hessian`` has values that aren't finite.
    """
    return gptq_weights([weight], hessian, grid, damping)[0]


def gptq_weights(
    weights: Sequence[torch.Tensor], hessian: torch.Tensor, grid: GroupGrid, damping: float = 0.01
) -> list[torch.Tensor]:
    """:func:`gptq_weight` of several weights with the same inputs, for which the Hessian is decomposed once."""
    for weight in weights:
        if hessian.shape != (weight.shape[1], weight.shape[1]):
            raise InvalidArgumentError(
                f"Argument `hessian` must be (in, in) = {(weight.shape[1], weight.shape[1])}, but got {tuple(hessian.shape)}."
            )
    if not bool(torch.isfinite(hessian).all()):
        raise InvalidArgumentError(
            "Argument `hessian` must be finite, but got NaN or inf: the calibration data has them."
        )
    dead = hessian.diagonal() == 0  # inputs that are always 0: any weight is right, 0 costs nothing
    if bool(dead.all()):
        return [grid(weight.detach().float()) for weight in weights]
    h = hessian.to(torch.float64, copy=True)
    h.diagonal()[dead] = 1.0
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    return [_round(weight.detach().float().masked_fill(dead, 0.0), upper, grid) for weight in weights]


def _round(left: torch.Tensor, upper: torch.Tensor, grid: GroupGrid) -> torch.Tensor:
    """Rounded values of a weight ``(out, in)``, which is used up."""
    result = torch.empty_like(left)
    for first in range(0, left.shape[1], grid.group):
        last = first + grid.group
        result[:, first:last], errors = _round_block(left[:, first:last], upper[first:last, first:last], grid)
        left[:, last:] -= errors @ upper[first:last, last:]
    return result


def _round_block(block: torch.Tensor, upper: torch.Tensor, grid: GroupGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded values of one group, and each column's error divided by its diagonal element; ``(out, group)`` each."""
    integers, scales = grid.quantize(block)
    scale = scales.float()[:, 0]
    extreme = block.abs().argmax(1)
    pinned = integers.gather(1, extreme[:, None])[:, 0].float()
    low, high = (-8, 7) if grid.bits == 4 else (-127, 127)
    step = torch.where(scale == 0, 1.0, scale)
    columns = block.t().contiguous()  # (group, out): the elements of a column lie side by side
    rounded, errors = torch.empty_like(columns), torch.empty_like(columns)
    for j, column in enumerate(columns):
        nearest = (column / step).round_().clamp_(low, high)
        nearest = torch.where(extreme == j, pinned, nearest)
        torch.mul(nearest, scale, out=rounded[j])
        torch.sub(column, rounded[j], out=errors[j]).div_(upper[j, j])
        columns[j + 1 :] -= upper[j, j + 1 :, None] * errors[j]
    return rounded.t(), errors.t().contiguous()
