"""Properties of graph operators: whether they move, rectify or overwrite their data."""

from collections import Counter
from typing import Any, cast

import torch
from torch.fx import Node

aten = torch.ops.aten

CONVOLUTIONS = {
    aten.conv1d.default,
    aten.conv1d.padding,
    aten.conv2d.default,
    aten.conv2d.padding,
    aten.conv3d.default,
    aten.conv3d.padding,
}
# Operators whose result has all elements of the operand once, in their order.
_RESHAPES = {
    aten.flatten.using_ints,
    aten.view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
    aten.clone.default,
    aten.contiguous.default,
}
# Operators that only move or select data: the result is on the operand's grid.
_MOVES = {
    *_RESHAPES,
    aten.max_pool1d.default,
    aten.max_pool2d.default,
    aten.max_pool3d.default,
    aten.upsample_nearest1d.vec,
    aten.upsample_nearest2d.vec,
    aten.upsample_nearest3d.vec,
    aten.upsample_nearest1d.default,
    aten.upsample_nearest2d.default,
    aten.upsample_nearest3d.default,
    aten.pixel_shuffle.default,
}
# Operators that split a tensor: convolutions share its range, matrix products have a range for each part.
_SPLITS = {
    aten.split.Tensor,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.slice.Tensor,
    aten.select.int,
    aten.transpose.int,
    aten.permute.default,
}
JOINS = {aten.cat.default, aten.concat.default}


def reshapes(node: Node) -> bool:
    """Whether an operator's result is its operand in another shape."""
    return node.target in _RESHAPES or (node.target is aten.dropout.default and node.args[2] is False)


def writes(node: Node) -> bool:
    """Whether an operator overwrites its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(node.args) and isinstance(node.args[0], Node) and schema.is_mutable


def is_view(node: Node) -> bool:
    """Whether the operator's result shares memory with its argument."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    returns = schema.returns if schema is not None else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def memory_of(node: Any) -> Node:
    """The node that owns the memory of a chain of views."""
    while is_view(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    result: Node = node
    return result


def clip_of(node: Node) -> tuple[float, float] | None:
    """Limits of a clipping activation, e.g. ``(0, inf)`` for ReLU; ``None`` for other nodes."""
    if node.op != "call_function" or node.kwargs:
        return None
    if node.target in (aten.relu.default, aten.relu_.default):
        return 0.0, torch.inf
    if node.target is aten.relu6.default:
        return 0.0, 6.0
    bounds: list[Any] = [*node.args, None, None]
    low, high = bounds[1:3]
    if node.target is aten.hardtanh.default:
        low, high = -1.0 if low is None else low, 1.0 if high is None else high
    elif node.target not in (aten.clamp.default, aten.clamp_min.default):
        return None
    clip = (-torch.inf if low is None else low, torch.inf if high is None else high)
    return clip if all(isinstance(v, int | float) for v in clip) and clip[0] == 0 and clip[1] > 0 else None


def activation_of(node: Any) -> Node | None:
    """Input of a clipping activation; ``None`` for other nodes."""
    return cast(Node, node.args[0]) if isinstance(node, Node) and clip_of(node) is not None else None


def result_of(node: Node) -> Node:
    """The result of a convolution or sum with the batch norm and rectifier that engines fuse into it."""
    for fused in (lambda n: n.target is aten.batch_norm.default, lambda n: clip_of(n) is not None):
        users = list(node.users)
        if len(users) == 1 and fused(users[0]) and users[0].args[0] is node:  # type: ignore[no-untyped-call]  # torch has no annotation for it
            node = users[0]
    return node


def reads_of(node: Node, op: str) -> bool:
    """Whether a node of the kind ``op`` reads a tensor, moved or not."""
    return any(user.op == op or (_moved(user, True) and reads_of(user, op)) for user in node.users)


def _moved(node: Node, spatial: bool) -> list[Node]:
    """Operands of a node that only moves data; empty if it computes."""
    if node.op != "call_function" or not node.args:
        return []
    if node.target in JOINS:
        parts: list[Any] = list(node.args[0])  # type: ignore[arg-type]
        return parts if all(isinstance(p, Node) and p.op != "get_attr" for p in parts) else []
    first = node.args[0]
    if not isinstance(first, Node):
        return []
    if node.target is aten.dropout.default and node.args[2] is False:
        return [first]
    if node.target is aten.constant_pad_nd.default and ([*node.args, 0])[2] in (0, 0.0):
        return [first]
    if spatial and (node.target in _SPLITS or getattr(node.target, "__name__", "") == "getitem"):
        return [first]
    return [first] if node.target in _MOVES else []


def roots_of(
    operand: Node, reader: Node, spatial: bool, written: Counter[Node]
) -> tuple[tuple[Node, ...], tuple[tuple[Node, Node], ...]]:
    """The tensors that an operand's data come from, and the edges along which they were moved.

    Args:
        operand: operand of an operator.
        reader: the operator.
        spatial: whether to follow operators that split a tensor.
        written: how often each tensor's memory is overwritten; such tensors are not followed.
    """
    parts = [] if written[memory_of(operand)] else _moved(operand, spatial)
    parts = [p for p in parts if isinstance(p.meta.get("val"), torch.Tensor | list | tuple)]
    if not parts or any(written[memory_of(part)] for part in parts):
        return (operand,), ((operand, reader),)
    roots: dict[Node, None] = {}
    edges: dict[tuple[Node, Node], None] = {}
    for part in parts:
        found, moved = roots_of(part, operand, spatial, written)
        roots |= dict.fromkeys(found)
        edges |= dict.fromkeys(moved)
    return tuple(roots), tuple(edges)
