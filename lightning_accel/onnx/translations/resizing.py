"""Antialiased interpolation as two matrix products: OpenVINO computes ONNX's ``antialias`` otherwise."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from lightning_accel.onnx.translations.rule import Rule

aten = torch.ops.aten


def antialiased(
    x: torch.Tensor,
    output_size: Sequence[int] | None,
    align_corners: bool,
    scale_factors: Sequence[float] | None = None,
    *,
    kernel: Callable[[torch.Tensor], torch.Tensor],
    reach: float,
) -> torch.Tensor:
    """Resize images ``(N, C, H, W)`` with a kernel that is widened where the image shrinks.

    Args:
        x: the images.
        output_size: height and width; ``None``: from the factors.
        align_corners: whether the grid's step is that of coinciding corner pixels.
        scale_factors: factors, which also define the grid if they are given.
        kernel: the filter as a function of the distance in input pixels.
        reach: its support.
    """
    factors = [None, None] if not scale_factors else list(scale_factors)
    sizes = (
        [int(n * f) for n, f in zip(x.shape[-2:], factors, strict=True)]  # type: ignore[operator]
        if output_size is None
        else list(output_size)
    )
    rows, columns = (
        _matrix(n, m, align_corners, factor, kernel, reach, x)
        for n, m, factor in zip(x.shape[-2:], sizes, factors, strict=True)
    )
    return rows @ (x @ columns.transpose(0, 1))


def _matrix(
    length: int,
    size: int,
    align_corners: bool,
    factor: float | None,
    kernel: Callable[[torch.Tensor], torch.Tensor],
    reach: float,
    like: torch.Tensor,
) -> torch.Tensor:
    """Weights ``(size, length)`` of each input pixel in each output pixel; the rows sum to 1."""
    aligned = (length - 1) / (size - 1) if size > 1 else 0.0
    scale = aligned if align_corners else 1.0 / factor if factor else length / size
    widened = max(scale, 1.0)
    support = reach * widened
    out = torch.arange(size, device=like.device, dtype=torch.float32)
    center = scale * (out + 0.5)  # with aligned corners, too: PyTorch changes only the scale
    first = (center - support + 0.5).trunc().clamp(min=0.0)
    last = (center + support + 0.5).trunc().clamp(max=float(length))
    place = torch.arange(length, device=like.device, dtype=torch.float32)
    weights = kernel((place - center.unsqueeze(1) + 0.5) / widened)
    inside = (place >= first.unsqueeze(1)) & (place < last.unsqueeze(1))
    weights = torch.where(inside, weights, torch.zeros_like(weights))
    return (weights / weights.sum(1, keepdim=True)).to(like.dtype)


def triangle(distance: torch.Tensor) -> torch.Tensor:
    """Filter of bilinear interpolation."""
    return (1.0 - distance.abs()).clamp(min=0.0)


def cubic(distance: torch.Tensor) -> torch.Tensor:
    """Keys' filter with a = -0.5, as in Pillow (https://doi.org/10.1109/TASSP.1981.1163711)."""
    x = distance.abs()
    near = (1.5 * x - 2.5) * x * x + 1.0
    far = ((-0.5 * x + 2.5) * x - 4.0) * x + 2.0
    return torch.where(x < 1.0, near, torch.where(x < 2.0, far, torch.zeros_like(x)))


_BILINEAR = partial(antialiased, kernel=triangle, reach=1.0)
_BICUBIC = partial(antialiased, kernel=cubic, reach=2.0)


def _two_factors(
    resize: Any,
    x: torch.Tensor,
    output_size: Any,
    align_corners: bool,
    up: float | None = None,
    across: float | None = None,
) -> Any:
    """The overload that takes its factors one by one."""
    factors = None if up is None or across is None else (up, across)
    return resize(x, output_size, align_corners, factors)


RULES: Mapping[Any, Rule] = {
    aten._upsample_bilinear2d_aa.vec: lambda node: _BILINEAR,
    aten._upsample_bicubic2d_aa.vec: lambda node: _BICUBIC,
    aten._upsample_bilinear2d_aa.default: lambda node: partial(_two_factors, _BILINEAR),
    aten._upsample_bicubic2d_aa.default: lambda node: partial(_two_factors, _BICUBIC),
}
