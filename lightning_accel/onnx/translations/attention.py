"""Scaled dot-product attention: without a dimension of heads, which torch's exporter requires, and of queries that may look nowhere."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, argument
from lightning_accel.quantization.graph.attention import depends_on_inputs

aten = torch.ops.aten


def of_one_head(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> torch.Tensor:
    """Attention of ``(N, L, E)`` as that of one head ``(N, 1, L, E)``; a mask of three dimensions gets one, too."""
    mask = attn_mask.unsqueeze(1) if attn_mask is not None and attn_mask.ndim == 3 else attn_mask
    q, k, v = query.unsqueeze(1), key.unsqueeze(1), value.unsqueeze(1)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout_p, is_causal, **settings).squeeze(1)


def of_hidden_queries(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **settings: Any,
) -> torch.Tensor:
    """Attention whose result is 0 for a query that a floating-point mask hides everything from, where a softmax alone has NaN."""
    attend = of_one_head if query.ndim == 3 else F.scaled_dot_product_attention
    nothing = (attn_mask == -torch.inf).all(-1, keepdim=True)
    result = attend(query, key, value, attn_mask.masked_fill(nothing, 0.0), dropout_p, is_causal, **settings)
    return result.masked_fill(nothing, 0.0)


def _attention(node: Node) -> Stand | None:
    mask = argument(node, "attn_mask")
    if mask is not None and mask.meta["val"].is_floating_point() and depends_on_inputs(mask):
        return of_hidden_queries
    return of_one_head if argument(node, "query").meta["val"].ndim == 3 else None


RULES: Mapping[Any, Rule] = {aten.scaled_dot_product_attention.default: _attention}
