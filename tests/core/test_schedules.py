import itertools
import math

import pytest

from lightning_accel.core.schedules import SCHEDULES, Timeline, check_position, fraction, passed


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


def test_a_position_in_an_epoch_of_unknown_length():
    stream = Timeline(math.inf, math.inf, max_epochs=4)
    assert stream.step("start", 0) == 0
    assert stream.step("start", 3) == math.inf  # its epoch decides
    assert stream.step("start", 0.5) == math.inf  # known once the first epoch is over
    assert Timeline(math.inf, 40).step("start", 0.5) == 20
    for epochs in (1, math.inf):
        with pytest.raises(ValueError, match=r"must be 0 or an epoch \(int\) in a run of unknown length, but got 0.5"):
            Timeline(math.inf, math.inf, max_epochs=epochs).step("start", 0.5)


def test_epochs_of_different_lengths():
    """Epoch 2 began at step 12 and has 8 steps, epoch 3 has 4, all later ones 2."""
    line = Timeline(8, 28, epoch=2, first_step=12, lengths=(8, 4, 2), max_epochs=6)
    assert [line.estimate(epoch) for epoch in (1, 2, 3, 4, 5, 6)] == [6, 12, 20, 24, 26, 28]
    assert [line.epoch_at(step) for step in (6, 12, 16, 20, 22, 24, 25, 28, 30)] == [1, 2, 2.5, 3, 3.5, 4, 4.5, 6, 7]
    assert line.epochs == 6
    assert Timeline(8, 22, 2, 12, (8, 4, 2), 6).epochs == 3.5  # `max_steps` ends it


@pytest.mark.parametrize(
    ("value", "epoch", "step", "wanted"),
    [(2, 1, 99, False), (2, 2, 0, True), (0.5, 9, 9, False), (0.5, 0, 10, True), (None, 0, 10, True)],
)
def test_an_epoch_decides_about_an_int_and_a_step_about_a_share(value, epoch, step, wanted):
    assert passed(value, 10, epoch, step) is wanted
