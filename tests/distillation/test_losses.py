import numpy as np
import pytest
import torch
from scipy.special import softmax

from lightning_accel.distillation.losses import SoftTargetLoss, soft_target_loss


def _reference(student, teacher, temperature):
    """Hinton et al. 2015 by hand, in float64: mean over rows of T² · sum p log(p / q)."""
    p, q = softmax(teacher / temperature, axis=-1), softmax(student / temperature, axis=-1)
    return temperature**2 * (p * np.log(p / q)).sum(axis=-1).mean()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0, 20.0])
def test_equals_the_formula(temperature):
    rng = np.random.default_rng(0)
    student, teacher = 3 * rng.standard_normal((7, 10)), 3 * rng.standard_normal((7, 10))
    loss = soft_target_loss(torch.from_numpy(student), torch.from_numpy(teacher), temperature)
    np.testing.assert_allclose(loss.item(), _reference(student, teacher, temperature), rtol=1e-12)


def test_gradient_at_high_temperature_is_that_of_matching_logits():
    """Section 2.1 of the paper: for large T and zero-mean logits, the gradient tends to (student - teacher) / (N · C)."""
    student = torch.randn(5, 4, dtype=torch.float64)
    teacher = torch.randn(5, 4, dtype=torch.float64)
    student, teacher = student - student.mean(1, keepdim=True), teacher - teacher.mean(1, keepdim=True)
    student.requires_grad_()
    soft_target_loss(student, teacher, 1e4).backward()
    torch.testing.assert_close(student.grad, (student - teacher).detach() / 20, rtol=1e-3, atol=1e-5)


def test_half_precision_logits_are_computed_in_float32():
    student, teacher = torch.randn(6, 5).bfloat16(), torch.randn(6, 5).bfloat16()
    loss = soft_target_loss(student, teacher)
    assert loss.dtype == torch.float32
    assert loss == soft_target_loss(student.float(), teacher.float())


@pytest.mark.parametrize(("shape", "dim"), [((2, 5, 3), -1), ((2, 3, 4, 5), 1)])
def test_other_layouts_average_over_positions(shape, dim):
    student, teacher = torch.randn(shape), torch.randn(shape)
    rows = [logits.movedim(dim, -1).reshape(-1, 3) for logits in (student, teacher)]
    torch.testing.assert_close(SoftTargetLoss(2.0, dim=dim)(student, teacher), soft_target_loss(*rows, 2.0))


def test_errors():
    with pytest.raises(ValueError, match=r"Argument `temperature` must be above 0, but got -1\."):
        SoftTargetLoss(-1)
    with pytest.raises(ValueError, match=r"same shape, but got \(2, 3\) and \(2, 4\)\."):
        soft_target_loss(torch.zeros(2, 3), torch.zeros(2, 4))
    with pytest.raises(ValueError, match=r"Argument `dim` must name .* \(N, C\), but got None with shape \(2, 3, 4\)"):
        soft_target_loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))
