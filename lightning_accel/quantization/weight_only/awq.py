"""AWQ on a group grid: input channels with large activations get finer steps (https://arxiv.org/abs/2306.00978).

Each input channel of some layers is divided by a factor, and their weights are multiplied by it. The division is taken up by what
makes the channels: the weight of a norm, or the rows of a linear layer. Which one that is isn't read off names: it is tried. With
powers of two as factors nothing is rounded, so the network must compute what it did before.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from lightning_accel.core.effective_weight import linear_layers
from lightning_accel.quantization.weight_only.block_runs import BlockRuns, LatestInput
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import block_of, inputs_of, rows_of

_STRENGTHS = tuple(i / 20 for i in range(20))  # powers of the mean magnitude; 0 changes nothing
_CLIPS = tuple(1 - i / 20 for i in range(11))  # of the value of largest magnitude in a group
_ROWS = 512  # input vectors of a layer that are kept
_TRIES = 4  # linear layers that may make an input
# Of the largest value of a vector: float32's sums in another order; a wrong maker changes values by multiples.
_EQUAL = 1e-5

Run = Callable[[Any], Any]


@dataclass
class _Seen:
    """What layers read in the calibration, by their names."""

    watched: dict[str, nn.Module]
    vectors: dict[str, torch.Tensor] = field(default_factory=dict)  # some of them, (rows, channels)
    magnitude: dict[str, torch.Tensor] = field(default_factory=dict)  # sum over all of them, (channels,)
    batches: dict[str, set[int]] = field(default_factory=dict)  # those in which a layer reads something
    together: list["_Shared"] = field(default_factory=list)


@dataclass
class _Shared:
    """A tensor that layers read.

    Args:
        tensor: only as long as the network holds it, too.
        maker: the norm that returned it, if any.
        readers: names of the layers.
    """

    tensor: "weakref.ref[torch.Tensor]"
    maker: str = ""
    readers: list[str] = field(default_factory=list)


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
    seen = _watch(module, layers, batches, call)
    runs = BlockRuns(module, names, batches, call, results=True)
    scaled: dict[str, str] = {}
    for shared in seen.together:
        if shared.readers:
            maker = _scale(module, shared, layers, seen, grid, runs)
            scaled |= dict.fromkeys(shared.readers, maker) if maker else {}
    for name in layers:
        if name in seen.vectors:
            _clip(layers[name], seen.vectors.pop(name), grid)
    return scaled


def _watch(module: nn.Module, layers: dict[str, nn.Module], batches: Sequence[Any], call: Run) -> _Seen:
    seen, kept = _Seen(layers), {name: list[torch.Tensor]() for name in layers}
    rows = max(1, _ROWS // len(batches))
    latest = LatestInput[tuple[torch.Tensor, torch.Tensor]]()
    index = 0

    def reads(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0]
            if not kept[name]:
                shared = next((one for one in reversed(seen.together) if one.tensor() is x), None)
                if shared is None:
                    seen.together.append(shared := _Shared(weakref.ref(x)))
                shared.readers.append(name)
            found = latest.get(x)
            if found is None:
                flat = x.detach().float().reshape(-1, x.shape[-1])
                found = flat[:: max(1, len(flat) // rows)][:rows].clone(), flat.abs().sum(0)
                latest.put(x, found)
            kept[name].append(found[0])
            seen.magnitude[name] = seen.magnitude.get(name, 0.0) + found[1]
            if x.numel():
                seen.batches.setdefault(name, set()).add(index)

        return add

    def makes(name: str) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...], result: Any) -> None:
            if isinstance(result, torch.Tensor):
                seen.together.append(_Shared(weakref.ref(result), name))

        return add

    hooks = [layer.register_forward_pre_hook(reads(name)) for name, layer in layers.items()]
    norms = {name: part for name, part in module.named_modules() if _weight_of(part).ndim == 1}
    first = [part.register_forward_hook(makes(name)) for name, part in norms.items()]
    try:
        for index, batch in enumerate(batches):  # noqa: B007 -- the hooks read it
            call(batch)
            while first:  # what reads what is the same in each batch
                first.pop().remove()
    finally:
        for hook in hooks + first:
            hook.remove()
    joined: dict[tuple[int, ...], torch.Tensor] = {}  # once for the layers that read the same
    for name, parts in kept.items():
        if name in seen.batches:
            key = tuple(map(id, parts))
            joined[key] = seen.vectors[name] = joined[key] if key in joined else torch.cat(parts)
    return seen


def _weight_of(part: nn.Module) -> torch.Tensor:
    """A module's own parameter `weight`; a number if it has none."""
    weight = part._parameters.get("weight")
    return torch.zeros(()) if weight is None else weight


def _scale(
    module: nn.Module,
    shared: _Shared,
    layers: dict[str, nn.Module],
    seen: _Seen,
    grid: GroupGrid,
    runs: BlockRuns,
) -> str:
    """Scale the inputs of layers that read one tensor; returns the name of what makes it, empty if nothing was scaled."""
    group = [name for name in shared.readers if name in seen.vectors]
    if not group:
        return ""
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
    name, maker = _maker(module, shared, consumers, seen, runs)
    if maker is not None:
        _apply(maker, consumers, factor)
        seen.vectors |= dict.fromkeys(group, x / factor)
    return name


def _maker(
    module: nn.Module, shared: _Shared, consumers: Sequence[nn.Module], seen: _Seen, runs: BlockRuns
) -> tuple[str, nn.Module | None]:
    """The module whose channels are the inputs of some layers, and that nothing else reads: found by trying."""
    channels = inputs_of(consumers[0])
    index = _batch_to_try(module, shared, channels, seen)
    if index is None:
        return "", None
    generator = torch.Generator().manual_seed(0)
    factor = torch.exp2(torch.randint(-2, 3, (channels,), generator=generator).float())
    factor = factor.to(next(module.parameters()).device)
    for name, maker in _candidates(module, shared, channels):
        before = runs.results([maker, *consumers], index)
        _apply(maker, consumers, factor)
        try:
            after = runs.results([maker, *consumers], index)
        finally:
            _apply(maker, consumers, 1 / factor)
        if before and all(_same(one, other) for one, other in zip(before, after, strict=True)):
            return name, maker
    return "", None


def _batch_to_try(module: nn.Module, shared: _Shared, channels: int, seen: _Seen) -> int | None:
    """A batch in which all layers of the block run that might read the same channels; an expert without tokens shows no change."""
    near = [
        name for name in _near(module, shared) if name in seen.watched and inputs_of(seen.watched[name]) == channels
    ]
    found = set.intersection(*(seen.batches.get(name, set()) for name in near))
    return min(found, default=None)


def _near(module: nn.Module, shared: _Shared) -> list[str]:
    """The linear layers of the same block, or of the network if it has none."""
    reader = shared.readers[0]
    return [name for name in linear_layers(module) if block_of(reader) in (reader, block_of(name))]


def _candidates(module: nn.Module, shared: _Shared, channels: int) -> Iterator[tuple[str, nn.Module]]:
    """The norm that returned the tensor, or linear layers of the same block with as many outputs, the nearest in its order first."""
    users = Counter(id(p) for part in module.modules() for p in part.parameters(recurse=False))
    parts = dict(module.named_modules())
    if shared.maker:
        found = [shared.maker]
    else:
        order = {name: place for place, name in enumerate(parts)}
        place = order[shared.readers[0]]
        found = [n for n in _near(module, shared) if n not in shared.readers and rows_of(parts[n]).shape[0] == channels]
        found = sorted(found, key=lambda name: abs(order[name] - place))[:_TRIES]
    for name in found:
        weight = _weight_of(parts[name])
        if weight.ndim and users[id(weight)] == 1 and (weight.ndim == 2 or weight.shape == (channels,)):
            yield name, parts[name]


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


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether each vector is the same: some tokens have values that are larger by orders than those of the others."""
    if one.shape != other.shape or one.ndim == 0:
        return torch.equal(one, other)
    return bool(((one - other).abs().amax(-1) <= _EQUAL * one.abs().amax(-1)).all())


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
