"""EmbeddingBag as a lookup and a reduction."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, argument

aten = torch.ops.aten
_SUM, _MEAN, _MAX = 0, 1, 2


def equal_bags(
    weight: torch.Tensor,
    indices: torch.Tensor,
    offsets: torch.Tensor,
    scale_grad_by_freq: bool = False,
    mode: int = _SUM,
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
    *,
    length: int,
) -> tuple[torch.Tensor, ...]:
    """Rows of a table summed, averaged or maximized over bags of ``length`` indices each, which is what a 2-D input gives.

    Indices equal to ``padding_idx`` don't count; a bag of nothing else is zero.

    Returns:
        The bags ``(B, D)``, and three tensors for the backward pass, which nothing reads.
    """
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    grouped = indices.reshape(-1, length)  # (B, L)
    rows = torch.embedding(weight, grouped)  # (B, L, D)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights.reshape(-1, length, 1)
    counts = torch.ones_like(grouped, dtype=torch.bool) if padding_idx is None else grouped != padding_idx
    if mode == _MAX:
        if padding_idx is None:
            bags = rows.amax(1)
        else:
            lowest = torch.full_like(rows, torch.finfo(rows.dtype).min)
            best = torch.where(counts.unsqueeze(-1), rows, lowest).amax(1)
            bags = torch.where(counts.any(1, keepdim=True), best, torch.zeros_like(best))
    else:
        bags = rows.sum(1) if padding_idx is None else (rows * counts.unsqueeze(-1).to(rows.dtype)).sum(1)
        if mode == _MEAN:
            number = counts.to(rows.dtype).sum(1, keepdim=True)
            bags = bags / number.clamp(min=1.0)
    return bags, offsets, offsets, offsets


def _equal(node: Node) -> Stand | None:
    """The rule: offsets that count in equal steps, as :class:`torch.nn.EmbeddingBag` makes them of a 2-D input."""
    offsets = argument(node, "offsets")
    if not isinstance(offsets, Node) or offsets.target is not aten.arange.start_step:
        return None
    start, length = offsets.args[0], argument(offsets, "step")
    return partial(equal_bags, length=length) if start == 0 and isinstance(length, int) else None


RULES: Mapping[Any, Rule] = {
    aten.embedding_bag.padding_idx: _equal,
    aten.embedding_bag.default: _equal,
    aten._embedding_bag.default: _equal,
    aten._embedding_bag_forward_only.default: _equal,
}
