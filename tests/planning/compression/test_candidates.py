"""What fits budgets, in points and with intervals."""

import math

import pytest

from lightning_accel import Budgets
from lightning_accel.export.quality import Change
from lightning_accel.planning.compression.candidates import Candidate, front, points


def candidate(drop=0.3, p50=1.0, size=1000, half=0.2, engine="onnxruntime"):
    ends = (None, None) if drop is None else (drop - half, drop + half)
    return Candidate(engine, "model.onnx", size, p50, 0.9 * p50, 2.0, 1.9, 2.1, "accuracy", drop, *ends)


def test_what_fits_misses_nothing():
    assert candidate().misses(Budgets(0.3, 1.0, 1000)) == {}
    assert candidate().excess(Budgets(0.3, 1.0, 1000)) == pytest.approx(1.0)


def test_each_limit_is_told_with_its_number():
    missed = candidate(0.6, 2.0, 3000).misses(Budgets(0.5, 1.0, 1000))
    assert missed["max_latency_ms"] == "2.000 ms, more than 1"
    assert missed["max_bytes"] == "3,000 bytes, more than 1,000"
    assert "0.60 [0.40, 0.80] points of accuracy, more than 0.5 (within the interval" in missed["max_drop"]
    assert "interval:" not in candidate(0.8).misses(Budgets(0.5, 9))["max_drop"]
    assert candidate(0.6, 2.0, 3000).excess(Budgets(0.5, 1.0, 1000)) == 3.0


def test_a_network_of_unknown_quality_never_fits():
    assert "max_drop" in candidate(None).misses(Budgets(100, 9))
    assert candidate(None).excess(Budgets(100, 9)) == math.inf


@pytest.mark.parametrize(
    ("change", "before", "lower", "expected"),
    [
        (Change("accuracy", -0.005, -0.008, -0.002), None, False, (0.5, 0.2, 0.8)),
        (Change("val_f1", -0.01, -0.02, 0.0), 0.9, False, (1.0, 0.0, 2.0)),
        (Change("val_mae", -0.5, -1.0, 0.0), 10.0, True, (5.0, 0.0, 10.0)),  # percent of an error of 10
        (Change("val_mae", 0.01, 0.0, 0.02), 0.1, True, (-10.0, -20.0, 0.0)),  # a small error is no share
        (Change("reward", -5.0, -6.0, -4.0), 50.0, False, (10.0, 8.0, 12.0)),
    ],
)
def test_points_are_percentage_points_of_shares_and_percent_of_the_rest(change, before, lower, expected):
    assert points(change, before, lower) == pytest.approx(expected)


def test_the_front_holds_what_nothing_beats():
    known = [("slow", candidate(0.0, 3.0)), ("fast", candidate(1.0, 1.0)), ("bad", candidate(1.5, 2.0))]
    assert front([*known, ("unknown", candidate(None))]) == ["fast", "slow"]
