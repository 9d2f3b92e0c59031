"""GPTQ on a group grid: round column by column and spread each error over the columns that are left (https://arxiv.org/abs/2210.17323)."""

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.group_grid import GroupGrid


def gptq_weight(weight: torch.Tensor, hessian: torch.Tensor, grid: GroupGrid, damping: float = 0.01) -> torch.Tensor:
    """Round a weight so that the error of the layer's output is small, not that of the weight.

    The element of largest magnitude in each group keeps the extreme integer, which determines the scale. So the result is on the
    grid: rounding it again changes nothing.

    Args:
        weight: ``(out, in)``.
        hessian: ``(in, in)``, sum of ``x xᵀ`` over the inputs of the layer.
        grid: bits and group.
        damping: share of the mean diagonal that is added to the diagonal.

    Returns:
        Values on the grid, ``(out, in)`` in float32.

    Raises:
        InvalidArgumentError: shapes differ, or ``hessian`` has values that aren't finite.
    """
    inputs = weight.shape[1]
    if hessian.shape != (inputs, inputs):
        raise InvalidArgumentError(
            f"Argument `hessian` must be (in, in) = {(inputs, inputs)}, but got {tuple(hessian.shape)}."
        )
    if not bool(torch.isfinite(hessian).all()):
        raise InvalidArgumentError(
            "Argument `hessian` must be finite, but got NaN or inf: the calibration data has them."
        )
    left = weight.detach().float().clone()
    h = hessian.double().clone()
    dead = h.diagonal() == 0  # inputs that are always 0: any weight is right, 0 costs nothing
    h.diagonal()[dead] = 1.0
    left[:, dead] = 0.0
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    result = torch.empty_like(left)
    for first in range(0, inputs, grid.group):
        last = first + grid.group
        block = left[:, first:last].clone()
        result[:, first:last], errors = _round_block(block, upper[first:last, first:last], grid)
        left[:, last:] -= errors @ upper[first:last, last:]
    return result


def _round_block(block: torch.Tensor, upper: torch.Tensor, grid: GroupGrid) -> tuple[torch.Tensor, torch.Tensor]:
    """Rounded values of one group, and each column's error divided by its diagonal element; ``(out, group)`` each."""
    integers, scales = grid.quantize(block)
    scale = scales.float()
    extreme = block.abs().argmax(1)
    pinned = integers.gather(1, extreme[:, None])[:, 0].float()
    low, high = (-8, 7) if grid.bits == 4 else (-127, 127)
    step = torch.where(scale[:, 0] == 0, 1.0, scale[:, 0])
    rounded, errors = torch.empty_like(block), torch.empty_like(block)
    for j in range(grid.group):
        column = block[:, j]
        nearest = (column / step).round().clamp(low, high)
        nearest = torch.where(extreme == j, pinned, nearest)
        rounded[:, j] = nearest * scale[:, 0]
        errors[:, j] = (column - rounded[:, j]) / upper[j, j]
        block[:, j + 1 :] -= errors[:, j, None] * upper[j, j + 1 :]
    return rounded, errors
