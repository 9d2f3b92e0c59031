"""Which elements are positive or of a class: rare ones count as much as frequent ones."""

import numpy as np
import pytest

from lightning_accel import verify
from lightning_accel.verification.memberships import Classes, Positives
from lightning_accel.verification.tolerances import EMULATED_INT8, FLOAT, KERNEL_INT8

SAMPLES = {"x": np.arange(64, dtype=np.float32)[:, None]}
BATCHES = (64,)


def network(**outputs):
    return lambda feeds: {name: array[feeds["x"][:, 0].astype(int)] for name, array in outputs.items()}


def masks():
    """Objects of a few pixels: 99 % of all are background."""
    rng = np.random.default_rng(0)
    mask = np.zeros((64, 20, 20), bool)
    mask[np.arange(64)[:, None], rng.integers(0, 20, (64, 4)), rng.integers(0, 20, (64, 4))] = True
    return mask


def maps():
    """Class maps in which class 3 covers half a percent."""
    rng = np.random.default_rng(0)
    classes = rng.integers(0, 3, (64, 20, 20))
    classes[np.arange(64)[:, None], rng.integers(0, 20, (64, 2)), rng.integers(0, 20, (64, 2))] = 3
    return classes


def logits():
    return np.random.default_rng(1).normal(size=(64, 5)).astype(np.float32)


@pytest.mark.parametrize("tolerance", [FLOAT, EMULATED_INT8, KERNEL_INT8], ids=["fp32", "emulated", "int8"])
@pytest.mark.parametrize(
    ("fault", "named"),
    [
        (lambda m, c: (~m, c), "of output mask"),
        (lambda m, c: (m & False, c), "the value True of output mask"),
        (lambda m, c: (np.roll(m, 1, 2), c), "the value True of output mask"),
        (lambda m, c: (m, np.where(c == 3, 0, c)), "the value 3 of output map"),
        (lambda m, c: (m, np.where(c == 3, 2, np.where(c == 2, 3, c))), "of output map"),
    ],
    ids=["inverted", "empty", "moved by a pixel", "a class lost", "classes swapped"],
)
def test_a_fault_in_masks_and_class_maps_is_found_and_named(fault, named, tolerance):
    mask, classes, scores = masks(), maps(), logits()
    right = network(mask=mask, map=classes, logits=scores)
    wrong_mask, wrong_classes = fault(mask, classes)
    nulls = {str(i): verify(right, right, SAMPLES, batch_sizes=BATCHES) for i in range(3)}
    found = verify(
        right,
        network(mask=wrong_mask, map=wrong_classes, logits=scores),
        SAMPLES,
        batch_sizes=BATCHES,
        tolerance=tolerance,
    )
    for result in (found, found.against(nulls)):
        assert any(named in line for line in result.failures), result.failures
    assert verify(right, right, SAMPLES, batch_sizes=BATCHES, tolerance=tolerance).against(nulls).passed


def test_a_class_that_the_network_itself_is_unsure_of_may_differ_as_much():
    rng = np.random.default_rng(0)
    classes = maps()

    def unsure(seed):
        other = classes.copy()
        turned = (classes == 2) & (np.random.default_rng(seed).random(classes.shape) < 0.1)
        other[turned] = 1
        return network(map=other)

    right = network(map=classes)
    nulls = {str(i): verify(right, unsure(i), SAMPLES, batch_sizes=BATCHES) for i in range(4)}
    found = verify(right, unsure(9), SAMPLES, batch_sizes=BATCHES, tolerance=EMULATED_INT8)
    assert not found.passed
    assert found.against(nulls).passed
    lost = np.where((classes == 3) & (rng.random(classes.shape) < 0.5), 0, classes)
    failures = (
        verify(right, network(map=lost), SAMPLES, batch_sizes=BATCHES, tolerance=EMULATED_INT8).against(nulls).failures
    )
    assert any("the value 3 of output map" in line for line in failures)


def detections():
    """Scores ``(64, 6, 40)`` of which 6 in 2,560 are above 0.5 in each class, beside boxes in pixels."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 0.3, (64, 6, 40))
    for c in range(6):
        scores[rng.choice(64, 30, replace=False), c, rng.integers(0, 40, 30)] = rng.uniform(0.52, 0.53, 30)
    return np.concatenate([rng.uniform(0, 640, (64, 4, 40)), scores], 1)


def test_scores_that_no_longer_cross_the_threshold_are_found():
    """As far from the right scores as noise is, but always downwards: hits are lost."""
    values = detections()

    def noisy(seed):
        y = values.copy()
        y[:, 4:] += np.random.default_rng(seed).uniform(-0.03, 0.03, y[:, 4:].shape)
        return y

    right = network(y=values)
    nulls = {str(i): verify(right, network(y=noisy(i)), SAMPLES, batch_sizes=BATCHES) for i in range(7)}
    assert (
        verify(right, network(y=noisy(50)), SAMPLES, batch_sizes=BATCHES, tolerance=KERNEL_INT8).against(nulls).passed
    )
    lost = noisy(50)
    lost[:, 7] = np.where(values[:, 7] > 0.5, 0.495, lost[:, 7])
    failures = (
        verify(right, network(y=lost), SAMPLES, batch_sizes=BATCHES, tolerance=KERNEL_INT8).against(nulls).failures
    )
    assert len(failures) == 1, failures
    assert "a score above 0.5 in channel 7 of output y, axis 1" in failures[0]


def test_a_class_of_a_single_sample_may_be_lost_where_samples_are_at_times():
    """One prediction in twenty turns; of 25 classes, most have one or two samples."""
    rng = np.random.default_rng(0)
    top = rng.integers(0, 25, 64)

    def turned(seed):
        rng = np.random.default_rng(seed)
        return network(top=np.where(rng.random(64) < 0.05, rng.integers(0, 25, 64), top))

    right = network(top=top)
    for seed in range(0, 400, 8):
        nulls = {str(i): verify(right, turned(seed + 1 + i), SAMPLES, batch_sizes=BATCHES) for i in range(7)}
        found = verify(right, turned(seed), SAMPLES, batch_sizes=BATCHES, tolerance=EMULATED_INT8).against(nulls)
        assert found.passed, found.failures


def test_counts_against_sets():
    rng = np.random.default_rng(0)
    a, b = rng.random((30, 4, 5)), rng.random((30, 4, 5))
    positives = Positives(1, 4, 0.5)
    for start in (0, 16):
        positives.add(a[start : start + 16], b[start : start + 16])
    found = positives.result("y", np.array([1, 3]))
    for i, channel in enumerate((1, 3)):
        one, two = (
            {tuple(x) for x in np.argwhere(a[:, channel] > 0.5)},
            {tuple(x) for x in np.argwhere(b[:, channel] > 0.5)},
        )
        assert found.shares[i] == pytest.approx(len(one & two) / len(one | two))
        assert found.samples[i] == len({sample for sample, _ in one | two})
    classes = Classes()
    x, y = rng.integers(0, 3, (30, 6)), rng.integers(0, 3, (30, 6))
    classes.add(x[:20], y[:20])
    classes.add(x[20:], y[20:])
    sets = classes.result("y")
    assert sets.names == tuple(f"the value {v} of output y" for v in range(3))
    np.testing.assert_allclose(
        sets.shares, [((x == v) & (y == v)).sum() / ((x == v) | (y == v)).sum() for v in range(3)]
    )


def test_tokens_and_counts_are_no_classes():
    many = Classes()
    many.add(np.arange(1000), np.arange(1000))
    assert many.result("ids") is None
    assert Classes().result("none") is None
