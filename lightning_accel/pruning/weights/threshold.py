"""Exact k-th smallest of very many scores, without concatenating or sorting all of them."""

import math
from collections.abc import Callable, Sequence

import torch

from lightning_accel.errors import InvalidArgumentError

_SAMPLE = 1 << 18  # scores looked at to guess where the threshold lies; below it, all of them
_AROUND = 0.005  # share of the scores taken on each side of the guess: 5 standard errors


def keep_highest(scores: Sequence[Callable[[], torch.Tensor]], sizes: Sequence[int], drop: int) -> list[torch.Tensor]:
    """Mark all but the ``drop`` lowest of all scores together; among equal ones the first are dropped. Exact.

    A sample brackets the threshold, one pass counts what lies below and collects what lies inside, and the exact value is
    found among those few (in the manner of Floyd and Rivest, https://doi.org/10.1145/360680.360691).

    Args:
        scores: each returns flat scores; called a few times, must return the same each time, so that not all need exist
            at once.
        sizes: how many each returns.
        drop: from 0 to the number of scores.

    Returns:
        For each, a boolean tensor, ``True`` for what is kept.

    Raises:
        InvalidArgumentError: a score is NaN.
    """
    if drop == 0:
        return [torch.ones_like(one(), dtype=torch.bool) for one in scores]
    if drop == sum(sizes):
        return [torch.zeros_like(one(), dtype=torch.bool) for one in scores]
    value, ties = _threshold(scores, sum(sizes), drop)
    marks = []
    for one in scores:
        part = one()
        keep = part > value
        if (equal := part == value).any():
            places = equal.nonzero()[:, 0]
            keep[places[ties:]] = True
            ties = max(0, ties - len(places))
        marks.append(keep)
    return marks


def _threshold(scores: Sequence[Callable[[], torch.Tensor]], total: int, count: int) -> tuple[float, int]:
    """The ``count``-th lowest score, and how many of those equal to it belong to the lowest ``count``."""
    stride = math.ceil(total / _SAMPLE)
    few = torch.cat([one()[::stride].clone() for one in scores]).sort().values
    low, high = -math.inf, math.inf
    if stride > 1:
        place = count / total * len(few)
        low = float(few[max(0, math.floor(place - _AROUND * len(few)))]) if place > _AROUND * len(few) else -math.inf
        high = (
            float(few[math.ceil(place + _AROUND * len(few))]) if place + _AROUND * len(few) < len(few) - 1 else math.inf
        )
    while True:
        below, seen, inside = 0, 0, []
        for one in scores:
            part = one()
            from_low, to_high = part >= low, part <= high
            at_least = int(from_low.count_nonzero())
            inside.append(part[from_low & to_high])
            below += part.numel() - at_least
            seen += at_least + int(to_high.count_nonzero()) - len(inside[-1])
        if seen != total:
            raise InvalidArgumentError(
                "Argument `criterion` must give numbers, but got NaN. Has the training diverged?"
            )
        near = torch.cat(inside)
        if below < count <= below + len(near):
            value = near.kthvalue(count - below).values
            return float(value), count - below - int((near < value).count_nonzero())
        low, high = (-math.inf, low) if count <= below else (high, math.inf)
