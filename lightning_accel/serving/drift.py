"""Count rows that are unlike the samples that a bundle was verified on."""

from collections.abc import Mapping, Sequence

import numpy as np


def rows_outside(feeds: Mapping[str, np.ndarray], ranges: Mapping[str, Sequence[float]]) -> dict[str, int]:
    """Rows of each input in which a number lies outside of the range that the bundle was verified on, or is none.

    Without drift, about 2 rows in ``n + 1`` do, for ``n`` samples: the smallest and largest number of what comes are elsewhere.

    Args:
        feeds: inputs by name, each ``(N, ...)``.
        ranges: smallest and largest number by input, of the manifest; inputs that it lacks aren't counted.

    Example:
        >>> rows_outside({"x": np.array([[0.0, 0.5], [0.5, 2.0]])}, {"x": [0.0, 1.0]})
        {'x': 1}
    """
    found = {}
    for name, (low, high) in ranges.items():
        rows = feeds[name].reshape(len(feeds[name]), -1)
        within = (rows.min(axis=1, initial=high) >= low) & (rows.max(axis=1, initial=low) <= high)  # False for NaN
        found[name] = int((~within).sum())
    return found
