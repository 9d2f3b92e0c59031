"""Plan which tensors of a captured graph are quantized, and why others stay float.

Operators that the target computes in integers get integer operands. Tensors are quantized where engines expect it: before data
movement (max pooling, padding, concatenation), once for all readers, with one scale for all concatenated tensors, and not
between a convolution and a sum that engines fuse into it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_accel.core.globs import select
from lightning_accel.quantization.arithmetic.targets import (
    CONVOLUTION,
    EMBEDDING,
    LINEAR,
    MATMUL,
    POOLING,
    SUM,
    TRANSPOSED,
    Target,
)
from lightning_accel.quantization.graph.attention import FUSED_ATTENTION
from lightning_accel.quantization.graph.operators import (
    CONVOLUTIONS,
    activation_of,
    memory_of,
    reads_of,
    result_of,
    roots_of,
    writes,
)
from lightning_accel.quantization.graph.sites import Calls

aten = torch.ops.aten

# Operators with a weight: kind, position of the weight, axis of its output channels (`None`: one scale for all of it).
WEIGHTED: dict[Any, tuple[str, int, int | None]] = {
    **dict.fromkeys(CONVOLUTIONS, (CONVOLUTION, 1, 0)),
    aten.conv_transpose1d.default: (TRANSPOSED, 1, 1),
    aten.conv_transpose2d.input: (TRANSPOSED, 1, 1),
    aten.conv_transpose3d.input: (TRANSPOSED, 1, 1),
    aten.linear.default: (LINEAR, 1, 0),
    aten.embedding.default: (EMBEDDING, 0, None),
}
# Operators of two activations.
PAIRED: dict[Any, str] = {
    aten.add.Tensor: SUM,
    aten.add_.Tensor: SUM,
    aten.matmul.default: MATMUL,
    aten.bmm.default: MATMUL,
}
# Operators of one.
POOLED = {aten.avg_pool2d.default, aten.adaptive_avg_pool2d.default}
# Operators that no target computes in integers; reported as kept in float.
_FLOAT_ONLY = {
    aten.lstm.input: "LSTM",
    aten.gru.input: "GRU",
    aten.rnn_tanh.input: "RNN",
    aten.rnn_relu.input: "RNN",
    aten.einsum.default: "einsum",
    aten.addmm.default: "addmm",
    aten.mm.default: "mm",
    aten.baddbmm.default: "baddbmm",
    aten.bilinear.default: "bilinear",
}


KNOWN = {*WEIGHTED, *PAIRED, *POOLED, *_FLOAT_ONLY, FUSED_ATTENTION}


@dataclass(frozen=True)
class QuantizationPoint:
    """One quantized operand or result of an operator.

    Args:
        key: its name, the same in the train and the eval graph: ``"body.0.conv1:input"``.
        node: the operator.
        index: position of the operand; ``None``: the operator's result.
        operand: the tensor.
        weight: whether it is a parameter.
        axis: output channels of a weight; ``None``: one scale for all of it.
        version: how often the operand was overwritten in place before.
        roots: where it is quantized: the tensors whose data it holds.
        moved: edges from the roots to the operator, ``(source, reader)``.
        shared: whether engines produce the tensor in integers, which all of its readers then use.
    """

    key: str
    node: Node
    index: int | None
    operand: Node
    weight: bool = False
    axis: int | None = None
    version: int = 0
    roots: tuple[Node, ...] = ()
    moved: tuple[tuple[Node, Node], ...] = ()
    shared: bool = False

    @property
    def operator(self) -> str:
        """Name of the operator."""
        return self.key.rpartition(":")[0]


@dataclass
class QuantizationPlan:
    """Quantization of a graph's operators.

    Args:
        points: operands and results to quantize, in the graph's order.
        kept_float: name of an operator -> why it stays float.
        counts: how often each kind of operator runs in each module.
        operators: name of an operator -> its node.
        dynamic: whether the inputs of linear layers are quantized dynamically.
        calls: of each function in each submodule in one run, in training (True) and in evaluation (False).
    """

    points: list[QuantizationPoint] = field(default_factory=list)
    kept_float: dict[str, str] = field(default_factory=dict)
    counts: Counter[tuple[str, str]] = field(default_factory=Counter)
    operators: dict[str, Node] = field(default_factory=dict)
    dynamic: bool = False
    calls: dict[bool, Calls] = field(default_factory=dict)

    def tensors(self) -> dict[str, str]:
        """Shared ranges of activations: key of each activation -> key of the first reader."""
        owner: dict[tuple[Node, int], str] = {}
        rows: dict[str, str] = {}

        def top(key: str) -> str:
            while rows[key] != key:
                key = rows[key]
            return key

        activations = [p for p in self.points if not p.weight]
        for point in activations:
            rows[point.key] = point.key
            for root in point.roots:  # concatenated tensors, and all their readers, share one scale
                rows[top(point.key)] = first = top(owner.setdefault((root, point.version), point.key))
                rows[point.key] = first
        return {p.key: top(p.key) for p in activations}


def module_of(node: Node) -> str:
    """Dotted path of the module in whose ``forward`` the operator runs; empty for the captured module itself."""
    stack = node.meta.get("nn_module_stack") or {}
    return next(reversed(stack.values()))[0] if stack else ""


def plan_points(
    graph_module: GraphModule,
    target: Target,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> QuantizationPlan:
    """Find the operands and results to quantize.

    Args:
        graph_module: from :func:`~lightning_accel.quantization.graph.capture.capture`.
        target: determines the operators in integers, and fusions.
        include: globs over operator names (module path, e.g. ``"body.*"``); empty means all.
        exclude: globs; wins over ``include``.

    Raises:
        InvalidArgumentError: a glob matches no quantizable operator.
    """
    parameters = dict(graph_module.named_parameters(remove_duplicate=False))
    plan, named, written = QuantizationPlan(), [], Counter[Node]()
    versions: dict[Node, list[int]] = {}
    for node in graph_module.graph.nodes:
        if node.op != "call_function":
            continue
        versions[node] = [written[memory_of(arg)] if isinstance(arg, Node) else 0 for arg in node.args[:2]]
        if writes(node):
            written[memory_of(node.args[0])] += 1
        if node.target not in KNOWN:
            continue
        kind = node.meta.get("operator_name") or str(node.target).removeprefix("aten.").split(".")[0].rstrip("_")
        path = module_of(node)
        plan.counts[path, kind] += 1
        leaf = node.target in WEIGHTED and plan.counts[path, kind] == 1
        name = path if leaf and path else ".".join(filter(None, (path, f"{kind}{plan.counts[path, kind]}")))
        while name in plan.operators:  # a module may already have this name
            name += "_"
        plan.operators[name] = node
        if reason := _why_not(node, parameters, target):
            if reason != "nothing":
                plan.kept_float[name] = reason
            continue
        named.append((name, node))
    chosen = set(select([name for name, _ in named], include, exclude, "quantizable operator")) if named else set()
    for name, node in named:
        if name not in chosen:
            plan.kept_float[name] = "excluded"
            continue
        plan.points += _points(name, node, versions[node], target, written)
    return plan


def _points(
    name: str, node: Node, versions: list[int], target: Target, written: Counter[Node]
) -> list[QuantizationPoint]:
    """The points of one operator."""
    points = []
    if node.target in WEIGHTED:
        _, position, axis = WEIGHTED[node.target]
        roles: list[tuple[int, str]] = [(1 - position, "input"), (position, "weight")]
    else:
        roles = [(0, "0"), (1, "1")] if node.target in PAIRED else [(0, "input")]
        position, axis = -1, None
    whole = target.both_summands or PAIRED.get(node.target) != SUM
    fused = None if whole else fused_summand(node)
    spatial = node.target in CONVOLUTIONS or node.target in POOLED or PAIRED.get(node.target) == SUM
    for index, role in roles:
        operand: Any = node.args[index]
        if index == position:
            points.append(QuantizationPoint(f"{name}:{role}", node, index, operand, weight=True, axis=axis))
            continue
        if index == fused or not _is_float32(operand):
            continue
        roots, moved = roots_of(operand, node, spatial, written)
        shared = all(_in_integers(root) and not written[memory_of(root)] for root in roots)
        key, version = f"{name}:{role}", versions[index]
        points.append(
            QuantizationPoint(key, node, index, operand, version=version, roots=roots, moved=moved, shared=shared)
        )
    if target.outputs and (node.target in CONVOLUTIONS or PAIRED.get(node.target) == SUM):
        result = result_of(node)
        if not written[memory_of(result)]:  # tensors that are overwritten are quantized at their readers
            points.append(QuantizationPoint(f"{name}:output", node, None, result, roots=(result,), shared=True))
    return points


def fused_summand(node: Node) -> int | None:
    """Position of the operand of a residual sum that is a convolution's result; the later one if both are.

    Engines add in the accumulator of that convolution; rounding its result first would only add cost and error.
    """
    order = {n: i for i, n in enumerate(node.graph.nodes)}
    fresh = [(order[arg], i) for i, arg in enumerate(node.args[:2]) if isinstance(arg, Node) and _convolved(arg, node)]
    return max(fresh)[1] if fresh else None


def _convolved(value: Node, reader: Node) -> bool:
    """Whether a tensor is a convolution's result (with batch norm) that nothing else reads."""
    if set(value.users) != {reader}:
        return False
    if value.target is aten.batch_norm.default and isinstance(value.args[0], Node) and len(value.args[0].users) == 1:
        value = value.args[0]
    return value.target in WEIGHTED and WEIGHTED[value.target][0] in (CONVOLUTION, TRANSPOSED)


def _in_integers(value: Node) -> bool:
    """Whether engines produce a tensor by a convolution or residual sum, with batch norm and activation fused."""
    source = activation_of(value) or value
    if source.target is aten.batch_norm.default and isinstance(source.args[0], Node):
        source = source.args[0]
    return source.target in WEIGHTED or (PAIRED.get(source.target) == SUM and _residual(source))


def _residual(node: Node) -> bool:
    """Whether a sum adds two feature maps, at least one of them from a convolution."""
    return any(
        isinstance(arg, Node) and _kind_of(arg.args[0] if arg.target is aten.batch_norm.default else arg) == CONVOLUTION
        for value in node.args[:2]
        for arg in [activation_of(value) or value if isinstance(value, Node) else value]
    )


def _kind_of(node: Any) -> str:
    kind = WEIGHTED.get(node.target, ("", 0, None))[0] if isinstance(node, Node) else ""
    return CONVOLUTION if kind == TRANSPOSED else kind


def _reads_input(node: Node) -> bool:
    """Whether a value depends on the network's inputs."""
    seen, open_nodes = {node}, [node]
    while open_nodes:
        found = open_nodes.pop()
        if found.op == "placeholder":
            return True
        new = [n for n in found.all_input_nodes if n not in seen]
        seen.update(new)
        open_nodes += new
    return False


def _is_float32(value: Any) -> bool:
    value = value.meta.get("val") if isinstance(value, Node) else None
    return isinstance(value, torch.Tensor) and value.dtype is torch.float32


def _why_not(node: Node, parameters: dict[str, torch.nn.Parameter], target: Target) -> str:
    """Reason why an operator isn't quantized; empty if it is, ``"nothing"`` if no report is needed."""
    if node.target is FUSED_ATTENTION:
        return (
            f"attention stays fused, in float: it isn't among the operators of {target.name}, or can't be taken apart"
        )
    if node.target in _FLOAT_ONLY:
        return f"{_FLOAT_ONLY[node.target]} has no integer kernel in {target.name}"
    operands: list[Any] = list(node.args[:2])
    shapes: list[Any] = [arg.meta["val"].shape if _is_float32(arg) else None for arg in operands]
    if node.target in WEIGHTED:
        kind, position, _ = WEIGHTED[node.target]
        weight = operands[position]
        if kind not in target.operators:
            return f"{target.name} has no integer kernel for a {kind}"
        if weight.op != "get_attr" or weight.target not in parameters:
            return "its weight isn't a parameter, but computed"
        if (stored := parameters[weight.target].dtype) is not torch.float32:
            return f"its weight is {str(stored).removeprefix('torch.')}, not float32"
        if kind == TRANSPOSED and len(node.args) > 6 and node.args[6] != 1:
            return "a transposed convolution with groups has no scale for each output channel"
        if kind == EMBEDDING and not _reads_input(operands[1 - position]):
            return "it looks up the same rows in each call, which the file holds as a constant"
        if kind != EMBEDDING and shapes[1 - position] is None:
            return "its input isn't float32"
        if target.outputs and node.target in CONVOLUTIONS and reads_of(result_of(node), "output"):
            return f"{target.name} would need its result in integers too, and that is the network's output"
        return ""
    if node.target in POOLED:
        return "" if POOLING in target.operators and shapes[0] is not None else "nothing"
    kind = PAIRED[node.target]
    if kind not in target.operators:
        return f"{target.name} has no integer kernel for a {kind}"
    if None in shapes or any(a.op == "get_attr" for a in operands):
        return "nothing" if kind == SUM else "one operand is a parameter"
    if kind == SUM:
        if shapes[0] != shapes[1] or len(shapes[0]) < 2 or node.kwargs.get("alpha", 1) != 1:
            return "nothing"  # a broadcast bias or position, or a sum of scalars
        if not _residual(node):
            return "no convolution before it, into which engines would fuse it"
        if target.outputs and reads_of(result_of(node), "output"):
            return f"{target.name} would need its result in integers too, and that is the network's output"
    return ""
