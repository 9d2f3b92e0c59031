"""Groups of channels that are removed together, and the reasons why a group is kept."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import nn

from lightning_accel.pruning.channels.coupling import Coupled, coupled_channels
from lightning_accel.pruning.channels.layers import losses_of, makes_channels

Slice = tuple[torch.Tensor, torch.Tensor]  # indices in a dimension, and the unit of each
Place = tuple[str, str, int]  # module path, attribute, position in it


@dataclass(frozen=True)
class Group:
    """Channels of one kind, which are kept or removed by the same rule.

    A unit is removed as a whole: a channel with everything that depends on it, the channels at one position of a grouped
    convolution, or an attention head.

    Args:
        name: the first layer that produces the channels; ``"<layer>#2"`` for a second group that begins there.
        layers: the layers that produce the channels.
        units: present number of units.
        original: number of units before any removal.
        width: channels of the first layer in a unit.
        slices: by parameter or buffer name and dimension, entries and their units.
        produced: keys of ``slices`` that produce the channels; the others read them.
        scales: keys of ``slices`` that are scales of batch norm.
        attributes: place -> decrement of the attribute for each unit.
        kept: reason why no unit may be removed; otherwise empty.
    """

    name: str
    layers: tuple[str, ...]
    units: int
    original: int
    width: int
    slices: Mapping[tuple[str, int], Slice]
    produced: frozenset[tuple[str, int]]
    scales: frozenset[tuple[str, int]]
    attributes: Mapping[Place, torch.Tensor]
    kept: str = ""

    def with_units(
        self, units: int, slices: Mapping[tuple[str, int], Slice], attributes: Mapping[Place, torch.Tensor]
    ) -> "Group":
        """Copy of the group with other units."""
        return replace(self, units=units, slices=slices, attributes=attributes)


@dataclass(frozen=True)
class Candidate:
    """An unverified group, with candidate changes of attributes.

    Args:
        group: the group derived from the layers.
        variants: candidate changes of attributes, the most complete first; several for attention heads.
        norms: layers that normalize over several channels.
    """

    group: Group
    variants: tuple[Mapping[Place, torch.Tensor], ...]
    norms: tuple[str, ...]


def candidate_groups(module: nn.Module, forward: Callable[[], list[torch.Tensor]]) -> list[Candidate]:
    """Group the coupled channels of a module by the layers that they belong to.

    Args:
        module: in eval mode; its parameters all have gradients.
        forward: runs the module and returns its outputs with their autograd graph.

    Returns:
        Groups in the order of registration. Groups that can't be described are included as kept, with the reason.
    """
    by_signature: dict[tuple[tuple[str, str, int], ...], list[Coupled]] = {}
    for unit in coupled_channels(module, forward):
        signature = tuple((layer, role, len(index)) for (layer, role), index in sorted(unit.channels.items()))
        by_signature.setdefault(signature, []).append(unit)
    position = {name: i for i, (name, _) in enumerate(module.named_modules())}
    found = [_candidate(module, units, position) for units in by_signature.values()]
    found.sort(key=lambda c: (position[c.group.layers[0]], _first_entry(c.group)))
    seen: Counter[str] = Counter()
    for i, candidate in enumerate(found):
        layer = candidate.group.layers[0]
        seen[layer] += 1
        if seen[layer] > 1:
            found[i] = replace(candidate, group=replace(candidate.group, name=f"{layer}#{seen[layer]}"))
    return found


def _first_entry(group: Group) -> int:
    return min((int(index.min()) for key, (index, _) in group.slices.items() if key in group.produced), default=0)


def _candidate(module: nn.Module, units: Sequence[Coupled], position: Mapping[str, int]) -> Candidate:
    units = sorted(units, key=lambda unit: min(min(index) for index in unit.channels.values()))
    members = list(units[0].channels)
    makers = {layer for layer, role in members if role == "out" and makes_channels(module, layer)}
    producers = sorted(makers, key=position.__getitem__)
    names = {id(p): name for name, p in module.named_parameters()}  # tied parameters under their first name
    pieces: dict[tuple[str, int], list[Slice]] = {}
    attributes: dict[Place, torch.Tensor] = {}
    produced, scales, norms, kept = set(), set(), [], ""
    for layer, role in members:
        index = torch.tensor([i for unit in units for i in unit.channels[layer, role]])
        unit_of = torch.tensor([u for u, unit in enumerate(units) for _ in unit.channels[layer, role]])
        try:
            losses = losses_of(module, layer, role)
        except ValueError as error:
            kept = kept or str(error)
            continue
        if int(index.max()) >= losses.channels:
            kept = kept or f"the channels of `{layer}` can't be followed through the operations around it"
            continue
        if losses.normalises:
            norms.append(layer)
        for name, dim, period in losses.tensors:
            tensor = module.get_parameter(name) if name not in dict(module.named_buffers()) else None
            key = (name if tensor is None else names[id(tensor)], dim)
            pieces.setdefault(key, []).append((index % period, unit_of))
            if role == "out" and layer in makers:
                produced.add(key)
            if losses.scale == name:
                scales.add(key)
        for path, attribute, where, divisor in losses.attributes:
            count = torch.bincount(unit_of, minlength=len(units)) // divisor
            place = (path, attribute, where)
            attributes[place] = attributes.get(place, torch.zeros_like(count)) + count
    normalised = next((layer for layer in norms if isinstance(module.get_submodule(layer), nn.LayerNorm)), None)
    if normalised is not None:
        kept = kept or f"LayerNorm `{normalised}` normalises over its channels: without some the others change"
    if not any(role == "in" for _, role in members):
        kept = kept or "it reaches the output"  # no layer reads it
    if len(units) == 1:
        kept = kept or "its channels all depend on each other"
    slices = {key: _merged(parts) for key, parts in pieces.items()}
    group = Group(
        name=producers[0],
        layers=tuple(producers),
        units=len(units),
        original=len(units),
        width=len(units[0].channels[producers[0], "out"]),
        slices=slices,
        produced=frozenset(produced),
        scales=frozenset(scales),
        attributes=attributes,
        kept=kept or _shared(module, slices, [layer for layer, _ in members]),
    )
    ones = torch.ones(len(units), dtype=torch.long)
    more = [{(p, a, 0): ones * n for p, a, n in heads} for heads in units[0].heads] or [{}]
    return Candidate(group, tuple({**attributes, **extra} for extra in more), tuple(norms))


def _merged(parts: Sequence[Slice]) -> Slice:
    """Merge slices of one dimension from several uses of the tensor, without duplicates."""
    pairs = torch.stack([torch.cat([index for index, _ in parts]), torch.cat([unit for _, unit in parts])])
    index, unit = torch.unique(pairs, dim=1)
    return index, unit


def _shared(module: nn.Module, slices: Mapping[tuple[str, int], Slice], members: Sequence[str]) -> str:
    """Reason why a tied parameter prevents a removal; empty if there is none."""
    first = {id(p): name for name, p in module.named_parameters()}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        used = first[id(parameter)]
        if name != used and any(used == key for key, _ in slices):
            for alias in (name, used):
                if alias.rpartition(".")[0] not in members and alias not in members:
                    return f"it shares `{used}` with `{alias.rpartition('.')[0]}`, whose channels don't leave with it"
    return ""


def channel_count(groups: Sequence[Group]) -> int:
    """Number of channels in prunable groups."""
    return sum(prod((g.units, g.width)) for g in groups if not g.kept)
