"""What an output holds is told from its values and name: predictions are compared only where there are logits."""

import numpy as np
import pytest

from lightning_accel import verify
from lightning_accel.verification.outputs import EMBEDDING, INTEGERS, LOGITS, MIXED, VALUES, OutputErrors
from lightning_accel.verification.tolerances import KERNEL_INT8

RNG = np.random.default_rng(0)


def softmax(x, axis):
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def embedding(*shape):
    x = RNG.normal(size=shape)
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def detector(classes):
    return np.concatenate([RNG.uniform(0, 640, (16, 4, 30)), RNG.uniform(0, 1, (16, classes, 30))], 1)


BIASED = RNG.normal(size=(16, 6, 9)) + np.arange(9) * 3
CASES = {
    "logits": ("logits", RNG.normal(size=(16, 10)), LOGITS, 1),
    "two classes": ("output", RNG.normal(size=(16, 2)), LOGITS, 1),
    "probabilities of tokens": ("probs", softmax(RNG.normal(size=(16, 7, 5)), 2), LOGITS, 2),
    "probabilities of pixels": ("probs", softmax(RNG.normal(size=(16, 3, 8, 8)), 1), LOGITS, 1),
    "token logits": ("logits", BIASED, LOGITS, 2),
    "logits of frames, classes first": ("logits", BIASED.transpose(0, 2, 1), LOGITS, 1),
    "a map of logits": ("out", RNG.normal(size=(16, 5, 8, 8)), LOGITS, 1),
    "a detector": ("output0", detector(3), MIXED, 1),
    "a detector with one class": ("output0", detector(1), MIXED, 1),
    "a detector with 80 classes": ("output0", detector(80), MIXED, 1),
    "a detector, boxes last": ("output0", detector(80).transpose(0, 2, 1), MIXED, 2),
    "boxes": ("pred_boxes", RNG.uniform(0, 1, (16, 20, 4)), VALUES, 2),
    "an embedding": ("output", embedding(16, 64), EMBEDDING, 1),
    "features": ("last_hidden_state", RNG.normal(size=(16, 5, 8)), VALUES, 2),
    "one value": ("angle", RNG.normal(size=16), VALUES, None),
    "a column": ("price", RNG.normal(size=(16, 1)), VALUES, None),
    "classes": ("classes", RNG.integers(0, 5, 16), INTEGERS, None),
    "a mask": ("mask", RNG.random((16, 4)) > 0.5, INTEGERS, None),
}


@pytest.mark.parametrize("case", CASES)
def test_kinds(case):
    name, values, kind, axis = CASES[case]
    found = OutputErrors(name, 16)
    for start in (0, 8):
        found.add(values[start : start + 8], values[start : start + 8], start)
    assert found.kind == kind
    assert found.summary()["kind"] == kind
    if kind in (LOGITS, MIXED, EMBEDDING):
        assert found.class_axis == axis
    assert (found.predictions(1e-3) is not None) is (kind == LOGITS)


def test_predictions_are_compared_in_every_output_that_has_some_and_in_no_other():
    values = {
        "a": RNG.normal(size=(40, 4)),
        "boxes": RNG.normal(size=(40, 6, 4)),
        "tokens": softmax(BIASED[:1].repeat(40, 0), 2),
    }

    def network(**changed):
        return lambda feeds: {**values, **changed}

    samples = {"x": np.zeros((40, 1), np.float32)}
    near = values["tokens"].copy()
    best = np.sort(near, 2)
    near[:, 3] = np.where(near[:, 3] == best[:, 3, -1:], best[:, 3, -2:-1], near[:, 3])  # the first two are equal now
    found = verify(
        network(),
        network(tokens=softmax(np.roll(BIASED[:1].repeat(40, 0), 1, 2), 2)),
        samples,
        batch_sizes=(40,),
        tolerance=KERNEL_INT8,
    )
    assert set(found.predictions) == {"a", "tokens"}
    assert found.predictions["a"].agreement == 1.0
    assert found.agreement == found.predictions["tokens"].agreement < 0.1
    assert any(line.startswith("predictions of output tokens agree on") for line in found.failures)
    assert not any("predictions of output a" in line for line in found.failures)
    values_only = verify(
        network(), network(a=-values["a"]), samples, batch_sizes=(40,), tolerance=KERNEL_INT8, check_agreement=False
    )
    assert not any("predictions" in line for line in values_only.failures)


def test_axes_that_vary_hold_no_channels():
    found = OutputErrors("y", 4)
    found.add(RNG.normal(size=(4, 6, 3)), RNG.normal(size=(4, 6, 3)), 0)
    found.add(RNG.normal(size=(4, 3, 3)), RNG.normal(size=(4, 3, 3)), 0)
    assert found.varying == {1}
    assert found.class_axis is None or found.class_axis == 2
