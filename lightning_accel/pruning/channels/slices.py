"""Record of removed channels as slices of tensors, and its replay without tracing.

``{"parameters": {name: [[dimension, size before, kept indices], ...]}, "buffers": ..., "attributes": {path: {name: value}}}``
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lightning_accel.core import structure
from lightning_accel.core.resizing import kept_slice, resize_
from lightning_accel.core.structure import Change
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group

Chosen = Mapping[int, Sequence[int]]  # position of a group -> units to remove
Removal = dict[str, Any]


def removal_of(module: nn.Module, groups: Sequence[Group], chosen: Chosen) -> Removal:
    """Create the record of a removal of units.

    Args:
        module: present module.
        groups: from :func:`~lightning_accel.pruning.channels.groups.find_groups`, in the module's present coordinates.
        chosen: units of each group.

    Returns:
        The record; plain lists, numbers and strings.
    """
    leaving: dict[tuple[str, int], torch.Tensor] = {}
    less: dict[tuple[str, str, int], int] = {}
    for position, units in chosen.items():
        group, wanted = groups[position], torch.tensor(list(units), dtype=torch.long)
        for key, (index, unit) in group.slices.items():
            found = index[torch.isin(unit, wanted)]
            leaving[key] = torch.cat([leaving[key], found]) if key in leaving else found
        for place, per_unit in group.attributes.items():
            less[place] = less.get(place, 0) + int(per_unit[wanted].sum())
    removal: Removal = {"parameters": {}, "buffers": {}, "attributes": {}}
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    for (name, dim), index in leaving.items():
        kind = "parameters" if name in parameters else "buffers"
        size = (parameters[name] if name in parameters else buffers[name]).shape[dim]
        stays = torch.ones(size, dtype=torch.bool)
        stays[index] = False
        if index.numel():
            removal[kind].setdefault(name, []).append([dim, size, stays.nonzero().flatten().tolist()])
    for (path, attribute, position), count in less.items():
        if not count:
            continue
        owner = module.get_submodule(path)
        values = removal["attributes"].setdefault(path, {})
        value = values.get(attribute, getattr(owner, attribute))
        if isinstance(value, int):
            values[attribute] = value - count
        else:  # normalized_shape
            values[attribute] = [n - count if i == position else n for i, n in enumerate(value)]
    return removal


def remove_(module: nn.Module, removal: Removal) -> None:
    """Remove channels from the tensors of a module in place; parameters keep their identity.

    Raises:
        InvalidArgumentError: the module's shapes don't match the record.
    """
    parameters, buffers = dict(module.named_parameters()), dict(module.named_buffers())
    new: list[tuple[torch.Tensor, torch.Tensor]] = []
    for kind, tensors in (("parameters", parameters), ("buffers", buffers)):
        for name, cuts in removal[kind].items():
            sizes = {dim: size for dim, size, _ in cuts}
            shape = tuple(tensors[name].shape) if name in tensors else None
            if shape is None or any(dim >= len(shape) or shape[dim] != size for dim, size in sizes.items()):
                has = f"with shape {shape}" if shape else "not at all"
                raise InvalidArgumentError(
                    f"Argument `module` must be the one whose channels were removed, freshly built, but got `{name}` {has}, where "
                    f"the record expects {', '.join(f'{s} entries in dimension {d}' for d, s in sizes.items())}."
                )
            new.append((tensors[name], kept_slice(tensors[name].data, cuts)))
    for tensor, data in new:
        if isinstance(tensor, nn.Parameter):
            resize_(tensor, data)
        else:
            tensor.data = data
    for path, values in removal["attributes"].items():
        owner = module.get_submodule(path)
        for attribute, value in values.items():
            setattr(owner, attribute, value if isinstance(value, int) else tuple(value))


@contextmanager
def removed(module: nn.Module, removal: Removal, *, physically: bool = True) -> Iterator[None]:
    """Context in which channels are removed from a module.

    Args:
        module: restored afterwards.
        removal: from :func:`removal_of`.
        physically: whether to remove channels; otherwise they are set to zero.
    """
    tensors = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    cuts = {**removal["parameters"], **removal["buffers"]}
    data = {name: tensors[name].data for name in cuts}
    paths = removal["attributes"] if physically else {}
    attributes = {path: {a: getattr(module.get_submodule(path), a) for a in paths[path]} for path in paths}
    try:
        if physically:
            remove_(module, removal)
        else:
            for name, dims in cuts.items():
                tensors[name].data = _zeroed(data[name], dims)
        yield
    finally:
        for name, value in data.items():
            if isinstance(tensors[name], nn.Parameter):
                resize_(tensors[name], value)  # type: ignore[arg-type]
            else:
                tensors[name].data = value
        for path, values in attributes.items():
            for attribute, old in values.items():
                setattr(module.get_submodule(path), attribute, old)


def _zeroed(tensor: torch.Tensor, cuts: Sequence[Sequence[Any]]) -> torch.Tensor:
    result = tensor.clone()
    for dim, size, kept in cuts:
        leaves = torch.ones(size, dtype=torch.bool, device=tensor.device)
        leaves[kept] = False
        result.index_fill_(dim, leaves.nonzero().flatten(), 0)
    return result


def spread_units(units: int, share: float, seed: int) -> list[int]:
    """An irregular selection of a share of the units, at least one and never all."""
    count = min(units - 1, max(1, round(share * units)))
    order = torch.randperm(units, generator=torch.Generator().manual_seed(seed + 1))
    return sorted(order[:count].tolist())


def follow(groups: Sequence[Group], removal: Removal) -> list[Group]:
    """Groups after a removal, without the removed units and in the same order."""
    cuts = {**removal["parameters"], **removal["buffers"]}
    moved = {(name, dim): _moved(size, kept) for name, dims in cuts.items() for dim, size, kept in dims}
    return [_follow(group, moved) for group in groups]


def _moved(size: int, kept: Sequence[int]) -> torch.Tensor:
    """New index of each old one; -1 for removed ones."""
    new = torch.full((size,), -1)
    new[list(kept)] = torch.arange(len(kept))
    return new


def _follow(group: Group, moved: Mapping[tuple[str, int], torch.Tensor]) -> Group:
    gone = torch.zeros(group.units, dtype=torch.bool)
    for key, (index, unit) in group.slices.items():
        if key in moved:
            gone[unit[moved[key][index] < 0]] = True
    number = torch.cumsum(~gone, 0) - 1
    slices = {}
    for key, (index, unit) in group.slices.items():
        stays = ~gone[unit]
        new = moved[key][index] if key in moved else index
        slices[key] = (new[stays], number[unit[stays]])
    attributes = {place: per_unit[~gone] for place, per_unit in group.attributes.items()}
    return group.with_units(int((~gone).sum()), slices, attributes)


def _undo(module: nn.Module, change: Change) -> None:
    raise InvalidArgumentError(
        "Argument `module` must be freshly built to get the structure of a checkpoint with other channels, but got one from "
        "which channels were removed: these can't come back. Build the module again and pass that."
    )


structure.register(
    "remove_channels",
    structure.ChangeHandler(
        replay=lambda module, change: remove_(module, change.args),
        undo=_undo,
        resized=lambda change: change.args["parameters"],
    ),
)
