"""Decompose fused attention into the matrix products and the softmax that engines compute in integers."""

from collections.abc import Callable
from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
FUSED_ATTENTION = aten.scaled_dot_product_attention.default
SCORES, VALUES = "attention_scores", "attention_values"
PARTS = (SCORES, VALUES)  # names of the matrix products
STORED = "stored"  # in the metadata of placeholders: whether it is a parameter, a buffer or a constant of a program
Quantizer = Callable[[str, int, torch.Tensor], torch.Tensor]  # of an operand of a matrix product, by name and position


def depends_on_inputs(node: Node) -> bool:
    """Whether a tensor depends on what the network is called with, and not on its parameters, buffers and constants alone."""
    seen, waiting = {node}, [node]
    while waiting:
        one = waiting.pop()
        if one.op == "placeholder" and not one.meta.get(STORED):
            return True
        # Sizes aren't tensors: a mask of a sequence's length is no input's value.
        tensors = (n for n in one.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor))
        new = [before for before in tensors if before not in seen]
        seen.update(new)
        waiting += new
    return False


def take_apart_attention(graph_module: GraphModule) -> None:
    """Replace ``scaled_dot_product_attention`` by its definition (https://arxiv.org/abs/1706.03762, equation 1), in place.

    Causal attention, and attention whose heads share keys, is not changed.
    """
    for node in list(graph_module.graph.nodes):
        if node.target is not FUSED_ATTENTION:
            continue
        query, key, value, mask, dropout, causal = [*node.args, *[None, 0.0, False][len(node.args) - 3 :]][:6]
        if causal or node.kwargs.get("is_causal") or node.kwargs.get("enable_gqa") or query.meta["val"].ndim < 3:
            continue
        mask = node.kwargs.get("attn_mask", mask)
        dropout = node.kwargs.get("dropout_p", dropout)
        scale = node.kwargs.get("scale")
        with graph_module.graph.inserting_before(node):
            result = _attention(node, query, key, value, mask, dropout or 0.0, scale)
        node.replace_all_uses_with(result)
        graph_module.graph.erase_node(node)
    graph_module.graph.lint()
    graph_module.recompile()


def _attention(
    node: Node, query: Node, key: Node, value: Node, mask: Node | None, dropout: float, scale: float | None
) -> Node:
    def call(target: Any, *args: Any, name: str = "") -> Node:
        made = node.graph.call_function(target, args)
        values = [arg.meta["val"] if isinstance(arg, Node) else arg for arg in args]
        made.meta = {key: node.meta[key] for key in ("nn_module_stack", "custom") if key in node.meta}
        made.meta["val"] = target(*values)
        if name:
            made.meta["operator_name"] = name
        return made

    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1), name=SCORES)
    scores = call(aten.mul.Tensor, scores, query.meta["val"].shape[-1] ** -0.5 if scale is None else scale)
    boolean = mask is not None and mask.meta["val"].dtype is torch.bool
    if mask is not None:
        hidden = call(aten.logical_not.default, mask) if boolean else mask
        scores = (
            call(aten.masked_fill.Scalar, scores, hidden, -torch.inf)
            if boolean
            else call(aten.add.Tensor, scores, mask)
        )
    shares = call(aten.softmax.int, scores, -1)
    if boolean:  # the fused kernel returns zeros for a fully masked query
        nothing = call(aten.logical_not.default, call(aten.any.dim, mask, -1, True))
        shares = call(aten.masked_fill.Scalar, shares, nothing, 0.0)
    elif mask is not None and depends_on_inputs(mask):
        # Not the largest value: OpenVINO's maximum of infinities is a finite one.
        nothing = call(aten.all.dim, call(aten.eq.Scalar, mask, -torch.inf), -1, True)
        shares = call(aten.masked_fill.Scalar, shares, nothing, 0.0)
    if dropout:
        shares = call(aten.dropout.default, shares, dropout, True)
    return call(aten.matmul.default, shares, value, name=VALUES)


def attention(
    quantized: Quantizer,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor:
    """``scaled_dot_product_attention``, computed as :func:`take_apart_attention` writes it.

    Args:
        quantized: quantizes an operand of one of the matrix products.
        query: ``(..., L, E)``.
        key: ``(..., S, E)``.
        value: ``(..., S, V)``.
        attn_mask: ``(..., L, S)``: where to look, or what to add to the scores.
        dropout_p: share of the weights that is dropped.
        is_causal: whether each position looks at none after it. A network may say so by a mask when it is captured.
        scale: of the scores; ``None``: ``1 / sqrt(E)``.
        enable_gqa: whether several heads share a key and a value.

    Returns:
        ``(..., L, V)``.
    """
    if enable_gqa:
        key, value = (t.repeat_interleave(query.shape[-3] // t.shape[-3], -3) for t in (key, value))
    if is_causal:
        attn_mask = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device).tril()
    scores = torch.matmul(quantized(SCORES, 0, query), quantized(SCORES, 1, key.transpose(-2, -1)))
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    nothing: torch.Tensor | None = None  # queries that see no key: the fused kernel returns zeros for them
    if attn_mask is not None and attn_mask.dtype is torch.bool:
        nothing = attn_mask.any(-1, True).logical_not()
        scores = scores.masked_fill(attn_mask.logical_not(), -torch.inf)
    elif attn_mask is not None:
        nothing = (attn_mask == -torch.inf).all(-1, True)
        scores = (scores + attn_mask).masked_fill(nothing, 0.0)  # or their gradients would be NaN
    shares = torch.softmax(scores, -1)
    if nothing is not None:
        shares = shares.masked_fill(nothing, 0.0)
    if dropout_p:
        shares = torch.dropout(shares, dropout_p, True)
    return torch.matmul(quantized(VALUES, 0, shares), quantized(VALUES, 1, value))
