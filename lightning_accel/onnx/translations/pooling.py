"""Adaptive pooling with any output size, and average pooling with a divisor or whose last window passes the edge."""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, always, argument

aten = torch.ops.aten


def adaptive_max_pool(x: torch.Tensor, output_size: int | Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Maximum of each of ``output_size`` bins along the last axes, and its place in the flattened axes.

    Bin ``i`` of ``o`` along an axis of ``n`` spans ``floor(i n / o)`` to ``ceil((i + 1) n / o)``; of equal values the first wins.

    Args:
        x: ``(N, C, *)`` or ``(C, *)`` with as many last axes as ``output_size`` has entries.
        output_size: bins along each.
    """
    sizes = [output_size] if isinstance(output_size, int) else list(output_size)
    first = x.ndim - len(sizes)
    values, places, stride = x, torch.zeros_like(x, dtype=torch.int64), 1
    for axis in reversed(range(first, x.ndim)):
        length, bins = x.shape[axis], sizes[axis - first]
        found, chosen = [], []
        for i in range(bins):
            start, end = i * length // bins, -(-(i + 1) * length // bins)
            best, inside = values.narrow(axis, start, end - start).max(axis, keepdim=True)
            found.append(best)
            inner = places.narrow(axis, start, end - start).gather(axis, inside)
            chosen.append(inner + (inside + start) * stride)
        values, places, stride = torch.cat(found, axis), torch.cat(chosen, axis), stride * length
    return values, places


def average_pool_of_padded(
    x: torch.Tensor,
    kernel_size: int | Sequence[int],
    stride: int | Sequence[int] = (),
    padding: int | Sequence[int] = 0,
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
    *,
    axes: int,
) -> torch.Tensor:
    """Average pooling with its padding written out: the zeros count, places beyond them don't.

    Engines disagree whether what a last window covers beyond the padding counts; without padding they agree that it doesn't.
    """
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[axes - 1]
    kernel, edge = _each(kernel_size, axes), _each(padding, axes)
    step = _each(stride, axes) if stride else kernel
    windows, ends = [], []
    for length, size, move, width in zip(x.shape[-axes:], kernel, step, edge, strict=True):
        count = (length + 2 * width - size + (move - 1 if ceil_mode else 0)) // move + 1
        if (
            ceil_mode and (count - 1) * move >= length + width
        ):  # PyTorch leaves out a window that starts in the right padding
            count -= 1
        windows.append(count)
        ends.append(max((count - 1) * move + size - length - 2 * width, 0))
    padded = F.pad(x, [width for width in reversed(edge) for _ in range(2)])
    if divisor_override is None:
        result: torch.Tensor = pool(padded, kernel, step, 0, ceil_mode=ceil_mode, count_include_pad=False)
    else:
        padded = F.pad(padded, [width for end in reversed(ends) for width in (0, end)])
        result = pool(padded, kernel, step) * (math.prod(kernel) / divisor_override)
    for axis, count in enumerate(windows, start=x.ndim - axes):
        result = result.narrow(axis, 0, count)
    return result


def _each(value: int | Sequence[int], axes: int) -> list[int]:
    """One entry for each axis; a single one holds for all."""
    given = [value] if isinstance(value, int) else list(value)
    return given * axes if len(given) == 1 else given


def adaptive_average_pool(x: torch.Tensor, output_size: Sequence[int]) -> torch.Tensor:
    """Mean of each of ``output_size`` bins along the last axes, see :func:`adaptive_max_pool`; axis by axis, for bins are boxes."""
    for axis, bins in enumerate(output_size, start=x.ndim - len(output_size)):
        length = x.shape[axis]
        edges = [(i * length // bins, -(-(i + 1) * length // bins)) for i in range(bins)]
        x = torch.cat([x.narrow(axis, start, end - start).mean(axis, keepdim=True) for start, end in edges], axis)
    return x


def _partial_windows(node: Node, axes: int) -> Stand | None:
    divided = axes > 1 and argument(node, "divisor_override")
    counted = argument(node, "ceil_mode") and argument(node, "count_include_pad")
    return partial(average_pool_of_padded, axes=axes) if counted or divided else None


RULES: Mapping[Any, Rule] = {
    aten.adaptive_max_pool1d.default: always(adaptive_max_pool),
    aten.adaptive_max_pool2d.default: always(adaptive_max_pool),
    aten.adaptive_max_pool3d.default: always(adaptive_max_pool),
    aten.adaptive_avg_pool3d.default: always(adaptive_average_pool),
    aten.avg_pool1d.default: lambda node: _partial_windows(node, 1),
    aten.avg_pool2d.default: lambda node: _partial_windows(node, 2),
    aten.avg_pool3d.default: lambda node: _partial_windows(node, 3),
}
