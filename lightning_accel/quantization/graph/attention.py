"""Decompose fused attention into the matrix products and the softmax that engines compute in integers."""

from typing import Any

import torch
from torch.fx import GraphModule, Node

aten = torch.ops.aten
FUSED_ATTENTION = aten.scaled_dot_product_attention.default


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
        made.meta = {"nn_module_stack": node.meta.get("nn_module_stack"), "val": target(*values)}
        if name:
            made.meta["operator_name"] = name
        return made

    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1), name="attention_scores")
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
    if dropout:
        shares = call(aten.dropout.default, shares, dropout, True)
    return call(aten.matmul.default, shares, value, name="attention_values")
