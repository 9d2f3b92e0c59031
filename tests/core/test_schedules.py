import itertools
import math

import pytest

from lightning_accel.core.schedules import SCHEDULES, Timeline, check_position, fraction


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_schedules_run_from_zero_to_one_and_never_back(schedule):
    values = [fraction(schedule, t / 100) for t in range(-5, 106)]
    assert values[:5] == [0.0] * 5
    assert values[-6:] == [1.0] * 6
    assert all(a <= b for a, b in itertools.pairwise(values))


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        ("constant", 1.0),
        ("linear", 0.25),
        ("cubic", 1 - 0.75**3),
        ("cosine", 0.5 - math.sqrt(2) / 4),
        ("exponential", (1 - math.exp(-1.25)) / (1 - math.exp(-5))),
    ],
)
def test_a_quarter_of_the_way(schedule, expected):
    assert fraction(schedule, 0.25) == pytest.approx(expected, abs=1e-12)


def test_an_unknown_schedule_is_named():
    with pytest.raises(ValueError, match=r"Argument `schedule` must be one of .*, but got 'step'"):
        fraction("step", 0.5)


@pytest.mark.parametrize(("value", "step"), [(0, 0), (3, 30), (0.5, 50), (1.0, 100), (10, 100), (0.0, 0)])
def test_an_int_counts_epochs_and_a_float_is_a_share(value, step):
    assert Timeline(10, 100).step("start", value) == step


def test_a_position_beyond_the_run_is_refused():
    with pytest.raises(ValueError, match=r"Argument `end` must lie within the run, but got 11"):
        Timeline(10, 100).step("end", 11)


def test_a_share_of_an_endless_run_is_refused():
    with pytest.raises(ValueError, match="Set `max_steps`"):
        Timeline(10, math.inf).step("end", 0.5)


@pytest.mark.parametrize("value", [-1, 1.5, -0.1, True, "8"])
def test_positions_are_checked(value):
    with pytest.raises(ValueError, match="Argument `start` must be"):
        check_position("start", value)


def test_progress_of_a_phase():
    assert [Timeline.progress(s, 10, 20) for s in (9, 10, 15, 20, 99)] == [-1.0, 0.0, 0.5, 1.0, 1.0]
    assert Timeline.progress(10, 10, 10) == 1.0
