"""Exact k-th smallest of scores that are spread over ranks: by counts alone, no score leaves its rank."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from lightning_accel.core.shards import total
from lightning_accel.errors import InvalidArgumentError

DIGIT = 8  # bits of a score that one exchange of counts decides; 32 / DIGIT exchanges find the threshold
_BINS = 1 << DIGIT


def keep_highest_of_all(scores: Sequence[Callable[[], torch.Tensor]], drop: int, group: Any) -> list[torch.Tensor]:
    """Mark all but the ``drop`` lowest of all ranks' scores together, as one process would of all of them.

    Among equal scores the first are dropped: by tensor, then by rank, then by place, which is their order in the whole tensors if ranks
    hold consecutive rows. The threshold is found digit by digit, as in a radix sort, from four histograms of 256 counts.

    Args:
        scores: each returns this rank's flat float32 scores of a tensor; called a few times, must return the same each time.
        drop: from 0 to the number of scores of all ranks.
        group: the ranks. Collective.

    Returns:
        For each, a boolean tensor of this rank's scores, ``True`` for what is kept.

    Raises:
        InvalidArgumentError: a score of any rank is NaN.
    """
    prefix, left = _threshold(scores, drop, group)
    if prefix is None:
        return [torch.zeros_like(one(), dtype=torch.bool) for one in scores]
    equal = torch.stack([(_keys(one()) == prefix).sum() for one in scores])
    every = [torch.empty_like(equal) for _ in range(dist.get_world_size(group))]
    dist.all_gather(every, equal, group=group)
    counts, rank = torch.stack(every), dist.get_rank(group)  # (ranks, tensors)
    before = counts.sum(0).cumsum(0) - counts.sum(0) + counts[:rank].sum(0)
    marks = []
    for one, mine, first in zip(scores, equal.tolist(), before.tolist(), strict=True):
        keys = _keys(one())
        keep = keys > prefix
        if mine:
            places = (keys == prefix).nonzero()[:, 0]
            keep[places[max(0, min(mine, left - first)) :]] = True
        marks.append(keep)
    return marks


def _threshold(scores: Sequence[Callable[[], torch.Tensor]], drop: int, group: Any) -> tuple[int | None, int]:
    """Key of the ``drop``-th lowest score, and how many of those equal to it are dropped; no key if all are dropped."""
    prefix, left = 0, drop
    for place in reversed(range(0, 32, DIGIT)):
        counts: Any = 0
        for one in scores:
            part = one()
            keys = _keys(part)
            inside = keys[(keys >> (place + DIGIT)) == prefix]
            bins = torch.bincount((inside >> place) & (_BINS - 1), minlength=_BINS)
            counts = counts + torch.cat([bins, part.isnan().sum()[None]])
        counts = total(counts, group)
        if int(counts[-1]):
            raise InvalidArgumentError(
                "Argument `criterion` must give numbers, but got NaN. Has the training diverged?"
            )
        reached = counts[:-1].cumsum(0)
        if place == 32 - DIGIT and drop >= int(reached[-1]):
            return None, 0
        digit = int((reached < max(left, 1)).sum())
        left -= int(reached[digit] - counts[digit])
        prefix = (prefix << DIGIT) | digit
    return prefix, left


def _keys(scores: torch.Tensor) -> torch.Tensor:
    """Integers from 0 to 2^32 - 1 in the order of float32 numbers."""
    bits = (scores.float() + 0.0).contiguous().view(torch.int32).to(torch.int64)  # -0.0 equals 0.0
    return torch.where(bits < 0, -1 - (bits & 0x7FFFFFFF), bits) + (1 << 31)
