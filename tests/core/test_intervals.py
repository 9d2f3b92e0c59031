import pytest
from scipy.stats import binomtest

from lightning_accel.core.intervals import wilson_interval


@pytest.mark.parametrize(("correct", "total"), [(0, 1), (1, 1), (0, 50), (50, 50), (970, 1000), (1, 7), (9999, 10000)])
def test_wilson_interval_is_scipys(correct, total):
    expected = binomtest(correct, total).proportion_ci(method="wilson")
    assert wilson_interval(correct, total) == pytest.approx((expected.low, expected.high), abs=1e-12)


@pytest.mark.parametrize(("correct", "total", "name"), [(0, 0, "total"), (-1, 5, "correct"), (6, 5, "correct")])
def test_wilson_interval_refuses(correct, total, name):
    with pytest.raises(ValueError, match=f"Argument `{name}` must be"):
        wilson_interval(correct, total)
