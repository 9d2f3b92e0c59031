"""Losses between logits: soft targets, hard labels, and differences of the logits."""

import torch.nn.functional as F
from torch import Tensor

from lightning_accel.distillation.losses.base import (
    Loss,
    as_rows,
    check_positive,
    check_same_shape,
    in_float32,
    positions,
)
from lightning_accel.distillation.scheduled import Number
from lightning_accel.errors import InvalidArgumentError


@in_float32
def soft_target_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 4.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Soft-target loss of `Hinton et al. 2015 <https://arxiv.org/abs/1503.02531>`_: ``T² · KL(teacher/T ‖ student/T)``.

    Computed in float32 (or float64, if the logits are) and averaged over positions, whatever the dtype of the logits.

    Args:
        student_logits: ``(N, C)``; with ``dim``, classes may lie in any dimension: ``(N, T, C)``, ``(N, C, H, W)``.
        teacher_logits: same shape.
        temperature: above 0; higher values emphasize the teacher's probabilities of wrong classes.
        dim: dimension of the classes. ``None`` requires ``(N, C)``.
        mask: positions to include, e.g. ``(N, T)`` with 0 at padding.

    Returns:
        Scalar: the divergence summed over classes, averaged over all other dimensions, times ``temperature²``.

    Raises:
        InvalidArgumentError: shapes differ, or have more than two dimensions while ``dim`` is None, there is one logit alone, or ``mask``
            doesn't fit.

    Example:
        >>> soft_target_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=1.0)
        tensor(1.5232)
    """
    check_same_shape(student_logits, teacher_logits)
    student = F.log_softmax(as_rows(student_logits, dim, mask) / temperature, dim=1)
    teacher = F.log_softmax(as_rows(teacher_logits, dim, mask) / temperature, dim=1)
    return F.kl_div(student, teacher, reduction="batchmean", log_target=True) * temperature**2


class SoftTargetLoss(Loss):
    """:func:`soft_target_loss` with its settings, as a callable ``(student_logits, teacher_logits) -> loss``.

    Args:
        temperature: above 0. 1 compares the probabilities themselves; 2-10 is usual for classification.
        dim: dimension of the classes; ``None`` requires logits ``(N, C)``.

    Raises:
        InvalidArgumentError: ``temperature`` is not above 0.

    Example:
        >>> SoftTargetLoss(temperature=1.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.5232)
    """

    outputs = "classes"

    def __init__(self, temperature: Number = 4.0, dim: int | None = None) -> None:
        check_positive("temperature", temperature)
        self.temperature = temperature
        self.dim = dim

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits ``(N, C)``, a scalar."""
        return soft_target_loss(student_logits, teacher_logits, float(self.temperature), self.dim, mask)


@in_float32
def hard_label_loss(
    student_logits: Tensor, teacher_logits: Tensor, dim: int | None = None, mask: Tensor | None = None
) -> Tensor:
    """Cross-entropy with the teacher's predicted class (https://arxiv.org/abs/2012.12877, section 4).

    Args:
        student_logits: ``(N, C)``; with ``dim``, classes may lie in any dimension.
        teacher_logits: same shape.
        dim: dimension of the classes. ``None`` requires ``(N, C)``.
        mask: positions to include.

    Returns:
        Scalar, averaged over positions.

    Raises:
        InvalidArgumentError: as :func:`soft_target_loss`.

    Example:
        >>> hard_label_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        tensor(0.6931)
    """
    check_same_shape(student_logits, teacher_logits)
    labels = as_rows(teacher_logits, dim, mask, "HardLabelLoss").argmax(1)
    return F.cross_entropy(as_rows(student_logits, dim, mask, "HardLabelLoss"), labels)


class HardLabelLoss(Loss):
    """:func:`hard_label_loss` as a callable; it has no temperature.

    Args:
        dim: dimension of the classes; ``None`` requires logits ``(N, C)``.

    Example:
        >>> HardLabelLoss()(torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 2.0]]))
        tensor(0.6931)
    """

    outputs = "classes"

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits ``(N, C)``, a scalar."""
        return hard_label_loss(student_logits, teacher_logits, self.dim, mask)


@in_float32
def multi_label_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    mask: Tensor | None = None,
) -> Tensor:
    """Binary soft targets for multi-label classification: ``T² · KL`` of ``sigmoid(logits / T)``, label by label.

    Args:
        student_logits: ``(N, L)`` or ``(..., L)``.
        teacher_logits: same shape.
        temperature: above 0.
        mask: ``(...)``, positions to include.

    Returns:
        Scalar, averaged over labels and positions.

    Raises:
        InvalidArgumentError: shapes differ, or ``mask`` doesn't fit.

    Example:
        >>> multi_label_loss(torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
        tensor(0.1639)
    """
    check_same_shape(student_logits, teacher_logits)
    student = positions(student_logits, mask) / temperature
    teacher = positions(teacher_logits, mask) / temperature
    yes = teacher.sigmoid() * (F.logsigmoid(teacher) - F.logsigmoid(student))
    no = (-teacher).sigmoid() * (F.logsigmoid(-teacher) - F.logsigmoid(-student))
    return (yes + no).mean() * temperature**2


class MultiLabelLoss(Loss):
    """:func:`multi_label_loss` with its settings, as a callable.

    Args:
        temperature: above 0.

    Raises:
        InvalidArgumentError: ``temperature`` is not above 0.

    Example:
        >>> MultiLabelLoss()(torch.tensor([[0.0, 2.0]]), torch.tensor([[2.0, 2.0]]))
        tensor(0.1639)
    """

    outputs = "labels"
    needs_all_logits = True

    def __init__(self, temperature: Number = 1.0) -> None:
        check_positive("temperature", temperature)
        self.temperature = temperature

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits ``(N, L)``, a scalar."""
        return multi_label_loss(student_logits, teacher_logits, float(self.temperature), mask)


@in_float32
def regression_loss(student: Tensor, teacher: Tensor, beta: float = 0.0, mask: Tensor | None = None) -> Tensor:
    """Squared error, or Huber loss, between outputs: for regression, and for logits (https://arxiv.org/abs/1312.6184).

    Args:
        student: any shape.
        teacher: same shape.
        beta: 0 for the squared error ``d²``; above 0, ``d² / 2`` up to ``|d| = beta`` and ``beta · (|d| - beta / 2)``
            beyond it, which limits the effect of large errors of the teacher.
        mask: the leading dimensions of that shape; 0 excludes elements.

    Returns:
        Scalar, averaged over all included elements.

    Raises:
        InvalidArgumentError: shapes differ, or ``mask`` doesn't fit.

    Example:
        >>> regression_loss(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        tensor(5.)
    """
    check_same_shape(student, teacher, "Outputs")
    if mask is not None:
        if mask.shape != student.shape[: mask.ndim]:
            raise InvalidArgumentError(
                f"Argument `mask` must have the first dimensions of the outputs, {tuple(student.shape)}, but got "
                f"{tuple(mask.shape)}."
            )
        student, teacher = student[mask != 0], teacher[mask != 0]
        if not student.numel():
            raise InvalidArgumentError(
                "Argument `mask` must leave a position, but got one that leaves none in a batch."
            )
    return F.mse_loss(student, teacher) if beta == 0 else F.huber_loss(student, teacher, delta=beta)


class LogitMSELoss(Loss):
    """Squared error of the logits themselves (https://arxiv.org/abs/1312.6184), which have no temperature.

    Example:
        >>> LogitMSELoss()(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(5.)
    """

    needs_all_logits = True

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits of any shape, a scalar."""
        return regression_loss(student_logits, teacher_logits, 0.0, mask)


class RegressionLoss(Loss):
    """:func:`regression_loss` with its settings, for outputs that aren't logits.

    Args:
        beta: error beyond which the loss is linear; 0 for a squared error throughout.

    Raises:
        InvalidArgumentError: ``beta`` is negative.

    Example:
        >>> RegressionLoss(beta=1.0)(torch.tensor([1.0, 3.0]), torch.tensor([0.0, 0.0]))
        tensor(1.5000)
    """

    needs_all_logits = True

    def __init__(self, beta: float = 0.0) -> None:
        check_positive("beta", beta, zero=True)
        self.beta = beta

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of outputs of any shape, a scalar."""
        return regression_loss(student, teacher, self.beta, mask)
