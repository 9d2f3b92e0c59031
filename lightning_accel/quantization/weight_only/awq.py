"""AWQ on a group grid: input channels with large activations get finer steps (https://arxiv.org/abs/2306.00978).

Each input channel of some layers is divided by a factor, and their weights are multiplied by it. The division is taken up by what
makes the channels: the weight of a norm, or the rows of a linear layer. Which one that is isn't read off names: it is tried. With
powers of two as factors nothing is rounded, so the network must compute what it did before.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_accel.core.effective_weight import linear_layers
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import inputs_of, rows_of

_STRENGTHS = tuple(i / 20 for i in range(20))  # powers of the mean magnitude; 0 changes nothing
_CLIPS = tuple(1 - i / 20 for i in range(11))  # of the value of largest magnitude in a group
_ROWS = 512  # input vectors of a layer that are kept
_EQUAL = (
    1e-5  # of the largest value: sums of float32 in another order; a wrong producer is wrong by a multiple of the value
)

Run = Callable[[Any], Any]


@dataclass
class _Seen:
    """What layers read in the calibration, by their names."""

    vectors: dict[str, torch.Tensor] = field(default_factory=dict)  # some of them, (rows, channels)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)  # sum over all of them, (channels,)
    together: dict[tuple[Any, ...], list[str]] = field(default_factory=dict)  # layers that read one tensor


@torch.no_grad()
def scale_and_clip_(
    module: nn.Module, names: Sequence[str], grid: GroupGrid, batches: Sequence[Any], call: Run
) -> dict[str, str]:
    """Scale and clip weights so that rounding them changes the layers' results less. In float the scaling changes nothing.

    Args:
        module: the network, in eval mode.
        names: linear layers that are rounded.
        grid: they are rounded to.
        batches: calibration data.
        call: runs the network on a batch.

    Returns:
        For each layer that was scaled, the module that makes its input.
    """
    layers = {name: module.get_submodule(name) for name in names}
    seen = _watch(layers, batches, call)
    scaled: dict[str, str] = {}
    for group in seen.together.values():
        if len({inputs_of(layers[name]) for name in group}) == 1:
            maker = _scale(module, group, layers, seen, grid, batches[0], call)
            scaled |= dict.fromkeys(group, maker) if maker else {}
    for name, vectors in seen.vectors.items():
        _clip(layers[name], vectors, grid)
    return scaled


def _watch(layers: dict[str, nn.Module], batches: Sequence[Any], call: Run) -> _Seen:
    seen, kept = _Seen(), {name: list[torch.Tensor]() for name in layers}
    rows = max(1, _ROWS // len(batches))
    alive: list[torch.Tensor] = []  # of the first batch, so that no two share an address

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0].detach()
            if not kept[name]:
                alive.append(x)
                seen.together.setdefault((x.data_ptr(), x.shape, x.stride()), []).append(name)
            flat = x.float().reshape(-1, x.shape[-1])
            kept[name].append(flat[:: max(1, len(flat) // rows)][:rows].clone())
            seen.magnitude[name] = seen.magnitude.get(name, 0.0) + flat.abs().sum(0)

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        for batch in batches:
            call(batch)
            alive.clear()
    finally:
        for hook in hooks:
            hook.remove()
    seen.vectors = {name: torch.cat(parts) for name, parts in kept.items() if parts}
    return seen


def _scale(
    module: nn.Module,
    group: Sequence[str],
    layers: dict[str, nn.Module],
    seen: _Seen,
    grid: GroupGrid,
    batch: Any,
    call: Run,
) -> str:
    """Scale the inputs of layers that read one tensor; returns the name of what makes it, empty if nothing was scaled."""
    x = seen.vectors[group[0]]
    weights = [rows_of(layers[name]).float() for name in group]
    wanted = [x @ weight.T for weight in weights]
    power = [want.square().mean().clamp(min=1e-30) for want in wanted]
    magnitude = seen.magnitude[group[0]].clamp(min=1e-30)
    best, factor = float("inf"), None
    for strength in _STRENGTHS:
        trial = (magnitude**strength).clamp(min=1e-4 * float((magnitude**strength).max()))
        trial = trial / (trial.max() * trial.min()).sqrt()
        scaled = x / trial
        loss = sum(
            float((scaled @ grid(weight * trial).T - want).square().mean() / size)
            for weight, want, size in zip(weights, wanted, power, strict=True)
        )
        if loss < best:
            best, factor = loss, None if strength == 0 else trial
    if factor is None:
        return ""
    consumers = [layers[name] for name in group]
    name, maker = _maker(module, group, consumers, batch, call)
    if maker is not None:
        _apply(maker, consumers, factor)
        seen.vectors |= {name: seen.vectors[name] / factor for name in group}
    return name


def _maker(
    module: nn.Module, group: Sequence[str], consumers: Sequence[nn.Module], batch: Any, call: Run
) -> tuple[str, nn.Module | None]:
    """The module whose channels are the inputs of some layers, and that nothing else reads: found by trying."""
    channels = inputs_of(consumers[0])
    generator = torch.Generator().manual_seed(0)
    factor = torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).float())
    factor = factor.to(next(module.parameters()).device)
    before: list[torch.Tensor] | None = None
    for name, maker in _candidates(module, group, channels):
        before = _results(call(batch)) if before is None else before
        _apply(maker, consumers, factor)
        try:
            after = _results(call(batch))
        finally:
            _apply(maker, consumers, 1 / factor)
        if before and all(_same(one, other) for one, other in zip(before, after, strict=True)):
            return name, maker
    return "", None


def _candidates(module: nn.Module, group: Sequence[str], channels: int) -> Iterator[tuple[str, nn.Module]]:
    """Norms and linear layers with as many channels, the nearest in the network's order first."""
    modules = [(name, part) for name, part in module.named_modules() if name not in group]
    order = {name: place for place, (name, _) in enumerate(module.named_modules())}
    linear = linear_layers(module)
    users: dict[int, int] = {}
    for _, part in module.named_modules():
        for parameter in part.parameters(recurse=False):
            users[id(parameter)] = users.get(id(parameter), 0) + 1

    def fits(name: str, part: nn.Module) -> bool:
        weight = getattr(part, "weight", None)
        if not isinstance(weight, nn.Parameter) or users[id(weight)] > 1:
            return False
        if name in linear:
            return rows_of(part).shape[0] == channels
        return weight.shape == (channels,)

    first = order[group[0]]
    for name, part in sorted(modules, key=lambda item: abs(order[item[0]] - first))[:40]:
        if fits(name, part):
            yield name, part


def _apply(maker: nn.Module, consumers: Sequence[nn.Module], factor: torch.Tensor) -> None:
    """Divide a module's channels by a factor, and multiply the weights that read them."""
    weight = maker.weight
    assert isinstance(weight, torch.Tensor)
    rows = weight if weight.ndim == 1 else rows_of(maker).t()  # the channels are the last dimension
    rows.div_(factor.to(weight.dtype))
    bias = getattr(maker, "bias", None)
    if isinstance(bias, torch.Tensor):
        bias.div_(factor.to(bias.dtype))
    for consumer in consumers:
        rows_of(consumer).mul_(factor.to(weight.dtype))


def _results(result: Any) -> list[torch.Tensor]:
    return [leaf.detach().float().clone() for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and bool((one - other).abs().max() <= _EQUAL * one.abs().max())


def _clip(layer: nn.Module, x: torch.Tensor, grid: GroupGrid) -> None:
    """Clip each group of a weight where that makes the layer's results better: the rest of it gets finer steps."""
    rows = rows_of(layer)
    weight = rows.float()
    outputs, groups = weight.shape[0], weight.shape[1] // grid.group
    parts = x.reshape(len(x), groups, grid.group)
    moments = torch.einsum("ngi,ngj->gij", parts, parts)
    grouped = weight.reshape(outputs, groups, grid.group)
    largest = grouped.abs().amax(-1, keepdim=True)
    best = torch.full((outputs, groups), torch.inf, device=weight.device)
    chosen = grouped.clone()
    for share in _CLIPS:
        clipped = torch.minimum(torch.maximum(grouped, -share * largest), share * largest)
        error = grid(clipped.reshape(outputs, -1)).reshape(grouped.shape) - grouped
        loss = torch.einsum("ogi,gij,ogj->og", error, moments, error)
        better = loss < best
        best = torch.where(better, loss, best)
        chosen = torch.where(better[..., None], clipped, chosen)
    rows.copy_(chosen.reshape(weight.shape).to(rows.dtype))
