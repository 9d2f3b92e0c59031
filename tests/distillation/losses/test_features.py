"""Losses of features and tokens against NumPy and SciPy, written from the papers' formulas."""

import itertools

import numpy as np
import pytest
import torch
from scipy.spatial.distance import cosine, pdist
from scipy.special import softmax

from lightning_accel.distillation.losses.features import (
    AttentionTransferLoss,
    HintLoss,
    attention_transfer_loss,
    hint_loss,
)
from lightning_accel.distillation.losses.relations import RKDLoss, SimilarityLoss, relational_loss, similarity_loss
from lightning_accel.distillation.losses.tokens import (
    AttentionLoss,
    CosineLoss,
    HiddenStateLoss,
    MiniLMLoss,
    attention_loss,
    cosine_loss,
    hidden_state_loss,
    relation_loss,
)


def pair(shape, other=None):
    rng = np.random.default_rng(0)
    return rng.standard_normal(shape), rng.standard_normal(other or shape)


def value(loss, *arrays, **kwargs):
    return loss(*(torch.from_numpy(array) for array in arrays), **kwargs).item()


def huber(a, b):
    error = np.abs(a - b)
    return np.where(error <= 1, error**2 / 2, error - 0.5).mean()


def test_hint_equals_the_formula():
    student, teacher = pair((3, 4, 5, 5))
    np.testing.assert_allclose(value(HintLoss(), student, teacher), ((student - teacher) ** 2).mean(), rtol=1e-12)


def test_larger_maps_are_pooled_to_the_smaller():
    student, teacher = pair((3, 4, 8, 8), (3, 4, 4, 4))
    pooled = student.reshape(3, 4, 4, 2, 4, 2).mean((3, 5))
    np.testing.assert_allclose(value(hint_loss, student, teacher), ((pooled - teacher) ** 2).mean(), rtol=1e-12)
    np.testing.assert_allclose(value(hint_loss, teacher, student), ((pooled - teacher) ** 2).mean(), rtol=1e-12)


@pytest.mark.parametrize("power", [1.0, 2.0, 4.0])
def test_attention_transfer_equals_the_formula(power):
    student, teacher = pair((3, 4, 5, 5), (3, 7, 5, 5))
    maps = [(np.abs(a) ** power).sum(1).reshape(3, -1) for a in (student, teacher)]
    maps = [m / np.linalg.norm(m, axis=1, keepdims=True) for m in maps]
    expected = ((maps[0] - maps[1]) ** 2).mean()
    np.testing.assert_allclose(value(AttentionTransferLoss(power), student, teacher), expected, rtol=1e-12)


def test_similarity_equals_the_formula():
    student, teacher = pair((5, 4, 3), (5, 9))
    grams = []
    for features in (student.reshape(5, -1), teacher):
        gram = features @ features.T
        grams.append(gram / np.linalg.norm(gram, axis=1, keepdims=True))
    expected = np.linalg.norm(grams[1] - grams[0], "fro") ** 2 / 5**2
    np.testing.assert_allclose(value(SimilarityLoss(), student, teacher), expected, rtol=1e-12)


def test_relational_distances_and_angles_equal_the_formula():
    student, teacher = pair((5, 4), (5, 6))
    distances = [pdist(f) / pdist(f).mean() for f in (student, teacher)]
    angles = [
        np.array([1 - cosine(f[i] - f[j], f[k] - f[j]) for i, j, k in itertools.permutations(range(5), 3)])
        for f in (student, teacher)
    ]
    distance, angle = huber(*distances), huber(*angles)
    np.testing.assert_allclose(value(RKDLoss(1.0, 0.0), student, teacher), distance, rtol=1e-9)
    np.testing.assert_allclose(value(RKDLoss(0.0, 1.0), student, teacher), angle, rtol=1e-9)
    np.testing.assert_allclose(value(RKDLoss(25.0, 50.0), student, teacher), 25 * distance + 50 * angle, rtol=1e-9)


LENGTHS = (5, 2)
MASK = torch.tensor([[t < length for t in range(5)] for length in LENGTHS])


def test_hidden_states_and_directions_equal_the_formula():
    student, teacher = pair((2, 5, 6))
    kept = [np.concatenate([a[n, :length] for n, length in enumerate(LENGTHS)]) for a in (student, teacher)]
    expected = ((kept[0] - kept[1]) ** 2).mean()
    np.testing.assert_allclose(value(HiddenStateLoss(), student, teacher, mask=MASK), expected, rtol=1e-12)
    whole = ((student - teacher) ** 2).mean()
    np.testing.assert_allclose(value(HiddenStateLoss(), student, teacher), whole, rtol=1e-12)
    expected = np.mean([cosine(a, b) for a, b in zip(*kept, strict=True)])
    np.testing.assert_allclose(value(CosineLoss(), student, teacher, mask=MASK), expected, rtol=1e-12)


def test_attention_equals_the_formula():
    student, teacher = pair((2, 3, 5, 5))
    errors = [((student - teacher)[n, :, :length, :length] ** 2).ravel() for n, length in enumerate(LENGTHS)]
    expected = np.concatenate(errors).mean()
    np.testing.assert_allclose(value(AttentionLoss(), student, teacher, mask=MASK), expected, rtol=1e-12)
    np.testing.assert_allclose(value(AttentionLoss(), student, teacher), ((student - teacher) ** 2).mean(), rtol=1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_relations_of_tokens_equal_the_formula(masked):
    student, teacher = pair((2, 5, 8), (2, 5, 12))
    divergences = []
    for n, length in enumerate(LENGTHS if masked else (5, 5)):
        for head in range(4):
            relations = []
            for values in (student, teacher):
                width = values.shape[-1] // 4
                part = values[n, :length, head * width : (head + 1) * width]
                relations.append(softmax(part @ part.T / np.sqrt(width), axis=1))
            q, p = relations
            divergences.append((p * np.log(p / q)).sum(1))
    loss = value(MiniLMLoss(heads=4), student, teacher, mask=MASK if masked else None)
    np.testing.assert_allclose(loss, np.concatenate(divergences).mean(), rtol=1e-9)


ALL = [
    (HintLoss(), (4, 3, 4, 4)),
    (AttentionTransferLoss(), (4, 3, 4, 4)),
    (SimilarityLoss(), (4, 6)),
    (RKDLoss(), (4, 6)),
    (HiddenStateLoss(), (4, 5, 6)),
    (CosineLoss(), (4, 5, 6)),
    (AttentionLoss(), (4, 2, 5, 5)),
    (MiniLMLoss(heads=2), (4, 5, 6)),
]


@pytest.mark.parametrize(("loss", "shape"), ALL, ids=lambda x: type(x).__name__ if callable(x) else None)
def test_precision_and_extremes(loss, shape):
    student, teacher = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        result = loss(student, teacher)
    assert result.dtype == torch.float32
    assert result == loss(student.float(), teacher.float())
    for scale in (0.0, 1e-6, 1e4):
        student = (torch.randn(shape) * scale).requires_grad_()
        result = loss(student, teacher)
        result.backward()
        assert result.isfinite()
        assert student.grad.isfinite().all(), scale


def test_errors():
    flat, maps, tokens = torch.zeros(2, 3), torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 6)
    for student, teacher in ((flat, maps), (torch.zeros(2, 5, 6), torch.zeros(2, 5, 7))):
        with pytest.raises(ValueError, match=r"shapes that can be aligned, but got .* Choose layers of the same kind"):
            hint_loss(student, teacher)
    with pytest.raises(ValueError, match=r"same shape, but got \(2, 3\) and \(2, 4\)"):
        hint_loss(flat, torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"Features must be maps \(N, C, H, W\) .* Choose convolutional layers"):
        attention_transfer_loss(flat, maps)
    with pytest.raises(ValueError, match=r"Argument `power` must be above 0, but got 0\."):
        AttentionTransferLoss(0)
    with pytest.raises(ValueError, match=r"same samples, at least 1 of them, but got 2 of the student and 3"):
        similarity_loss(flat, torch.zeros(3, 3))
    with pytest.raises(ValueError, match=r"same samples, at least 3 of them, but got 2 of the student and 2"):
        relational_loss(flat, flat)
    for arguments in ({"distance_weight": -1}, {"angle_weight": -1}):
        with pytest.raises(ValueError, match="must be 0 or above, but got -1"):
            RKDLoss(**arguments)
    for function in (hidden_state_loss, cosine_loss, attention_loss):
        with pytest.raises(ValueError, match="must have the same shape"):
            function(tokens, torch.zeros(2, 5, 7))
    with pytest.raises(ValueError, match=r"Argument `mask` must be \(N, T\) = \(2, 5\)"):
        attention_loss(torch.zeros(2, 1, 5, 5), torch.zeros(2, 1, 5, 5), mask=torch.ones(2, 4))
    for mask in (torch.zeros(2, 5),):
        for function, values in ((attention_loss, torch.zeros(2, 1, 5, 5)), (hidden_state_loss, tokens)):
            with pytest.raises(ValueError, match="Argument `mask` must leave a position"):
                function(values, values, mask=mask)
    with pytest.raises(ValueError, match=r"Argument `heads` must divide the width .* but got 4 for \(2, 5, 6\) of the"):
        relation_loss(tokens, tokens, heads=4)
    with pytest.raises(ValueError, match="Features must belong to the same tokens"):
        relation_loss(tokens, torch.zeros(2, 4, 6), heads=2)
    with pytest.raises(ValueError, match="Argument `heads` must be an integer of at least 1, but got 0"):
        MiniLMLoss(0)
