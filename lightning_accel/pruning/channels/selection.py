"""Select the fewest, least important units whose removal reaches a target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import floor, gcd

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group


@dataclass(frozen=True)
class Block:
    """Units of one group that are removed in one step, before the group's next block.

    Args:
        group: position of the group.
        units: units of the group.
        channels: number of channels.
        score: importance; blocks with the lowest are removed first.
    """

    group: int
    units: tuple[int, ...]
    channels: int
    score: float


def removal_order(
    groups: Sequence[Group],
    scores: Sequence[torch.Tensor],
    scope: str = "global",
    round_to: int = 1,
    shares: Sequence[float] = (),
) -> list[Block]:
    """Order of all possible removals.

    Args:
        groups: kept groups are skipped.
        scores: ``(units,)`` of each group.
        scope: ``"global"`` compares all scores with each other; ``"layer"`` removes the same share from each group.
        round_to: after a removal, a group's channels are a multiple of it.
        shares: largest share to remove from each group; empty means all but ``round_to`` channels.

    Returns:
        Blocks; those of one group in the order of its scores.

    Example:
        >>> group = Group("conv", ("conv",), 4, 4, 1, {}, frozenset(), frozenset(), {})
        >>> [block.units for block in removal_order([group], [torch.tensor([3.0, 1.0, 2.0, 4.0])])]
        [(1,), (2,), (0,)]
    """
    blocks = []
    for position, group in enumerate(groups):
        if group.kept:
            continue
        step = round_to // gcd(round_to, group.width)  # units
        order = torch.argsort(scores[position], stable=True).tolist()
        may_leave = floor((shares[position] if shares else 1.0) * group.original + 1e-9)
        least = max(min(step, group.units), group.original - may_leave)
        left = group.units
        while (rest := (left - 1) // step * step) >= least:
            units = tuple(order[group.units - left : group.units - rest])
            share = (group.original - rest) / group.original
            score = share if scope == "layer" else float(scores[position][list(units)].mean())
            blocks.append(Block(position, units, len(units) * group.width, score))
            left = rest
    return sorted(blocks, key=lambda block: block.score)


def fewest(blocks: Sequence[Block], reached: Callable[[Sequence[Block]], bool]) -> Sequence[Block] | None:
    """Shortest prefix of ``blocks`` that reaches a target; ``None`` if even all blocks don't.

    Args:
        blocks: blocks in order of removal.
        reached: whether a prefix reaches the target; monotonic in its length.
    """
    if not reached(blocks):
        return None
    low, high = 0, len(blocks)
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if reached(blocks[:middle]) else (middle + 1, high)
    return blocks[:low]


def units_of(blocks: Sequence[Block]) -> dict[int, list[int]]:
    """Units of blocks, by position of their group."""
    chosen: dict[int, list[int]] = {}
    for block in blocks:
        chosen.setdefault(block.group, []).extend(block.units)
    return {position: sorted(units) for position, units in chosen.items()}


def shares_of(groups: Sequence[Group], limits: Mapping[str, float]) -> list[float]:
    """Largest share to remove from each group, from globs over layers.

    Raises:
        InvalidArgumentError: a glob matches no layer, or two with different shares match one group.
    """
    shares: list[float] = []
    layers = [layer for group in groups for layer in group.layers]
    for glob in limits:
        if not any(fnmatchcase(layer, glob) for layer in layers):
            near = ", ".join(layers[:6]) + (", ..." if len(layers) > 6 else "")
            raise InvalidArgumentError(
                f"Argument `limits` must match the name of a layer with channels, but got {glob!r}, which matches none of: {near}."
            )
    for group in groups:
        found = {glob: limits[glob] for glob in limits if any(fnmatchcase(layer, glob) for layer in group.layers)}
        if len(set(found.values())) > 1:
            raise InvalidArgumentError(
                f"Argument `limits` must give one share to channels that leave together, but got {found} for those of "
                f"{', '.join(f'`{layer}`' for layer in group.layers)}. Make the globs narrower."
            )
        shares.append(next(iter(found.values()), 1.0))
    return shares
