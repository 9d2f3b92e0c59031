"""Insert the fake-quantization modules of a plan into a captured graph."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node

from lightning_accel.quantization.arithmetic.observers import RangeBank
from lightning_accel.quantization.graph.actions import foldable_norm
from lightning_accel.quantization.graph.folding import DynamicLinear, FoldedEmbedding, FoldedOperator
from lightning_accel.quantization.graph.modules import ActivationFakeQuant, free_name
from lightning_accel.quantization.graph.operators import writes
from lightning_accel.quantization.graph.plan import QuantizationPlan, QuantizationPoint, aten
from lightning_accel.quantization.graph.smoothable import scale_channels

DYNAMIC = (aten.linear.default, aten.embedding.default)  # operators that dynamic quantization supports


def place_fake_quants(
    graph_module: GraphModule, plan: QuantizationPlan, tensors: Mapping[str, str], bank: RangeBank
) -> None:
    """Insert the fake-quants of a plan into a captured eval graph, in place, one for each tensor.

    Args:
        graph_module: the captured graph.
        plan: its points.
        tensors: key of each activation -> key of its row in the bank.
        bank: holds the ranges.
    """
    rows = {key: i for i, key in enumerate(bank.keys)}
    placed: dict[tuple[Node, int, int], Node] = {}
    smoothed: dict[Node, torch.Tensor] = {}
    for point in plan.points:
        if point.weight:
            if _is_dynamic_linear(plan, point):
                _make_dynamic(graph_module, point, bank)
            continue
        row = rows[tensors[point.key]]
        for root in point.roots:
            at = (root, row, point.version)
            if at not in placed:
                fake = ActivationFakeQuant(bank, row)
                placed[at] = _insert(graph_module, point, root, f"fake_quant_{row}", fake)
                if row in bank.smooth:
                    smoothed[placed[at]] = bank.smooth[row]
            for source, reader in point.moved:
                if source is root:
                    reader.replace_input_with(root, placed[at])
    fakes = set(placed.values())
    for point in plan.points:  # afterwards all other readers of an integer tensor read the quantized one too
        for root in point.roots if point.shared else ():
            fake_node = placed[root, rows[tensors[point.key]], point.version]
            for user in [u for u in root.users if u not in fakes and u.op != "output"]:
                if _after(fake_node, user):
                    user.replace_input_with(root, fake_node)
    for fake_node, factor in smoothed.items():
        scale_channels(graph_module, fake_node, factor)
    for point in plan.points:
        if point.weight and not _is_dynamic_linear(plan, point):
            _fold(graph_module, point, bank)
    graph_module.graph.eliminate_dead_code()
    graph_module.graph.lint()
    graph_module.recompile()


def _is_dynamic_linear(plan: QuantizationPlan, point: QuantizationPoint) -> bool:
    return plan.dynamic and point.node.target is aten.linear.default


def _insert(graph_module: GraphModule, point: QuantizationPoint, root: Node, name: str, fake: nn.Module) -> Node:
    """Insert a node that applies a fake-quantization to a tensor, before its first reader."""
    name = free_name(graph_module, name)
    graph_module.add_module(name, fake)
    users = set(root.users)
    # Each version of a tensor that is overwritten in place has its own readers.
    overwritten = any(writes(user) and user.args[0] is root for user in users)
    before = point.node if point.index is not None and (point.version or overwritten) else _first(root, users)
    with graph_module.graph.inserting_before(before):
        node = graph_module.graph.call_module(name, (root,))
    node.meta = dict(root.meta)
    return node


def _first(root: Node, users: set[Node]) -> Node:
    node = root.next
    while node not in users:
        node = node.next
    return node


def _after(first: Node, second: Node) -> bool:
    """Whether the second node comes after the first."""
    while second.op != "root":
        second = second.prev
        if second is first:
            return True
    return False


def _make_dynamic(graph_module: GraphModule, point: QuantizationPoint, bank: RangeBank) -> None:
    name = _folded_name(graph_module, point)
    graph_module.add_module(name, DynamicLinear(bank, point.operator))
    bias = point.node.args[2] if len(point.node.args) > 2 else None
    with graph_module.graph.inserting_before(point.node):
        _replace(point.node, graph_module.graph.call_module(name, (*point.node.args[:2], bias)))


def _folded_name(graph_module: GraphModule, point: QuantizationPoint) -> str:
    return free_name(graph_module, "folded_" + point.operator.replace(".", "_"))


def _fold(graph_module: GraphModule, point: QuantizationPoint, bank: RangeBank) -> None:
    """Replace an operator, and a batch norm that is its only reader, by one with integer weights."""
    node, name = point.node, _folded_name(graph_module, point)
    graph = graph_module.graph
    if node.target is aten.embedding.default:
        graph_module.add_module(name, FoldedEmbedding(bank))
        with graph.inserting_before(node):
            folded = graph.call_module(name, node.args[:2])
        _replace(node, folded)
        return
    bias = node.args[2] if len(node.args) > 2 else None
    norm = foldable_norm(node)
    tensors: tuple[Any, ...] = () if norm is None else norm.args[1:5]
    epsilon: Any = None if norm is None else norm.args[7]
    operator = FoldedOperator(bank, node.target, point.axis or 0, tuple(node.args[3:]), epsilon, point.operator)
    graph_module.add_module(name, operator)
    last = node if norm is None else norm
    with graph.inserting_before(last):
        folded = graph.call_module(name, (node.args[0], node.args[1], bias, *tensors))
    _replace(last, folded)
    if norm is not None:
        graph.erase_node(node)


def _replace(node: Node, other: Node) -> None:
    other.meta = dict(node.meta)
    node.replace_all_uses_with(other)
    node.graph.erase_node(node)
