"""Tensors whose channels may be scaled before quantization, and scales that the operator before can take up."""

from collections.abc import Mapping
from typing import Any

import torch
from torch.fx import GraphModule, Node

from lightning_accel.quantization.graph.modules import free_name
from lightning_accel.quantization.graph.plan import QuantizationPlan, aten

# After these a multiplication by channel runs in float in each engine. Products of activations, means and pooling aren't among
# them: OpenVINO fuses the multiplication into their kernels, and some of them take the channels from another dimension.
_ELEMENTWISE = {
    aten.layer_norm.default,
    aten.rms_norm.default,
    aten.linear.default,
    aten.gelu.default,
    aten.silu.default,
    aten.relu.default,
    aten.leaky_relu.default,
    aten.elu.default,
    aten.hardswish.default,
    aten.hardtanh.default,
    aten.sigmoid.default,
    aten.tanh.default,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.dropout.default,
}


def smoothable_rows(plan: QuantizationPlan, rows: Mapping[str, int]) -> frozenset[int]:
    """Rows whose tensors may be multiplied by a factor for each channel before they are quantized.

    Each is the result of one elementwise operator, a normalization or a linear layer, and its readers read it as it is.

    Args:
        plan: of the eval graph.
        rows: row in the bank of each activation.
    """
    allowed: dict[int, bool] = {}
    for point in plan.points:
        if not point.weight:
            root = point.roots[0]
            fits = root.target in _ELEMENTWISE and point.moved == ((root, point.node),)
            row = rows[point.key]
            allowed[row] = allowed.get(row, True) and fits
    return frozenset(row for row, fits in allowed.items() if fits)


def scale_channels(graph_module: GraphModule, fake: Node, factor: torch.Tensor) -> None:
    """Multiply the channels of a tensor by powers of two before its fake-quantization.

    A layer norm that nothing else reads takes them into its weight and bias, which is the same bit for bit.

    Args:
        graph_module: the graph.
        fake: node of the fake-quantization.
        factor: ``(C,)``, for the last dimension.
    """
    source = fake.args[0]
    assert isinstance(source, Node)
    if source.target is aten.layer_norm.default and list(source.users) == [fake] and _take_up(source, factor):
        return
    product = _insert(graph_module, fake, (source, _constant(graph_module, fake, factor)))
    fake.replace_input_with(source, product)


def _take_up(norm: Node, factor: torch.Tensor) -> bool:
    """Scale the weight and the bias of a layer norm; False if it has no weight, or normalizes several dimensions."""
    given: list[Any] = [*norm.args, None, None][:4]
    if not isinstance(given[2], Node) or len(given[1]) != 1:
        return False
    graph_module = norm.graph.owning_module
    assert graph_module is not None
    scale = _constant(graph_module, norm, factor)
    for place in (2, 3):
        if isinstance(given[place], Node):
            norm.update_arg(place, _insert(graph_module, norm, (given[place], scale)))
    return True


def _constant(graph_module: GraphModule, before: Node, value: torch.Tensor) -> Node:
    name = free_name(graph_module, "smoothing")
    graph_module.register_buffer(name, value)
    with graph_module.graph.inserting_before(before):
        return graph_module.graph.get_attr(name)


def _insert(graph_module: GraphModule, before: Node, args: tuple[Any, ...]) -> Node:
    with graph_module.graph.inserting_before(before):
        product = graph_module.graph.call_function(aten.mul.Tensor, args)
    product.meta = dict(args[0].meta)
    return product
