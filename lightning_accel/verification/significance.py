"""The statistics of verification: how much may differ by chance.

Two correct implementations of a network differ in rare samples by more than in others. A limit on few samples and many channels therefore
needs to account for both. Everything here is distribution-free or an exact bound, and docs/verification.md has the rates.
"""

import math
from functools import cache
from statistics import NormalDist

FALSE_ALARMS = 5e-4  # of a comparison, over all its channels or classes: 1 in 2,000


@cache
def upper_share(share: float, samples: int, tests: int = 1) -> float:
    """Largest share that is still compatible with an expected one, when counted on few samples.

    The upper end of `Wilson's interval <https://doi.org/10.1080/01621459.1927.10502953>`_, or, where that is too narrow because of very
    few samples, the quantile of the binomial distribution.

    Args:
        share: expected share, in [0, 1]; larger ones are taken as 1.
        samples: independent samples it is counted on.
        tests: number of shares that are compared (Bonferroni).

    Example:
        >>> upper_share(0.05, 1), round(upper_share(0.05, 100), 2)
        (1.0, 0.18)
    """
    if share >= 1.0:
        return 1.0
    quantile = NormalDist().inv_cdf(1.0 - FALSE_ALARMS / tests)
    z = quantile**2 / samples
    half = quantile * math.sqrt(share * (1.0 - share) / samples + z / (4 * samples))
    wilson = (share + z / 2 + half) / (1 + z)
    return max(wilson, _binomial_quantile(share, samples, FALSE_ALARMS / tests) / samples)


def _binomial_quantile(share: float, samples: int, probability: float) -> int:
    """Smallest number that a binomial variable exceeds with at most this probability."""
    if share <= 0.0:
        return 0
    left, term = 1.0, math.exp(samples * math.log1p(-share))
    for k in range(samples):
        left -= term
        if left <= probability:
            return k
        term *= (samples - k) / (k + 1) * share / (1.0 - share)
    return samples


@cache
def too_many(measured: int, null: int, tests: int = 1) -> int:
    """How many samples must exceed the largest of the null divergence to be no chance.

    If measured and null values have one distribution, each order of all of them is equally likely. The ``k`` largest of ``measured + null``
    values are all measured ones with the probability of drawing ``k`` without replacement, whatever the distribution is.

    Args:
        measured: number of measured values.
        null: number of values of the null divergence, from different samples.
        tests: number of channels that are compared (Bonferroni).

    Returns:
        The smallest such number; ``measured + 1`` if even all of them may exceed it by chance.

    Example:
        >>> too_many(64, 64), too_many(64, 64, tests=1000), too_many(4, 4)
        (11, 19, 5)
    """
    probability = 1.0
    for k in range(measured):
        probability *= (measured - k) / (measured + null - k)
        if probability <= FALSE_ALARMS / tests:
            return k + 1
    return measured + 1


def smallest_range(values: int, channels: int = 1) -> float:
    """Share of a channel's true range that a few of its values cover at least.

    The range of two values may be tiny by chance. Of ``n`` values spread evenly, less than a share ``r`` of their range is covered with
    probability below ``n * r**(n - 1)``.

    Args:
        values: number of values seen.
        channels: number of channels of which this must hold (Bonferroni).

    Example:
        >>> [round(smallest_range(n), 2) for n in (1, 2, 8, 32, 1000)]
        [0.0, 0.0, 0.25, 0.7, 0.99]
    """
    if values < 2:
        return 0.0
    return float((FALSE_ALARMS / (values * channels)) ** (1.0 / (values - 1)))
