"""Select linear layers, and round their weights in place."""

import re
from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_accel.core import structure
from lightning_accel.core.effective_weight import EffectiveWeight, is_conv1d, linear_layers, set_rounding_
from lightning_accel.core.globs import select
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.group_grid import GroupGrid, check_group

KIND = "quantize_weights"
_BLOCK = re.compile(r"^(.*?\.\d+)(\.|$)")


def block_of(name: str) -> str:
    """Name of the transformer block that a layer belongs to; its own name if it belongs to none.

    Example:
        >>> block_of("model.layers.3.mlp.up_proj"), block_of("lm_head")
        ('model.layers.3', 'lm_head')
    """
    found = _BLOCK.match(name)
    return found[1] if found else name


def matching(names: Iterable[str], patterns: Sequence[str]) -> tuple[str, ...]:
    """Globs that also match the end of a dotted name: ``"lm_head"`` becomes ``"model.lm_head"`` if that is a name."""
    names = list(names)
    ends = [f"*.{pattern}" for pattern in patterns]
    return tuple(
        pattern
        if any(fnmatchcase(name, pattern) for name in names) or not any(fnmatchcase(n, end) for n in names)
        else end
        for pattern, end in zip(patterns, ends, strict=True)
    )


def select_layers(
    module: nn.Module, group: int, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> tuple[list[str], dict[str, str]]:
    """Names of the linear layers to quantize, and the reasons why others stay float.

    Args:
        module: the network.
        group: inputs that share a scale.
        include: globs of layers; empty means all. A glob also matches the end of a name.
        exclude: globs of layers that stay float.

    Raises:
        InvalidArgumentError: a glob matches nothing, no layer is left, a group doesn't divide the inputs of a layer, or ``include``
            names a layer whose weight is also an embedding.
    """
    layers = linear_layers(module)
    chosen = select(layers, matching(layers, include), matching(layers, exclude), "linear layer")
    tied = {id(part.weight): name for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    reasons: dict[str, str] = {}
    for name in chosen:
        embedding = tied.get(id(layers[name].weight))
        if embedding is None:
            continue
        if any(fnmatchcase(name, pattern) for pattern in matching(layers, include) if "*" not in pattern.lstrip("*.")):
            raise InvalidArgumentError(
                f"Argument `include` must name layers with a weight of their own, but got `{name}`, whose weight is also the embedding "
                f"`{embedding}`. Untie them first, or leave it out."
            )
        reasons[name] = f"its weight is also the embedding `{embedding}`"
    chosen = [name for name in chosen if name not in reasons]
    if not chosen:
        raise InvalidArgumentError(
            f"Arguments `include` and `exclude` must leave a linear layer to quantize, but got none of {len(layers)}."
        )
    for name in chosen:
        check_group(name, inputs_of(layers[name]), group)
    return chosen, reasons


def inputs_of(layer: nn.Module) -> int:
    """Number of inputs of a linear layer."""
    return rows_of(layer).shape[1]


def rows_of(layer: nn.Module) -> torch.Tensor:
    """Weight of a linear layer as ``(out, in)``, in the same memory."""
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    transposed = is_conv1d(type(layer)) or (isinstance(layer, EffectiveWeight) and layer.transposed)
    return weight.t() if transposed else weight


def rounded_layers(module: nn.Module) -> dict[str, EffectiveWeight]:
    """Layers whose weight is rounded, by name."""
    return {
        name: part
        for name, part in module.named_modules()
        if isinstance(part, EffectiveWeight) and isinstance(part.rounding, GroupGrid)
    }


@torch.no_grad()
def integers_of(module: nn.Module) -> dict[str, tuple[torch.Tensor, torch.Tensor, GroupGrid]]:
    """Integers ``(out, in)``, scales ``(out, in / group)`` and grid of each rounded layer: exactly what its ``forward`` computes with."""
    found = {}
    for name, layer in rounded_layers(module).items():
        grid = layer.rounding
        assert isinstance(grid, GroupGrid)
        integers, scales = grid.quantize(layer.adapted_weight())
        found[name] = (integers.cpu(), scales.cpu(), grid)
    return found


def quantize_change(layers: Sequence[str], grid: GroupGrid, owner: str) -> structure.Change:
    """The record of rounded layers."""
    return structure.Change(KIND, owner, {"layers": list(layers), "bits": grid.bits, "group": grid.group})


def _replay(module: nn.Module, change: structure.Change) -> None:
    grid = GroupGrid(change.args["bits"], change.args["group"])
    for name in change.args["layers"]:
        set_rounding_(module.get_submodule(name), grid)


def _undo(module: nn.Module, change: structure.Change) -> None:
    for name in change.args["layers"]:
        set_rounding_(module.get_submodule(name), None)


structure.register(KIND, structure.ChangeHandler(_replay, _undo))
