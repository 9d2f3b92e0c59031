"""Order statistics and running extremes: median, k-th value, cumulative maximum, minimum and product, sorted search."""

from collections.abc import Callable, Mapping
from typing import Any

import torch

from lightning_accel.onnx.translations.rule import Rule, always

aten = torch.ops.aten


def kth_value(x: torch.Tensor, k: int, dim: int = -1, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The k-th smallest value along ``dim``, counted from 1, and its place; of equal values, any place."""
    if x.ndim == 0:
        return x.clone(), torch.zeros_like(x, dtype=torch.int64)
    values, places = x.topk(k, dim, largest=False)
    values, places = values.narrow(dim, k - 1, 1), places.narrow(dim, k - 1, 1)
    return (values, places) if keepdim else (values.squeeze(dim), places.squeeze(dim))


def median(x: torch.Tensor, dim: int, keepdim: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """The lower median along ``dim``, and its place; ``x`` has no NaN."""
    return kth_value(x, 1 if x.ndim == 0 else (x.shape[dim] + 1) // 2, dim, keepdim)


def median_of_all(x: torch.Tensor) -> torch.Tensor:
    """The lower median of all values."""
    return median(x.reshape(-1), 0)[0]


def running(pick: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable[..., Any]:
    """Cumulative maximum or minimum with places, in logarithmically many steps (https://doi.org/10.1145/7902.7903).

    Args:
        pick: whether the later of two values goes before the earlier one; of equal values, the later does.
    """

    def scan(x: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        if x.ndim == 0:
            return x.clone(), torch.zeros_like(x, dtype=torch.int64)
        x = x.movedim(dim, -1)
        places = torch.arange(x.shape[-1], device=x.device).expand(x.shape)
        step = 1
        while step < x.shape[-1]:
            early, late = x[..., :-step], x[..., step:]
            later = pick(late, early)
            x = torch.cat((x[..., :step], torch.where(later, late, early)), -1)
            chosen = torch.where(later, places[..., step:], places[..., :-step])
            places = torch.cat((places[..., :step], chosen), -1)
            step *= 2
        return x.movedim(-1, dim), places.movedim(-1, dim)

    return scan


def cumulative_product(x: torch.Tensor, dim: int, *, dtype: torch.dtype | None = None) -> torch.Tensor:
    """``x.cumprod(dim)``, in logarithmically many steps."""
    kind = dtype or (x.dtype if x.is_floating_point() else torch.int64)
    x = x.to(kind)
    if x.ndim == 0:
        return x.clone()
    x = x.movedim(dim, -1)
    step = 1
    while step < x.shape[-1]:
        x = torch.cat((x[..., :step], x[..., step:] * x[..., :-step]), -1)
        step *= 2
    return x.movedim(-1, dim)


def sorted_search(
    boundaries: torch.Tensor,
    values: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: torch.Tensor | None = None,
) -> torch.Tensor:
    """Number of boundaries before each value: of those below it, or with ``right`` of those that don't exceed it.

    Args:
        boundaries: ``(..., S)``, or ``(S,)`` for all values.
        values: ``(..., V)``, or a number.
        out_int32: whether the counts are int32.
        right: whether equal boundaries count.
        side: the same in words.
        sorter: places that sort the boundaries.
    """
    if sorter is not None:
        boundaries = boundaries.gather(-1, sorter)
    given = torch.as_tensor(values, dtype=boundaries.dtype) if not isinstance(values, torch.Tensor) else values
    edges = boundaries if boundaries.ndim == 1 else boundaries.unsqueeze(-2)
    before = edges <= given.unsqueeze(-1) if right or side == "right" else edges < given.unsqueeze(-1)
    return before.sum(-1).to(torch.int32 if out_int32 else torch.int64)


def buckets(values: Any, boundaries: torch.Tensor, *, out_int32: bool = False, right: bool = False) -> torch.Tensor:
    """``torch.bucketize``: :func:`sorted_search` in one row of boundaries."""
    return sorted_search(boundaries, values, out_int32=out_int32, right=right)


RULES: Mapping[Any, Rule] = {
    aten.kthvalue.default: always(kth_value),
    aten.median.dim: always(median),
    aten.median.default: always(median_of_all),
    aten.cummax.default: always(running(torch.ge)),
    aten.cummin.default: always(running(torch.le)),
    aten.cumprod.default: always(cumulative_product),
    aten.searchsorted.Tensor: always(sorted_search),
    aten.searchsorted.Scalar: always(sorted_search),
    aten.bucketize.Tensor: always(buckets),
}
