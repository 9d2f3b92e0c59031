"""Choose how many units to keep in each group: the least important ones leave that buy the gain that is needed."""

from collections.abc import Sequence

import numpy as np

_BINS = 1000  # of the gain that is needed


def cheapest(options: Sequence[Sequence[tuple[float, float]]], needed: float) -> list[int] | None:
    """One option of each group, so that the sum of gains reaches what is needed and the sum of costs is smallest.

    The multiple-choice knapsack problem of https://arxiv.org/abs/2110.10811, solved by dynamic programming over the gain in
    thousandths of what is needed, to which gains are rounded.

    Args:
        options: of each group, pairs of gain and cost.
        needed: sum of gains.

    Returns:
        The index of the option of each group; ``None`` if not even all largest gains reach it.

    Example:
        >>> cheapest([[(0, 0), (2, 5)], [(0, 0), (1, 1), (2, 9)]], 3)
        [1, 1]
    """
    if needed <= 0:
        return [min(range(len(of)), key=lambda i: (of[i][1], i)) for of in options]
    costs = np.full(_BINS + 1, np.inf)  # least cost of each gain so far, in bins; the last one is "enough"
    costs[0] = 0.0
    chosen: list[np.ndarray] = []
    origin: list[np.ndarray] = []
    places = np.arange(_BINS + 1)
    for of in options:
        best = np.full(_BINS + 1, np.inf)
        which = np.full(_BINS + 1, -1)
        came = np.zeros(_BINS + 1, dtype=int)
        for index, (gain, cost) in enumerate(of):
            step = round(gain / needed * _BINS)
            to = np.clip(places + step, 0, _BINS)
            value = costs + cost
            for place in np.flatnonzero(np.isfinite(value)).tolist():
                if value[place] < best[to[place]]:
                    best[to[place]], which[to[place]], came[to[place]] = value[place], index, place
        costs = best
        chosen.append(which)
        origin.append(came)
    if not np.isfinite(costs[_BINS]):
        return None
    place, found = _BINS, []
    for which, came in zip(reversed(chosen), reversed(origin), strict=True):
        found.append(int(which[place]))
        place = int(came[place])
    return found[::-1]
