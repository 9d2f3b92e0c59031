"""Find channels of different layers that depend on each other, by tracing the operations of a forward pass.

torch-pruning derives a dependency graph from the autograd graph (DepGraph, https://arxiv.org/abs/2301.12900). Its edges are
followed for all channels at once, to find every set of dependent channels.
"""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.overrides import TorchFunctionMode

from lightning_accel.core.patching import swapped
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.attention import Attention, find_attention
from lightning_accel.pruning.channels.layers import as_linear, depthwise, makes_channels

Side = tuple[str, str]  # layer, and "out" (channels that it computes or passes on) or "in"


@dataclass(frozen=True)
class Coupled:
    """Channels that must be removed together.

    Args:
        channels: channel indices by layer and side.
        heads: for an attention head: candidate changes of its module's attributes, as (path, attribute, decrement), the most
            complete first.
    """

    channels: Mapping[Side, list[int]]
    heads: tuple[tuple[tuple[str, str, int], ...], ...] = ()


class _Sets:
    """Disjoint sets of (key, channel)."""

    def __init__(self) -> None:
        self._number: dict[tuple[int, int], int] = {}
        self._parent: list[int] = []

    def number(self, key: int, channel: int) -> int:
        atom = (key, channel)
        if atom not in self._number:
            self._number[atom] = len(self._parent)
            self._parent.append(len(self._parent))
        return self._number[atom]

    def find(self, number: int) -> int:
        while self._parent[number] != number:
            self._parent[number] = self._parent[self._parent[number]]
            number = self._parent[number]
        return number

    def join(self, a: int, b: int) -> None:
        a, b = self.find(a), self.find(b)
        if a != b:
            self._parent[max(a, b)] = min(a, b)

    def atoms(self) -> Iterable[tuple[int, int, int]]:
        """(set, key, channel) of every atom."""
        return ((self.find(number), *atom) for atom, number in self._number.items())


def coupled_channels(module: nn.Module, forward: Callable[[], list[torch.Tensor]]) -> list[Coupled]:
    """Find sets of channels that must be removed together.

    Args:
        module: in eval mode; its parameters all have gradients.
        forward: runs the module and returns its outputs with their autograd graph.

    Returns:
        One entry for each set that contains output channels of a convolution or linear layer.
    """
    with as_linear(module):
        return _coupled_channels(module, forward)


def _coupled_channels(module: nn.Module, forward: Callable[[], list[torch.Tensor]]) -> list[Coupled]:
    graph = _dependency_graph(module, forward)
    attention = find_attention(module)
    hidden = {side for found in attention for side in found.fused}
    sides, sets = _follow(graph, module, hidden)
    _join_fixed(module, sides, sets)
    heads = _join_heads(module, attention, sides, sets)
    names = {key: side for side, key in sides.items()}
    members: dict[int, dict[Side, list[int]]] = {}
    for which, key, channel in sets.atoms():
        if key in names:
            members.setdefault(which, {}).setdefault(names[key], []).append(channel)
    found = []
    for channels in members.values():
        if any(role == "out" and makes_channels(module, layer) for layer, role in channels):
            channels = {side: sorted(index) for side, index in channels.items()}
            found.append(Coupled(channels, next((heads[s] for s in channels if s in heads), ())))
    return found


class _Followable(TorchFunctionMode):
    """Computes operations that torch-pruning can't follow by others that it can.

    These are ``glu``, by the two halves of its channels; and ``cat`` with empty tensors, as a cache of keys and values begins.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if name == "glu":
            value, dim = (*args, kwargs.get("dim", -1))[:2]
            first, second = value.chunk(2, dim)
            return first * second.sigmoid()
        if name in ("cat", "concat") and args and isinstance(args[0], list | tuple):
            filled = [tensor for tensor in args[0] if tensor.numel()]
            return filled[0] if len(filled) == 1 else func(filled or args[0], *args[1:], **kwargs)
        return func(*args, **kwargs)


def _layer(module: nn.Module, name: str) -> nn.Module | None:
    return None if "@" in name else module.get_submodule(name)


@contextmanager
def _misread_operations_are_left() -> Iterator[None]:
    """Inside the block an operation whose channels torch-pruning can't map keeps them in place; the effect is verified later."""
    from torch_pruning.dependency import index_mapping

    def tolerant(update: Callable[..., None]) -> Callable[..., None]:
        def updated(*args: Any) -> None:
            with suppress(Exception):  # unrelated types, e.g. ZeroDivisionError at the channel shuffle of ShuffleNetV2
                update(*args)

        return updated

    with ExitStack() as stack:
        for name, update in vars(index_mapping).copy().items():
            if name.startswith("update_") and name != "update_index_mapping":
                stack.enter_context(swapped(index_mapping, name, tolerant(update)))
        yield


def _dependency_graph(module: nn.Module, forward: Callable[[], list[torch.Tensor]]) -> Any:
    import torch_pruning

    with (
        warnings.catch_warnings(),
        torch.inference_mode(False),
        torch.enable_grad(),
        _misread_operations_are_left(),
    ):
        warnings.simplefilter("ignore")  # about unknown operations, whose effect is verified later
        graph = torch_pruning.DependencyGraph()

        def outputs(*_: Any) -> list[torch.Tensor]:
            with _Followable():
                return [t for t in forward() if t.grad_fn is not None]

        try:
            return graph.build_dependency(module, example_inputs=(), forward_fn=outputs, verbose=False)
        except Exception as error:  # torch-pruning raises unrelated types
            raise InvalidArgumentError(
                f"Method `forward` must be traceable by torch-pruning, but got {type(error).__name__}: {error}. Name a "
                "traceable submodule with `module`."
            ) from error


def _follow(graph: Any, module: nn.Module, hidden: set[Side]) -> tuple[dict[Side, int], _Sets]:
    """Join channels along the graph's edges; those of ``hidden`` sides aren't followed."""
    from torch_pruning._helpers import _HybridIndex

    keys: dict[tuple[Any, str], int] = {}
    sides: dict[Side, int] = {}
    shut: set[int] = set()
    seen: dict[int, set[int]] = {}
    work: list[tuple[Any, Any, int, list[int]]] = []
    sets = _Sets()
    most = max((size for p in module.parameters() for size in p.shape), default=0)  # no layer has more channels

    def key_of(node: Any, handler: Any) -> int:
        pruner = graph.get_pruner_of_module(node.module)
        role = "out" if handler == pruner.prune_out_channels else "in"
        if (node, role) not in keys:
            key = keys[node, role] = len(keys)
            seen[key] = set()
            name = _name(graph, node)
            if name is not None:
                sides[name, role] = key
                if (name, role) in hidden:
                    shut.add(key)
        return keys[node, role]

    for name, role in hidden:
        node = graph.module2node.get(module.get_submodule(name))
        if node is not None:
            pruner = graph.get_pruner_of_module(node.module)
            key_of(node, pruner.prune_out_channels if role == "out" else pruner.prune_in_channels)

    for layer, node in graph.module2node.items():
        if isinstance(layer, _ConvNd | nn.Linear):
            pruner = graph.get_pruner_of_module(layer)
            channels = list(range(pruner.get_out_channels(layer)))
            key = key_of(node, pruner.prune_out_channels)
            for channel in channels:
                sets.number(key, channel)
            seen[key].update(channels)
            work.append((node, pruner.prune_out_channels, key, channels))
    while work:
        node, handler, key, channels = work.pop()
        if key in shut:
            continue
        for edge in node.dependencies:
            if not edge.is_triggered_by(handler):
                continue
            target = key_of(edge.target, edge.handler)
            if target in shut:
                continue
            mapped = [_HybridIndex(idx=channel, root_idx=channel) for channel in channels]
            try:
                for mapping in edge.index_mapping:
                    mapped = mapped if mapping is None else mapping(mapped)
            except Exception:  # misread by torch-pruning; the effect is verified later
                continue
            new = []
            for item in mapped:
                if item.root_idx is not None and 0 <= item.idx < most:
                    sets.join(sets.number(key, item.root_idx), sets.number(target, item.idx))
                    if item.idx not in seen[target]:
                        seen[target].add(item.idx)
                        new.append(item.idx)
            if new:
                work.append((edge.target, edge.handler, target, new))
    return sides, sets


def _name(graph: Any, node: Any) -> str | None:
    """Name of a layer, or of a parameter that is used directly, with its channel dimension; empty for an operation."""
    if isinstance(node.module, nn.Parameter):
        name = graph._param_to_name[node.module]
        return f"{name}@{node.pruning_dim % node.module.ndim}"
    result: str | None = graph._module2name.get(node.module)
    return result


def _join_fixed(module: nn.Module, sides: Mapping[Side, int], sets: _Sets) -> None:
    """Join channels that a layer couples: groups of GroupNorm, and equal positions in the groups of a convolution."""
    for (name, role), key in sides.items():
        layer = _layer(module, name)
        if isinstance(layer, nn.GroupNorm):
            size = layer.num_channels // layer.num_groups
            for channel in range(layer.num_channels):
                sets.join(sets.number(key, channel), sets.number(key, channel - channel % size))
        elif isinstance(layer, _ConvNd) and layer.groups > 1 and not depthwise(layer):
            total = layer.out_channels if role == "out" else layer.in_channels
            for channel in range(total):
                sets.join(sets.number(key, channel), sets.number(key, channel % (total // layer.groups)))


def _join_heads(
    module: nn.Module, attention: Sequence[Attention], sides: Mapping[Side, int], sets: _Sets
) -> dict[Side, tuple[tuple[tuple[str, str, int], ...], ...]]:
    """Join the channels of each attention head; returns the candidate changes of attributes, by side."""
    heads = {}
    for found in attention:
        if found.fused:
            (qkv, proj), width = found.fused, found.width
            read, made = sides.get(proj), sides.get(qkv)
            if read is None or made is None:
                continue
            for channel in range(found.heads * width):
                for part in range(3):
                    sets.join(sets.number(read, channel), sets.number(made, part * found.heads * width + channel))
            ends = [read]
        else:
            ends = _coupled_projections(found, sides, sets)
        for key in ends:
            for channel in range(found.heads * found.width):
                sets.join(sets.number(key, channel), sets.number(key, channel - channel % found.width))
            heads[next(side for side, k in sides.items() if k == key)] = found.variants
    return heads


def _coupled_projections(found: Attention, sides: Mapping[Side, int], sets: _Sets) -> list[int]:
    """Find separate query, key and value layers: three linear layers of one module with joined channels."""
    together: dict[int, list[int]] = {}
    for layer in found.projections:
        key = sides.get((layer, "out"))
        if key is not None:
            together.setdefault(sets.find(sets.number(key, 0)), []).append(key)
    return next((keys for keys in together.values() if len(keys) >= 3), [])
