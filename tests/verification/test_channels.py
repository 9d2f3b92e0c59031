"""Errors of single channels are seen, and only those: faults of several kinds, and right networks with noise of several kinds."""

import numpy as np
import pytest

from lightning_accel import verify
from lightning_accel.verification.channels import AxisErrors, judge_channels
from lightning_accel.verification.tolerances import EMULATED_INT8, FLOAT, FP16, KERNEL_INT8

SAMPLES = 64


def feeds(samples=SAMPLES):
    return {"x": np.arange(samples, dtype=np.float32)[:, None]}


def detections(samples=SAMPLES, classes=12, anchors=30):
    """Boxes in pixels, and scores of which few are high: each class is in one of eight samples, class 0 in one alone."""
    rng = np.random.default_rng(1)
    boxes = rng.uniform(0, 640, (samples, 4, anchors))
    scores = rng.uniform(0, 0.02, (samples, classes, anchors))
    for c in range(1, classes):
        for sample in range(c % 8, samples, 8):
            scores[sample, c, rng.integers(anchors)] = rng.uniform(0.7, 0.99)
    scores[3, 0, 2] = 0.9
    return np.concatenate([boxes, scores], 1)


def run(values, change=None, noise=0.0, seed=0):
    """A network that returns these values, with noise relative to each channel's spread, and a fault."""
    own = (
        np.random.default_rng(seed).normal(size=values.shape)
        * noise
        * np.ptp(values, axis=(0, *range(2, values.ndim)), keepdims=True)
    )
    wrong = values + own
    if change is not None:
        wrong = change(wrong.copy())
    return lambda f: {"y": wrong[f["x"][:, 0].astype(int)]}


def compared(values, other, tolerance, noise=0.0):
    """A comparison held against the null divergence of seven runs with noise."""
    result = verify(run(values), other, feeds(len(values)), batch_sizes=(1, 7, 64), tolerance=tolerance)
    nulls = {
        f"noise {s}": verify(run(values), run(values, noise=noise, seed=s + 1), feeds(len(values)), batch_sizes=(32,))
        for s in range(7)
    }
    return result, result.against(nulls)


def put(index, value):
    def change(y):
        y[index] = value(y[index]) if callable(value) else value
        return y

    return change


ALL = slice(None)
FAULTS = {
    "all scores zero": (put((ALL, slice(4, None)), 0.0), "axis 1"),
    "one class zero": (put((ALL, 7), 0.0), "channel 7 of output y, axis 1"),
    "a class that one sample has, zero": (put((ALL, 4), 0.0), "channel 4 of output y, axis 1"),
    "two classes swapped": (lambda y: y[:, [*range(6), 7, 6, *range(8, 16)]], "of output y, axis 1"),
    "one sample's scores zero": (put((5, slice(4, None)), 0.0), "of output y, axis 1"),
    "one box coordinate": (put((ALL, 2), lambda v: v * 0.5), "channel 2 of output y, axis 1"),
    "one class not a number": (put((ALL, 9), np.nan), "channel 9 of output y, axis 1"),
}


@pytest.mark.parametrize(
    "tolerance", [FLOAT, FP16, EMULATED_INT8, KERNEL_INT8], ids=["fp32", "fp16", "emulated", "int8"]
)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_scores_beside_boxes_is_found_and_named(fault, tolerance):
    change, place = FAULTS[fault]
    values = detections()
    noise = tolerance.median / 2
    first, judged = compared(values, run(values, change, noise), tolerance, noise)
    assert any(place in line for line in first.failures), first.failures
    assert any(place in line for line in judged.failures), judged.failures
    right = compared(values, run(values, None, noise, seed=99), tolerance, noise)[1]
    assert right.passed, right.failures


def test_a_channel_is_found_below_the_noise_of_the_others():
    """Noise in one channel is no excuse for another."""
    values = detections()
    values[:, 4:] += np.random.default_rng(2).uniform(0, 0.5, values[:, 4:].shape)

    def loud(y, seed):
        y[:, 5] += np.random.default_rng(seed).normal(size=y[:, 5].shape) * 0.3
        return y

    nulls = {
        str(s): verify(
            run(values), run(values, lambda y, s=s: loud(y, s)), feeds(), batch_sizes=(64,), tolerance=EMULATED_INT8
        )
        for s in range(7)
    }
    right = verify(run(values), run(values, lambda y: loud(y, 50)), feeds(), batch_sizes=(64,), tolerance=EMULATED_INT8)
    assert right.against(nulls).passed
    faint = verify(
        run(values),
        run(values, lambda y: put((ALL, 8), lambda v: v * 0.9)(loud(y, 50))),
        feeds(),
        batch_sizes=(64,),
        tolerance=EMULATED_INT8,
    ).against(nulls)
    assert [line for line in faint.failures if "channel 8 of output y, axis 1" in line]
    assert not [line for line in faint.failures if "channel 5" in line]


@pytest.mark.parametrize("step", [0, 5])
@pytest.mark.parametrize("tolerance", [FLOAT, KERNEL_INT8], ids=["fp32", "int8"])
def test_one_time_step_is_named(step, tolerance):
    values = np.random.default_rng(0).normal(size=(SAMPLES, 6, 8))
    found = compared(
        values,
        run(values, lambda y: np.concatenate([y[:, :step], y[::-1, step : step + 1], y[:, step + 1 :]], 1)),
        tolerance,
    )[1]
    assert any(f"channel {step} of output y, axis 1" in line for line in found.failures)


def test_the_wrong_one_of_several_outputs_is_named():
    values = np.random.default_rng(0).normal(size=(SAMPLES, 3, 20, 20))
    small = np.random.default_rng(1).normal(size=SAMPLES)

    def network(change):
        return lambda f: {"map": values[f["x"][:, 0].astype(int)], "angle": change(small[f["x"][:, 0].astype(int)])}

    found = verify(network(lambda v: v), network(lambda v: -v), feeds(), batch_sizes=(64,), tolerance=KERNEL_INT8)
    assert (found.median_error, found.p99_error) == (0.0, 0.0)  # one value in 1,201
    assert [line for line in found.failures if line.startswith("channel 0 of output angle")]
    assert not [line for line in found.failures if "output map" in line]
    assert found.outputs["map"]["maximum"] == 0.0
    assert found.outputs["angle"]["maximum"] > 0.1


def test_a_constant_channel_is_held_against_the_narrow_ones():
    values = detections()
    values[:, 6] = 0.0
    assert compared(values, run(values), FP16)[1].passed
    found = compared(values, run(values, put((ALL, 6), 0.4)), FP16)[1]
    assert any("channel 6 of output y, axis 1" in line for line in found.failures)
    alone = np.ones((SAMPLES, 4))
    assert compared(alone, run(alone), FLOAT)[1].passed
    assert not compared(alone, run(alone, put((ALL, 1), 2.0)), FLOAT)[1].passed


@pytest.mark.parametrize("samples", [1, 2, 3, 8])
def test_few_samples_give_no_false_alarm(samples):
    """Among 1,000 channels some hardly vary between two samples."""
    for seed in range(20):
        values = np.random.default_rng(seed).normal(size=(samples, 1000))
        noisy = values + np.random.default_rng(seed + 100).normal(size=values.shape) * 1e-3
        found = verify(run(values), run(noisy), feeds(samples), batch_sizes=(8,), tolerance=FP16)
        assert not [line for line in found.failures if line.startswith("channel")], found.failures


def noise_of(kind, rng, shape):
    """Differences of right networks: everywhere, in heavy tails, in flips of few samples, and of some samples more than of others."""
    if kind == "normal":
        return rng.normal(size=shape)
    if kind == "heavy tails":
        return rng.lognormal(0.0, 1.0, shape) * rng.choice([-1, 1], shape)
    sample = (slice(None), *([None] * (len(shape) - 1)))
    if kind == "rare flips":
        return rng.normal(size=shape) * (rng.random(shape[0]) < 0.05)[sample]
    return rng.normal(size=shape) * rng.lognormal(0.0, 0.7, shape[0])[sample]


@pytest.mark.parametrize("kind", ["normal", "heavy tails", "rare flips", "uneven samples"])
def test_right_networks_give_no_false_alarm(kind):
    """Stated: a comparison fails by chance once in 2,000 times. 150 comparisons of 100 channels each, null divergence of seven runs."""
    alarms = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        values = rng.normal(size=(SAMPLES, 100))

        def errors(rng=rng, values=values):
            found = AxisErrors(1, 100, SAMPLES)
            found.add(values, np.abs(noise_of(kind, rng, values.shape)) * 0.05, 0)
            return {"y, axis 1": found.result("y", 6.0)}

        alarms += any(
            fault.excess > 1 for fault in judge_channels(errors(), [errors() for _ in range(7)], EMULATED_INT8)
        )
    assert alarms == 0


@pytest.mark.parametrize(
    ("share", "size", "found"), [(1.0, 0.5, True), (0.4, 1.0, True), (1 / 64, 4.0, True), (1.0, 0.05, False)]
)
def test_the_smallest_fault_that_is_seen(share, size, found):
    """In multiples of the channel's spread, with a null divergence of 2 % of it: as docs/verification.md says."""
    rng = np.random.default_rng(0)
    values = rng.uniform(0, 1, (SAMPLES, 20))
    null = [AxisErrors(1, 20, SAMPLES) for _ in range(8)]
    for errors in null:
        errors.add(values, np.abs(rng.normal(size=values.shape)) * 0.02, 0)
    first, *others = ({"y, axis 1": errors.result("y", 1.0)} for errors in null)
    first["y, axis 1"].errors[: round(share * SAMPLES), 3] += size
    (fault,) = judge_channels(first, others, KERNEL_INT8)
    assert (fault.excess > 1) is found
    if found:
        assert fault.channel == "channel 3 of output y, axis 1"


def test_numbers_of_an_axis_against_numpy():
    values = np.random.default_rng(0).normal(size=(40, 5, 7)) * np.arange(1, 6)[None, :, None]
    errors = AxisErrors(1, 5, 40)
    off = np.abs(np.random.default_rng(1).normal(size=values.shape))
    for start in (0, 16, 32):
        errors.add(values[start : start + 16], off[start : start + 16], start)
    errors.add(values[:16], off[:16] * 3, 0)  # the same samples at another batch size
    found = errors.result("y", 10.0)
    expected = off.max(2)
    expected[:16] *= 3
    np.testing.assert_allclose(found.errors, expected, rtol=1e-6)
    np.testing.assert_allclose(found.typical, np.median(expected, 0), rtol=1e-6)
    np.testing.assert_allclose(errors.spread, np.ptp(values, axis=(0, 2)))
    assert found.drawn == 56
    means = np.concatenate([values, values[:16]]).mean((0, 2))
    assert errors.between == pytest.approx(means.var() / np.concatenate([values, values[:16]]).var(), rel=1e-6)
