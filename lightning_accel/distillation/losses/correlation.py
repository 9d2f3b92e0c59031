"""Losses that are invariant to the scale of logits: DIST, and standardized logits."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accel.distillation.losses.base import (
    Loss,
    as_rows,
    check_classes,
    check_positive,
    check_same_shape,
    in_float32,
)
from lightning_accel.distillation.losses.logits import SoftTargetLoss
from lightning_accel.distillation.losses.signature import wants
from lightning_accel.distillation.scheduled import Number

_EPSILON = 1e-7


def _distance(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """``1 - r`` with Pearson's r along a dimension, averaged over the other one; 1 for constant inputs."""
    a, b = a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True)
    return (1 - F.cosine_similarity(a, b, dim=dim, eps=1e-8)).mean()


@in_float32
def dist_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    temperature: float = 1.0,
    beta: float = 1.0,
    gamma: float = 1.0,
    dim: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """DIST of `Huang et al. 2022 <https://arxiv.org/abs/2205.10536>`_: ``T² · (beta · inter + gamma · intra)``.

    Probabilities are compared by ``1 - r`` with Pearson's correlation r: *inter* along the classes of a position, *intra* along
    the positions of a batch for each class.

    Args:
        student_logits: ``(N, C)``; with ``dim``, classes may lie in any dimension: ``(N, T, C)``, ``(N, C, H, W)``.
        teacher_logits: same shape.
        temperature: above 0.
        beta: weight of the correlation between classes.
        gamma: weight of the correlation within a class.
        dim: dimension of the classes. ``None`` requires ``(N, C)``.
        mask: positions to include.

    Returns:
        Scalar.

    Raises:
        InvalidArgumentError: shapes differ, or ``mask`` doesn't fit.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [0.0, 5.0]])
        >>> abs(dist_loss(student, teacher).item()) < 1e-6  # the same order everywhere, at another scale
        True
    """
    check_same_shape(student_logits, teacher_logits)
    student = F.softmax(as_rows(student_logits, dim, mask, "DISTLoss") / temperature, dim=1)
    teacher = F.softmax(as_rows(teacher_logits, dim, mask, "DISTLoss") / temperature, dim=1)
    inter, intra = _distance(student, teacher, 1), _distance(student, teacher, 0)
    return (beta * inter + gamma * intra) * temperature**2


class DISTLoss(Loss):
    """:func:`dist_loss` with its settings, as a callable.

    Args:
        temperature: above 0.
        beta: weight of the correlation between classes, at least 0.
        gamma: weight of the correlation within a class, at least 0.
        dim: dimension of the classes; ``None`` requires logits ``(N, C)``.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> DISTLoss(temperature=4.0).temperature
        4.0
    """

    outputs = "classes"

    def __init__(
        self, temperature: Number = 1.0, beta: float = 1.0, gamma: float = 1.0, dim: int | None = None
    ) -> None:
        check_positive("temperature", temperature)
        check_positive("beta", beta, zero=True)
        check_positive("gamma", gamma, zero=True)
        self.temperature, self.beta, self.gamma, self.dim = temperature, beta, gamma, dim

    def check(self, logits: Tensor) -> None:
        """Raise if the loss is constant for logits of this shape; the correlation of two classes is 1 or -1."""
        check_classes(logits, self.dim, "DISTLoss", 2 if self.gamma > 0 else 3)
        super().check(logits)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of logits ``(N, C)``, a scalar."""
        settings = (float(self.temperature), self.beta, self.gamma, self.dim, mask)
        return dist_loss(student_logits, teacher_logits, *settings)


def standardize(logits: Tensor, dim: int = 1) -> Tensor:
    """Logits with mean 0 and standard deviation 1 along the classes (https://arxiv.org/abs/2403.01427, algorithm 1).

    Args:
        logits: ``(N, C)``, or any layout with its classes in ``dim``.
        dim: dimension of the classes.

    Returns:
        Same shape, at least float32. The deviation is that of the paper, over C, not C - 1.

    Example:
        >>> standardize(torch.tensor([[1.0, 3.0]]))
        tensor([[-1.,  1.]])
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    centred = logits - logits.mean(dim, keepdim=True)
    # inside of the root, so that constant logits have a gradient of 0, not NaN
    scale = (centred.square().mean(dim, keepdim=True) + _EPSILON**2).sqrt()
    return centred / scale


class StandardizedLoss(Loss):
    """Wrapper that applies a loss to standardized logits (`Sun et al. 2024 <https://arxiv.org/abs/2403.01427>`_).

    The student then learns the teacher's relative logits, not their scale. The inner loss keeps its temperature; the paper uses a
    temperature of 2 and nine times the usual weight.

    Args:
        loss: ``(student_logits, teacher_logits) -> scalar``; ``None`` for ``SoftTargetLoss(temperature=2.0)``.
        dim: dimension of the classes.

    Example:
        >>> student = torch.tensor([[2.0, 0.0, 1.0]])
        >>> abs(StandardizedLoss()(student, 5 * student + 3).item()) < 1e-6
        True
    """

    outputs = "classes"
    needs_all_logits = True

    def __init__(self, loss: Callable[..., Tensor] | None = None, dim: int = 1) -> None:
        self.loss = SoftTargetLoss(2.0, None if dim == 1 else dim) if loss is None else loss
        self.dim = dim
        self.wants = wants(self.loss)  # further arguments of the inner loss

    def check(self, logits: Tensor) -> None:
        """Raise if the loss is constant for logits of this shape: two standardized logits are 1 and -1."""
        check_classes(logits, self.dim, "StandardizedLoss", 3)

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor, **others: Tensor) -> Tensor:
        """The loss of standardized logits, a scalar."""
        self.check(student_logits)
        return self.loss(standardize(student_logits, self.dim), standardize(teacher_logits, self.dim), **others)

    def __repr__(self) -> str:
        return f"StandardizedLoss({self.loss!r}, dim={self.dim})"
