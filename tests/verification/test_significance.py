"""What chance allows: against exact probabilities and simulations."""

from fractions import Fraction
from math import comb

import numpy as np
import pytest

from lightning_accel.verification.significance import FALSE_ALARMS, smallest_range, too_many, upper_share


@pytest.mark.parametrize(
    ("measured", "null", "tests"), [(64, 64, 1), (64, 64, 1000), (512, 64, 10), (16, 16, 7), (8, 8, 1)]
)
def test_too_many_is_the_smallest_number_that_is_rare_enough(measured, null, tests):
    def probability(k):  # that all of the k largest of all values are measured ones
        return Fraction(comb(measured, k), comb(measured + null, k))

    k = too_many(measured, null, tests)
    assert probability(k) <= FALSE_ALARMS / tests < probability(k - 1)


def test_few_samples_may_all_exceed_by_chance():
    assert too_many(4, 4) == 5
    assert too_many(8, 8, tests=1000) == 9


@pytest.mark.parametrize("draw", ["normal", "cauchy", "rare"])
def test_false_alarms_are_as_rare_as_stated_whatever_the_distribution(draw):
    rng = np.random.default_rng(0)
    size = (200_000, 24)
    values = {
        "normal": lambda: rng.normal(size=size),
        "cauchy": lambda: rng.standard_cauchy(size),
        "rare": lambda: rng.normal(size=size) * (rng.random(size) < 0.05),
    }[draw]()
    measured, null = np.abs(values[:, :12]), np.abs(values[:, 12:])
    alarms = (measured > null.max(1, keepdims=True)).sum(1) >= too_many(12, 12)
    assert alarms.mean() <= FALSE_ALARMS + 3 * np.sqrt(FALSE_ALARMS / len(values))


@pytest.mark.parametrize("values", [2, 8, 32])
def test_a_few_values_cover_the_stated_share_of_a_range(values):
    drawn = np.random.default_rng(0).random((200_000, values))
    short = np.ptp(drawn, axis=1) < smallest_range(values)
    assert short.mean() <= FALSE_ALARMS * 1.5
    assert smallest_range(1) == 0.0


def test_the_upper_end_of_wilsons_interval():
    z = 3.2905267  # quantile of the normal distribution that 1 in 2,000 exceeds
    center, half = (
        (0.02 + z**2 / 200) / (1 + z**2 / 100),
        z / (1 + z**2 / 100) * np.sqrt(0.02 * 0.98 / 100 + z**2 / 40000),
    )
    assert upper_share(0.02, 100) == pytest.approx(center + half, rel=1e-6)
    assert upper_share(0.02, 100, tests=50) > upper_share(0.02, 100)
    assert upper_share(0.0, 10**9) == pytest.approx(0.0, abs=1e-6)
    assert upper_share(1.5, 10) == 1.0


@pytest.mark.parametrize(("share", "samples"), [(0.06, 1), (0.06, 2), (0.3, 3), (0.01, 40), (0.5, 10)])
def test_an_expected_share_is_hardly_ever_exceeded(share, samples):
    limit = round(upper_share(share, samples) * samples, 9)
    exact = sum(comb(samples, k) * share**k * (1 - share) ** (samples - k) for k in range(samples + 1) if k > limit)
    assert exact <= FALSE_ALARMS
    seen = np.random.default_rng(0).binomial(samples, share, 200_000) / samples
    assert (seen > upper_share(share, samples) + 1e-9).mean() <= FALSE_ALARMS * 1.3
