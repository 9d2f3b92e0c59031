"""Forms of integer operators in a network, for which engines are probed."""

from torch.fx import Node

from lightning_accel.quantization.arithmetic.targets import MATMUL, POOLING
from lightning_accel.quantization.graph.operators import CONVOLUTIONS, JOINS
from lightning_accel.quantization.graph.plan import PAIRED, POOLED, WEIGHTED, QuantizationPlan, QuantizationPoint, aten

SCALED_LINEAR = "linear with scaled inputs"  # of smoothed networks
_SOFTMAX = {aten.softmax.int, aten._softmax.default}


def forms_of(plan: QuantizationPlan, activations: str = "static") -> frozenset[str]:
    """Forms of integer operators in the file of a plan.

    Args:
        plan: of the eval graph.
        activations: ``"static"``, ``"dynamic"``, or ``"float"``, which uses no integer kernels.
    """
    if activations != "static":
        return frozenset({"dynamic linear"} if activations == "dynamic" and plan.points else ())
    readers = {point.node for point in plan.points} | {reader for point in plan.points for _, reader in point.moved}
    quantized = {root for point in plan.points for root in point.roots}
    forms = set()
    for point in plan.points:
        forms.add(_form(point))
        if len(point.roots) > 1:
            forms.add("concatenation")
        if any(root.target in _SOFTMAX for root in point.roots):
            forms.add("attention")
        joins = {reader for _, reader in point.moved if reader.target in JOINS}
        if any(set(join.users) - readers for join in joins):
            forms.add("concatenation also read in float")
        if PAIRED.get(point.node.target) == MATMUL and _also_in_float(point.node, quantized, readers):
            forms.add("matmul also read in float")
    return frozenset(forms)


def _form(point: QuantizationPoint) -> str:
    node = point.node
    if node.target in CONVOLUTIONS:
        groups = node.args[6] if len(node.args) > 6 else 1
        weight = node.args[1]
        assert isinstance(weight, Node)
        depthwise = groups != 1 and weight.meta["val"].shape[1] == 1
        return "depthwise convolution" if depthwise else "convolution" if groups == 1 else "grouped convolution"
    if node.target in WEIGHTED:
        return WEIGHTED[node.target][0]
    return POOLING if node.target in POOLED else PAIRED[node.target]


def _also_in_float(result: Node, quantized: set[Node], readers: set[Node]) -> bool:
    """Whether a result is quantized for one reader, and read in float by another."""
    return result in quantized and bool(set(result.users) - readers)
