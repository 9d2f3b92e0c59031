"""Losses of logits against NumPy and SciPy, written from the papers' formulas."""

import numpy as np
import pytest
import torch
from scipy.special import expit, log_softmax, softmax

from lightning_accel.distillation.losses.correlation import DISTLoss, StandardizedLoss, dist_loss, standardize
from lightning_accel.distillation.losses.decoupled import DKDLoss, decoupled_loss
from lightning_accel.distillation.losses.logits import (
    HardLabelLoss,
    LogitMSELoss,
    MultiLabelLoss,
    RegressionLoss,
    SoftTargetLoss,
    hard_label_loss,
    multi_label_loss,
    regression_loss,
    soft_target_loss,
)

POSITIONS, CLASSES = 7, 10


def logits(*shape, seed=0):
    rng = np.random.default_rng(seed)
    shape = shape or (POSITIONS, CLASSES)
    return 3 * rng.standard_normal(shape), 3 * rng.standard_normal(shape)


def tensors(*shape, seed=0):
    return tuple(torch.from_numpy(array) for array in logits(*shape, seed=seed))


def kl(p, q):
    return (p * np.log(p / q)).sum(axis=-1)


def soft_target(student, teacher, temperature):
    """Hinton et al. 2015, in float64: mean over rows of T² · sum p log(p / q)."""
    return temperature**2 * kl(softmax(teacher / temperature, axis=-1), softmax(student / temperature, axis=-1)).mean()


def dkd(student, teacher, target, temperature, alpha, beta):
    """Zhao et al. 2022, eq. 7: alpha · KL(b_T ‖ b_S) + beta · KL(p̂_T ‖ p̂_S), row by row."""
    total = 0.0
    for s, t, c in zip(student / temperature, teacher / temperature, target, strict=True):
        ps, pt = softmax(s), softmax(t)
        others = np.arange(len(s)) != c
        tckd = kl(np.array([pt[c], pt[others].sum()]), np.array([ps[c], ps[others].sum()]))
        nckd = kl(pt[others] / pt[others].sum(), ps[others] / ps[others].sum())
        total += alpha * tckd + beta * nckd
    return temperature**2 * total / len(student)


def dist(student, teacher, temperature, beta, gamma):
    """Huang et al. 2022, eqs. 8-10, with NumPy's own correlation."""
    s, t = softmax(student / temperature, axis=1), softmax(teacher / temperature, axis=1)
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s, t, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(s.T, t.T, strict=True)])
    return temperature**2 * (beta * inter + gamma * intra)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_soft_targets_equal_the_formula(temperature):
    loss = soft_target_loss(*tensors(), temperature)
    np.testing.assert_allclose(loss.item(), soft_target(*logits(), temperature), rtol=1e-12)


@pytest.mark.parametrize(("temperature", "alpha", "beta"), [(1.0, 1.0, 1.0), (4.0, 1.0, 8.0), (2.0, 0.0, 3.0)])
def test_dkd_equals_the_formula(temperature, alpha, beta):
    target = np.arange(POSITIONS) % CLASSES
    loss = DKDLoss(temperature, alpha, beta)(*tensors(), torch.from_numpy(target))
    np.testing.assert_allclose(loss.item(), dkd(*logits(), target, temperature, alpha, beta), rtol=1e-10)


def test_dkd_with_the_paper_s_reformulation_is_kd():
    """Eq. 6: with alpha = 1 and beta = 1 - p_T(target), sample by sample, the sum is the soft-target loss."""
    student, teacher = tensors(1, CLASSES)
    beta = 1 - softmax(teacher.numpy() / 4, axis=1)[0, 3]
    loss = decoupled_loss(student, teacher, torch.tensor([3]), 4.0, alpha=1.0, beta=beta)
    torch.testing.assert_close(loss, soft_target_loss(student, teacher, 4.0), rtol=1e-10, atol=0)


@pytest.mark.parametrize(("temperature", "beta", "gamma"), [(1.0, 1.0, 1.0), (4.0, 2.0, 0.5)])
def test_dist_equals_the_formula(temperature, beta, gamma):
    loss = DISTLoss(temperature, beta, gamma)(*tensors())
    np.testing.assert_allclose(loss.item(), dist(*logits(), temperature, beta, gamma), rtol=1e-8)


def test_standardization_equals_the_formula_under_any_loss():
    student, teacher = logits()
    z = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in (student, teacher)]
    loss = StandardizedLoss(SoftTargetLoss(2.0))(*tensors())
    np.testing.assert_allclose(loss.item(), soft_target(*z, 2.0), rtol=1e-10)
    np.testing.assert_allclose(StandardizedLoss()(*tensors()).item(), loss.item(), rtol=1e-12)
    target = np.arange(POSITIONS)
    loss = StandardizedLoss(DKDLoss(2.0))(*tensors(), target=torch.from_numpy(target))
    np.testing.assert_allclose(loss.item(), dkd(*z, target, 2.0, 1.0, 8.0), rtol=1e-8)
    loss = StandardizedLoss(dim=-1)(*tensors(2, 3, CLASSES))
    rows = [x.reshape(6, CLASSES) for x in logits(2, 3, CLASSES)]
    z = [(x - x.mean(1, keepdims=True)) / x.std(1, keepdims=True) for x in rows]
    np.testing.assert_allclose(loss.item(), soft_target(*z, 2.0), rtol=1e-10)


def test_standardized_logits_of_a_constant_row_have_a_gradient():
    constant = torch.full((1, 4), 3.0, requires_grad=True)
    standardize(constant).square().sum().backward()
    assert constant.grad.isfinite().all()


def test_hard_labels_equal_the_formula():
    student, teacher = logits()
    expected = -log_softmax(student, axis=1)[np.arange(POSITIONS), teacher.argmax(1)].mean()
    np.testing.assert_allclose(HardLabelLoss()(*tensors()).item(), expected, rtol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_multi_label_equals_the_formula(temperature):
    student, teacher = logits()
    q, p = expit(student / temperature), expit(teacher / temperature)
    expected = temperature**2 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    np.testing.assert_allclose(MultiLabelLoss(temperature)(*tensors()).item(), expected, rtol=1e-9)


def test_regression_equals_the_formula():
    student, teacher = logits()
    error = np.abs(student - teacher)
    np.testing.assert_allclose(LogitMSELoss()(*tensors()).item(), (error**2).mean(), rtol=1e-12)
    huber = np.where(error <= 0.7, error**2 / 2, 0.7 * (error - 0.35)).mean()
    np.testing.assert_allclose(RegressionLoss(0.7)(*tensors()).item(), huber, rtol=1e-12)
    mask = np.arange(POSITIONS) < 3
    masked = regression_loss(*tensors(), mask=torch.from_numpy(mask))
    np.testing.assert_allclose(masked.item(), (error[mask] ** 2).mean(), rtol=1e-12)


def test_gradient_at_high_temperature_is_that_of_matching_logits():
    """Section 2.1 of the paper: for large T and zero-mean logits, the gradient tends to (student - teacher) / (N · C)."""
    student = torch.randn(5, 4, dtype=torch.float64)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    soft_target_loss(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 20, rtol=1e-3, atol=1e-5)


# --- layouts, precision, extremes: the same for all of them

TARGET = torch.arange(24) % 3
ALL = {
    "kd": lambda dim: SoftTargetLoss(2.0, dim),
    "dist": lambda dim: DISTLoss(2.0, dim=dim),
    "hard": HardLabelLoss,
    "dkd": lambda dim: lambda s, t, mask=None: DKDLoss(2.0, dim=dim)(s, t, TARGET[: s.numel() // 3], mask),
    "standardized": lambda dim: StandardizedLoss(SoftTargetLoss(2.0, dim), 1 if dim is None else dim),
}


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(("shape", "dim"), [((4, 6, 3), -1), ((2, 3, 3, 4), 1)])
def test_other_layouts_are_rows(name, shape, dim):
    student, teacher = torch.randn(shape), torch.randn(shape)
    rows = [x.movedim(dim, -1).reshape(-1, 3) for x in (student, teacher)]
    torch.testing.assert_close(ALL[name](dim)(student, teacher), ALL[name](None)(*rows))


@pytest.mark.parametrize("name", ALL)
def test_masked_positions_do_not_count(name):
    student, teacher = torch.randn(4, 6, 3), torch.randn(4, 6, 3)
    mask = torch.zeros(4, 6, dtype=torch.long)
    mask[:, :4] = 1
    loss = ALL[name](-1)(student, teacher, mask=mask)
    student[:, 4:] = 1e4
    torch.testing.assert_close(ALL[name](-1)(student, teacher, mask=mask), loss)
    assert not torch.equal(ALL[name](-1)(student, teacher), loss)
    if name != "dkd":  # which has a target of its own for each
        torch.testing.assert_close(ALL[name](-1)(student[:, :4], teacher[:, :4]), loss)


def test_ignored_targets_do_not_count():
    student, teacher = torch.randn(4, 3), torch.randn(4, 3)
    loss = DKDLoss()(student, teacher, torch.tensor([0, -100, 2, -100]))
    torch.testing.assert_close(loss, DKDLoss()(student[::2], teacher[::2], torch.tensor([0, 2])))
    assert DKDLoss(ignore_index=255)(student, teacher, torch.tensor([0, 255, 2, 255])) == loss


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", [*ALL, "multilabel", "mse"])
def test_half_precision_logits_are_computed_in_float32(name, dtype):
    losses = {**ALL, "multilabel": lambda _: MultiLabelLoss(), "mse": lambda _: LogitMSELoss()}
    student, teacher = torch.randn(6, 3).to(dtype), torch.randn(6, 3).to(dtype)
    with torch.autocast("cpu", dtype):
        loss = losses[name](None)(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == losses[name](None)(student.float(), teacher.float())


@pytest.mark.parametrize("name", [*ALL, "multilabel", "mse"])
def test_gradients_are_finite_with_extreme_logits(name):
    losses = {**ALL, "multilabel": lambda _: MultiLabelLoss(), "mse": lambda _: LogitMSELoss()}
    student = torch.tensor([[3e4, -3e4, 0.0], [0.0, 0.0, 0.0], [-3e4, 3e4, 3e4]], requires_grad=True)
    teacher = torch.tensor([[-3e4, 3e4, 0.0], [3e4, 0.0, -3e4], [0.0, 0.0, 0.0]])
    loss = losses[name](None)(student, teacher)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()


def test_errors():
    with pytest.raises(ValueError, match=r"Argument `temperature` must be above 0, but got -1\."):
        SoftTargetLoss(-1)
    for loss in (DKDLoss, DISTLoss, MultiLabelLoss):
        with pytest.raises(ValueError, match=r"Argument `temperature` must be above 0, but got nan\."):
            loss(float("nan"))
    for arguments in ({"alpha": -1}, {"beta": -1}):
        with pytest.raises(ValueError, match="must be 0 or above, but got -1"):
            DKDLoss(**arguments)
    for arguments in ({"beta": -1}, {"gamma": -1}):
        with pytest.raises(ValueError, match="must be 0 or above, but got -1"):
            DISTLoss(**arguments)
    with pytest.raises(ValueError, match=r"Argument `beta` must be 0 or above, but got -0.5\."):
        RegressionLoss(-0.5)
    for function in (soft_target_loss, dist_loss, hard_label_loss, multi_label_loss, regression_loss):
        with pytest.raises(ValueError, match=r"same shape, but got \(2, 3\) and \(2, 4\)\."):
            function(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"Argument `dim` must name .* \(N, C\), but got None with shape \(2, 3, 4\)"):
        soft_target_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
    with pytest.raises(ValueError, match=r"Argument `dim` must be a dimension of the logits \(2, 3\), but got 2"):
        soft_target_loss(torch.zeros(2, 3), torch.zeros(2, 3), dim=2)
    cube = torch.zeros(2, 3, 4)
    with pytest.raises(ValueError, match=r"Argument `mask` must have an element for each position, \(2, 3\), but got"):
        SoftTargetLoss(dim=-1)(cube, cube, mask=torch.ones(2, 4))
    with pytest.raises(ValueError, match="Argument `mask` must leave a position"):
        SoftTargetLoss(dim=-1)(cube, cube, mask=torch.zeros(2, 3))
    with pytest.raises(ValueError, match=r"Argument `mask` must have the first dimensions of the outputs"):
        LogitMSELoss()(cube, cube, mask=torch.ones(3))
    with pytest.raises(ValueError, match="Argument `mask` must leave a position"):
        LogitMSELoss()(cube, cube, mask=torch.zeros(2))
    pair = torch.zeros(2, 3)
    for target in (torch.zeros(3, dtype=torch.long), torch.zeros(2)):
        with pytest.raises(ValueError, match="Argument `target` must be an integer class for each of 2 positions"):
            DKDLoss()(pair, pair, target)
    with pytest.raises(ValueError, match="Argument `target` must leave a position"):
        DKDLoss()(pair, pair, torch.tensor([-100, -100]))


def test_repr_shows_settings():
    assert repr(SoftTargetLoss(2.0)) == "SoftTargetLoss(temperature=2.0, dim=None)"
    assert repr(StandardizedLoss()) == "StandardizedLoss(SoftTargetLoss(temperature=2.0, dim=None), dim=1)"


# --- outputs for which a loss would be constant


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize(
    ("shape", "dim"), [((8, 1), None), ((8,), None), ((8,), -1), ((2, 1, 4, 4), 1), ((2, 5, 1), -1)]
)
def test_one_logit_is_refused_with_what_to_use(name, shape, dim):
    """A softmax over one logit is 1: the loss would be 0, or constant, and its gradient 0."""
    values = torch.randn(shape)
    with pytest.raises(
        ValueError, match=r"Logits must have at least \d classes for .*\(.*1|8.*multilabel.*binary.*regression"
    ):
        ALL[name](dim)(values, values + 1)


@pytest.mark.parametrize(
    ("loss", "least"),
    [
        (SoftTargetLoss(), 2),
        (DKDLoss(), 2),
        (DKDLoss(alpha=0), 3),
        (DISTLoss(), 2),
        (DISTLoss(gamma=0), 3),
        (StandardizedLoss(), 3),
    ],
)
def test_no_loss_is_constant_for_the_fewest_classes_that_it_takes(loss, least):
    """The correlation of two classes is 1 or -1, two standardized logits are 1 and -1, and beside the target there is one class."""
    student, teacher = torch.randn(6, least, requires_grad=True), torch.randn(6, least)
    target = {"target": torch.arange(6) % least} if isinstance(loss, DKDLoss) else {}
    loss.check(student)
    loss(student, teacher, **target).backward()
    assert student.grad.abs().max() > 1e-3
    with pytest.raises(ValueError, match=f"at least {least} classes"):
        loss.check(student[:, : least - 1])


def test_a_binary_logit_has_its_bernoulli_divergence():
    """What the message names: T² KL of Bernoulli distributions, from SciPy's sigmoid."""
    student, teacher = logits(9, 1)
    p, q = expit(teacher / 4), expit(student / 4)
    expected = 16 * (p * np.log(p / q) + (1 - p) * np.log((1 - p) / (1 - q))).mean()
    np.testing.assert_allclose(MultiLabelLoss(4.0)(*tensors(9, 1)).item(), expected, rtol=1e-9)
