"""Intervals of proportions."""

import math

from lightning_accel.errors import InvalidArgumentError

Z95 = 1.959963984540054  # normal quantile of 97.5 %


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % `Wilson score interval <https://doi.org/10.1080/01621459.1927.10502953>`_ of a proportion.

    Unlike the normal approximation it stays within [0, 1] and holds near 0 and 1, where accuracies are.

    Args:
        correct: number of successes.
        total: number of trials.

    Raises:
        InvalidArgumentError: ``total`` below 1, or ``correct`` outside 0 to ``total``.

    Example:
        >>> low, high = wilson_interval(970, 1000)
        >>> f"{low:.4f} {high:.4f}"
        '0.9575 0.9789'
    """
    if total < 1:
        raise InvalidArgumentError(f"Argument `total` must be at least 1, but got {total}.")
    if not 0 <= correct <= total:
        raise InvalidArgumentError(f"Argument `correct` must be from 0 to {total}, but got {correct}.")
    share, z2 = correct / total, Z95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (0.0 if correct == 0 else center - half), (1.0 if correct == total else center + half)
