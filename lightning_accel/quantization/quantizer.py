"""Quantizer: which tensors of a captured graph are quantized, and what stays float and why.

The inputs of convolutions, linear layers, matrix products and residual additions are quantized, since that is what the
engines fuse. Each tensor is quantized once, however many operators read it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_accel.globs import select

aten = torch.ops.aten

# Operators with a weight: the axis of the weight's output channels.
WEIGHTED: dict[Any, int] = {
    aten.conv1d.default: 0,
    aten.conv1d.padding: 0,
    aten.conv2d.default: 0,
    aten.conv2d.padding: 0,
    aten.conv3d.default: 0,
    aten.conv3d.padding: 0,
    aten.linear.default: 0,
}
# Operators of two activations.
PAIRED = {aten.add.Tensor, aten.add_.Tensor, aten.matmul.default, aten.bmm.default}
# Operators one would expect to be quantized, but which are not yet.
_NOT_YET = {
    aten.conv_transpose1d.default: "transposed convolution",
    aten.conv_transpose2d.input: "transposed convolution",
    aten.conv_transpose3d.input: "transposed convolution",
    aten.scaled_dot_product_attention.default: "fused attention",
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.embedding.default: "embedding",
}


@dataclass(frozen=True)
class Point:
    """One quantized operand of an operator.

    Args:
        key: name of the operand, the same in the train and the eval graph: ``"body.0.conv1:input"``.
        node: the operator.
        index: position of the operand.
        operand: the tensor.
        axis: output channels if it is a weight, else ``None``.
    """

    key: str
    node: Node
    index: int
    operand: Node
    axis: int | None


@dataclass
class Plan:
    """What a graph's operators get.

    Args:
        points: operands to quantize, in the graph's order.
        kept_float: name of an operator -> why it stays float.
    """

    points: list[Point] = field(default_factory=list)
    kept_float: dict[str, str] = field(default_factory=dict)

    def tensors(self) -> dict[str, str]:
        """Key of each operand that is an activation -> key under which its tensor is quantized (its first reader's)."""
        first: dict[Node, str] = {}
        return {p.key: first.setdefault(p.operand, p.key) for p in self.points if p.axis is None}


def module_of(node: Node) -> str:
    """Dotted path of the module in whose ``forward`` the operator runs; empty for the captured module itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def plan_points(graph_module: GraphModule, include: Sequence[str] = (), exclude: Sequence[str] = ()) -> Plan:
    """Find the operands to quantize.

    Args:
        graph_module: from :func:`~lightning_accel.quantization.capture.capture`.
        include: globs over operator names (module path, e.g. ``"body.*"``); empty means all.
        exclude: globs; wins over ``include``.

    Raises:
        ValueError: a glob matches no quantizable operator.
    """
    parameters = dict(graph_module.named_parameters())
    plan, named, counts = Plan(), [], Counter[tuple[str, str]]()
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        kind = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
        if node.target not in WEIGHTED and node.target not in PAIRED and node.target not in _NOT_YET:
            continue
        path = module_of(node)
        counts[path, kind] += 1
        leaf = node.target in WEIGHTED and counts[path, kind] == 1
        name = path if leaf and path else ".".join(filter(None, (path, f"{kind}{counts[path, kind]}")))
        if reason := _why_not(node, parameters):
            if reason != "constant":
                plan.kept_float[name] = reason
            continue
        named.append((name, node))
    chosen = set(select([name for name, _ in named], include, exclude, "quantizable operator")) if named else set()
    for name, node in named:
        if name not in chosen:
            plan.kept_float[name] = "excluded"
            continue
        if node.target in WEIGHTED:
            operands: list[tuple[str, int | None]] = [("input", None), ("weight", WEIGHTED[node.target])]
        else:
            operands = [("0", None), ("1", None)]
        for index, (role, axis) in enumerate(operands):
            plan.points.append(Point(f"{name}:{role}", node, index, node.args[index], axis))
    return plan


def _why_not(node: Node, parameters: dict[str, torch.nn.Parameter]) -> str:
    """Why an operator can't be quantized; empty if it can, ``"constant"`` if nobody would expect it to be."""
    if node.target in _NOT_YET:
        return f"{_NOT_YET[node.target]} isn't quantized yet"
    operands: list[Any] = list(node.args[:2])
    values = [arg.meta.get("val") if isinstance(arg, Node) else None for arg in operands]
    shapes: list[Any] = [v.shape if isinstance(v, torch.Tensor) and v.is_floating_point() else None for v in values]
    if node.target in WEIGHTED:
        weight = operands[1]
        if weight.op != "get_attr" or weight.target not in parameters:
            return "its weight isn't a parameter, but computed"
        return "" if shapes[0] is not None else "its input isn't floating point"
    if None in shapes or any(a.op == "get_attr" for a in operands):
        return "constant" if "add" in str(node.target) else "one operand is a parameter"
    if "add" in str(node.target) and (shapes[0] != shapes[1] or len(shapes[0]) < 2 or node.kwargs.get("alpha", 1) != 1):
        return "constant"  # a broadcast bias or position, or a sum of scalars
    return ""
