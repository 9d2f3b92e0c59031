"""Scatter with a mean, and reductions by an index of rows."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, always, argument

aten = torch.ops.aten


def scatter_mean(
    x: torch.Tensor,
    dim: int,
    index: torch.Tensor,
    src: torch.Tensor,
    reduce: str = "mean",
    *,
    include_self: bool = True,
) -> torch.Tensor:
    """Mean of what goes to each place, and of what was there with ``include_self``; other places keep their values."""
    ones = torch.ones_like(src)
    added = torch.zeros_like(x).scatter_add(dim, index, src)
    count = torch.zeros_like(x).scatter_add(dim, index, ones)
    sums, number = (x + added, count + 1) if include_self else (added, count.clamp(min=1))
    mean = sums / number if x.is_floating_point() else torch.div(sums, number, rounding_mode="floor")
    return torch.where(count > 0, mean, x)


def index_reduce(
    x: torch.Tensor, dim: int, index: torch.Tensor, source: torch.Tensor, reduce: str, *, include_self: bool = True
) -> torch.Tensor:
    """Reduce rows of ``source`` along ``dim`` into the rows of ``x`` that ``index`` ``(R,)`` names."""
    shape = [1] * x.ndim
    shape[dim] = -1
    spread = index.reshape(shape).expand_as(source)
    if reduce == "mean":
        return scatter_mean(x, dim, spread, source, include_self=include_self)
    return x.scatter_reduce(dim, spread, source, reduce, include_self=include_self)


def _mean(node: Node) -> Stand | None:
    return scatter_mean if argument(node, "reduce") == "mean" else None


RULES: Mapping[Any, Rule] = {
    aten.scatter_reduce.two: _mean,
    aten.index_reduce.default: always(index_reduce),
}
