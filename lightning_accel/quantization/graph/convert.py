"""Convert fake-quantization to quantize/dequantize operators and weights to stored integers.

Nothing is recomputed: integers, scales, zero points and biases come from the objects that training and evaluation use, so the
file equals the simulation.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from hashlib import sha256
from typing import Any

import torch
import torch.ao.quantization.fx._decomposed
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_accel.calls.shapes import ResultShape
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.folding import DynamicLinear, FoldedEmbedding, FoldedOperator
from lightning_accel.quantization.graph.modules import ActivationFakeQuant, free_name
from lightning_accel.quantization.graph.prepare import QuantizedForward

_qd = torch.ops.quantized_decomposed
_STORED = ("_weight_int8", "_weight_scale", "_weight_zero_point", "_bias")  # suffixes of an operator's stored tensors


@dataclass(frozen=True)
class TrainedIntegers:
    """Integers and scales at the end of training, to compare with the exported file.

    Args:
        weights: name of the stored weight -> (integers int8, scales float32 ``(C,)``, axis).
        activations: (scale, zero point) of each place where a tensor is quantized, by the tensor's key.
    """

    weights: dict[str, tuple[torch.Tensor, torch.Tensor, int]]
    activations: dict[str, tuple[float, int]]


def convert(
    forward: QuantizedForward, choose: Callable[[ResultShape], Collection[int]] | None = None
) -> tuple[GraphModule, TrainedIntegers]:
    """Convert the quantized network to a graph of integers, scales and float operators.

    Args:
        forward: quantized forward with learned ranges; not changed.
        choose: positions of the result's tensors that are needed; integers of others are left out. ``None``: all.

    Returns:
        The graph, on the module's device, and its integers and scales.

    Raises:
        InvalidArgumentError: no ranges were learned.
    """
    bank = forward.bank
    if bank.batches == 0 and bank.keys:
        raise InvalidArgumentError(
            "Ranges must have seen data before convert, but got none: train, or calibrate, past `start`."
        )
    bank.check_observed()
    graph_module = forward.graph()
    if choose is not None:
        _drop_what_only_others_need(graph_module, choose)
    trained, own = TrainedIntegers({}, {}), set(graph_module._buffers)
    for node in list(graph_module.graph.nodes):
        if (
            node.target is torch.ops.aten.view.default
        ):  # as captured; integers and their sums may lie in memory in another order
            node.target = torch.ops.aten.reshape.default
        if node.op != "call_module":
            continue
        part = graph_module.get_submodule(node.target)
        if isinstance(part, ActivationFakeQuant):
            key, (scale, zero_point) = bank.keys[part.index], part.qparams()
            while key in trained.activations:  # concatenated tensors share one range
                key += "'"
            trained.activations[key] = (scale, zero_point)
            _quantize_activation(graph_module, node, part, scale, zero_point)
        elif write := _WRITERS.get(type(part)):
            name = free_name(graph_module, node.target.removeprefix("folded_"), _STORED)
            trained.weights[f"{name}_weight_int8"] = write(graph_module, node, part, name)
    graph_module.graph.eliminate_dead_code()
    graph_module.delete_all_unused_submodules()
    _drop_unused_tensors(graph_module)
    _store_equal_tensors_once(graph_module, own)
    graph_module.graph.lint()
    graph_module.recompile()
    return graph_module, trained


def _drop_what_only_others_need(graph_module: GraphModule, choose: Callable[[ResultShape], Collection[int]]) -> None:
    """Remove operators behind which no chosen tensor of the result lies; the result keeps its form."""
    output = graph_module.graph.output_node()
    leaves, spec = pytree.tree_flatten(output.args[0])
    values = [leaf.meta.get("val") if isinstance(leaf, Node) else leaf for leaf in leaves]
    form: Any = graph_module.graph._codegen
    shape, _ = ResultShape.of(pytree.tree_unflatten(values, form.pytree_info.out_spec))
    tensors = [leaf for leaf in leaves if isinstance(leaf, Node)]
    needed = [tensors[place] for place in choose(shape)]
    # Another tensor stands in the places of the rest, which `choose` leaves out again.
    swapped = [needed[0] if isinstance(leaf, Node) and leaf not in needed else leaf for leaf in leaves]
    output.args = (pytree.tree_unflatten(swapped, spec),)
    graph_module.graph.eliminate_dead_code()


def _quantize_activation(
    graph_module: GraphModule, node: Node, part: ActivationFakeQuant, scale: float, zero_point: int
) -> None:
    target = part.bank.target
    arguments = (scale, zero_point, *target.limits, getattr(torch, target.activations))
    with graph_module.graph.inserting_before(node):
        integers = graph_module.graph.call_function(_qd.quantize_per_tensor.default, (node.args[0], *arguments))
        back = graph_module.graph.call_function(_qd.dequantize_per_tensor.default, (integers, *arguments))
    back.meta = dict(node.meta)
    node.replace_all_uses_with(back)
    graph_module.graph.erase_node(node)


def _quantize_operator(
    graph_module: GraphModule, node: Node, part: FoldedOperator, name: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    state: dict[str, torch.Tensor] = dict(graph_module.named_parameters(remove_duplicate=False))
    state |= dict(graph_module.named_buffers(remove_duplicate=False))
    with torch.no_grad():
        tensors = [state[str(a.target)].detach() if isinstance(a, Node) else None for a in node.args[1:]]
        values, scale, bias = part.fold(*tensors)  # type: ignore[arg-type]
        integers = values.to(torch.int8)
    graph = graph_module.graph
    graph_module.register_buffer(f"{name}_weight_int8", integers)
    graph_module.register_buffer(f"{name}_weight_scale", scale)
    graph_module.register_buffer(
        f"{name}_weight_zero_point", torch.zeros(len(scale), dtype=torch.int64, device=scale.device)
    )
    limit = part.bank.target.weight_max
    with graph.inserting_before(node):
        stored = [graph.get_attr(f"{name}_weight_{kind}") for kind in ("int8", "scale", "zero_point")]
        weight = graph.call_function(
            _qd.dequantize_per_channel.default, (*stored, part.axis, -limit, limit, torch.int8)
        )
        new_bias = None
        if bias is not None:
            graph_module.register_buffer(f"{name}_bias", bias)
            new_bias = graph.get_attr(f"{name}_bias")
        result = graph.call_function(part.operator, (node.args[0], weight, new_bias, *part.rest))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return integers.cpu(), scale.cpu(), part.axis


def _quantize_dynamic(
    graph_module: GraphModule, node: Node, part: DynamicLinear, name: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    weight = dict(graph_module.named_parameters(remove_duplicate=False))[str(node.args[1].target)]  # type: ignore[union-attr]
    integers, scale = part.fold(weight)
    graph_module.register_buffer(f"{name}_weight_int8", integers)
    graph_module.register_buffer(f"{name}_weight_scale", scale)
    graph = graph_module.graph
    with graph.inserting_before(node):
        stored = [graph.get_attr(f"{name}_weight_{kind}") for kind in ("int8", "scale")]
        operator = torch.ops.lightning_accel.dynamic_linear.default
        result = graph.call_function(operator, (node.args[0], *stored, node.args[2]))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return integers.cpu(), scale.cpu(), 1


def _quantize_embedding(
    graph_module: GraphModule, node: Node, part: FoldedEmbedding, name: str
) -> tuple[torch.Tensor, torch.Tensor, int]:
    table = dict(graph_module.named_parameters(remove_duplicate=False))[str(node.args[0].target)]  # type: ignore[union-attr]
    values, scale = part.fold(table)
    graph_module.register_buffer(f"{name}_weight_int8", values.to(torch.int8))
    graph, limit = graph_module.graph, part.bank.target.weight_max
    with graph.inserting_before(node):
        rows = graph.call_function(
            torch.ops.aten.embedding.default, (graph.get_attr(f"{name}_weight_int8"), node.args[1])
        )
        grid = (float(scale), 0, -limit, limit, torch.int8)
        result = graph.call_function(_qd.dequantize_per_tensor.default, (rows, *grid))
    result.meta = dict(node.meta)
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    return values.to(torch.int8).cpu(), scale.cpu(), 0


_WRITERS: dict[type, Callable[..., tuple[torch.Tensor, torch.Tensor, int]]] = {
    FoldedOperator: _quantize_operator,
    DynamicLinear: _quantize_dynamic,
    FoldedEmbedding: _quantize_embedding,
}


def _drop_unused_tensors(graph_module: GraphModule) -> None:
    """Remove float weights, which have no reader any more."""
    read = {node.target for node in graph_module.graph.nodes if node.op == "get_attr"}
    for name, owner in list(graph_module.named_modules(remove_duplicate=False)):
        for store in (owner._parameters, owner._buffers):
            for key in [k for k in store if (f"{name}.{k}" if name else k) not in read]:
                del store[key]


def _store_equal_tensors_once(graph_module: GraphModule, own: set[str]) -> None:
    """Let all readers of equal stored tensors read one of them: a layer that is called several times has one weight.

    Args:
        graph_module: changed in place.
        own: buffers of the user's module, which may be written to and stay apart.
    """
    first: dict[Any, str] = {}
    for name, buffer in [(n, b) for n, b in graph_module.named_buffers(recurse=False) if n not in own]:
        content = buffer.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        key = (buffer.dtype, tuple(buffer.shape), sha256(content.numpy().tobytes()).digest())
        kept = first.setdefault(key, name)
        if kept != name:
            for node in graph_module.graph.nodes:
                if node.op == "get_attr" and node.target == name:
                    node.target = kept
            del graph_module._buffers[name]
