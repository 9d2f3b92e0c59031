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
    aten.einsum.default: "einsum",
    aten.addmm.default: "addmm",
    aten.mm.default: "mm",
    aten.baddbmm.default: "baddbmm",
    aten.bilinear.default: "bilinear",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
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
        version: how often the operand was overwritten in place before.
    """

    key: str
    node: Node
    index: int
    operand: Node
    axis: int | None
    version: int = 0


@dataclass
class Plan:
    """What a graph's operators get.

    Args:
        points: operands to quantize, in the graph's order.
        kept_float: name of an operator -> why it stays float.
        counts: how often each kind of operator runs in each module.
        groups: name of an operator -> its key in ``counts``.
    """

    points: list[Point] = field(default_factory=list)
    kept_float: dict[str, str] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    groups: dict[str, tuple[str, str]] = field(default_factory=dict)

    def tensors(self) -> dict[str, str]:
        """Key of each operand that is an activation -> key under which its tensor is quantized (its first reader's)."""
        first: dict[tuple[Node, int], str] = {}
        return {p.key: first.setdefault((p.operand, p.version), p.key) for p in self.points if p.axis is None}


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
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    plan, named, written = Plan(), [], Counter[Node]()
    versions: dict[Node, list[int]] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        versions[node] = [written[_memory(arg)] if isinstance(arg, Node) else 0 for arg in node.args[:2]]
        if _writes(node):
            written[_memory(node.args[0])] += 1
        kind = str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
        if node.target not in WEIGHTED and node.target not in PAIRED and node.target not in _NOT_YET:
            continue
        path = module_of(node)
        plan.counts[path, kind] += 1
        leaf = node.target in WEIGHTED and plan.counts[path, kind] == 1
        name = path if leaf and path else ".".join(filter(None, (path, f"{kind}{plan.counts[path, kind]}")))
        while name in plan.groups:  # a module may have the name that we give an operator
            name += "_"
        plan.groups[name] = (path, kind)
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
            version = versions[node][index]
            plan.points.append(Point(f"{name}:{role}", node, index, node.args[index], axis, version))
    return plan


def _writes(node: Node) -> bool:
    """Whether an operator overwrites its first argument."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and bool(node.args) and isinstance(node.args[0], Node) and schema.is_mutable


def _memory(node: Any) -> Node:
    """The node whose memory a chain of views shows."""
    while is_view(node) and node.args and isinstance(node.args[0], Node):
        node = node.args[0]
    return node


def is_view(node: Node) -> bool:
    """Whether the operator's result shares memory with its argument."""
    schema = getattr(node.target, "_schema", None) if node.op == "call_function" else None
    returns = schema.returns if schema is not None else ()
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


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
