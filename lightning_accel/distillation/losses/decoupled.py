"""Decoupled knowledge distillation: separate weights for the target class and the other classes."""

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
from lightning_accel.distillation.scheduled import Number
from lightning_accel.errors import InvalidArgumentError


@in_float32
def decoupled_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    temperature: float = 4.0,
    alpha: float = 1.0,
    beta: float = 8.0,
    dim: int | None = None,
    mask: Tensor | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """DKD of `Zhao et al. 2022 <https://arxiv.org/abs/2203.08679>`_: ``T² · (alpha · TCKD + beta · NCKD)``.

    TCKD is the divergence between target class and all others as two events, NCKD the divergence among the others.

    Args:
        student_logits: ``(N, C)``; with ``dim``, classes may lie in any dimension: ``(N, T, C)``, ``(N, C, H, W)``.
        teacher_logits: same shape.
        target: integer class of each position, ``(N,)``, ``(N, T)``, ``(N, H, W)``: the ground truth.
        temperature: above 0.
        alpha: weight of the target class.
        beta: weight of the other classes; 1 to 10 in the paper, higher for more confident teachers.
        dim: dimension of the classes. ``None`` requires ``(N, C)``.
        mask: positions to include.
        ignore_index: target of positions to exclude.

    Returns:
        Scalar, averaged over positions.

    Raises:
        InvalidArgumentError: shapes differ, ``target`` or ``mask`` doesn't fit, or no position is left.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
        >>> decoupled_loss(student, teacher, torch.tensor([0]), temperature=1.0, beta=1.0)
        tensor(1.1920)
    """
    check_same_shape(student_logits, teacher_logits)
    student = as_rows(student_logits, dim, what="DKDLoss")
    teacher = as_rows(teacher_logits, dim, what="DKDLoss")
    if target.is_floating_point() or target.numel() != len(student):
        raise InvalidArgumentError(
            f"Argument `target` must be an integer class for each of {len(student)} positions, but got {target.dtype} of "
            f"shape {tuple(target.shape)}. Say where labels are: `DistillationModule(..., target=lambda batch: ...)`."
        )
    counts = target.reshape(-1) != ignore_index
    if mask is not None:
        counts &= mask.reshape(-1).to(counts.device) != 0
    if mask is not None or not bool(counts.all()):
        student, teacher, target = student[counts], teacher[counts], target.reshape(-1)[counts]
    if not len(student):
        raise InvalidArgumentError(
            "Argument `target` must leave a position, but got a batch in which all are ignored or masked."
        )
    target = target.reshape(-1, 1).long()
    tckd, nckd = _parts(student / temperature, teacher / temperature, target)
    return (alpha * tckd + beta * nckd) * temperature**2


def _parts(student: Tensor, teacher: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """TCKD and NCKD of rows ``(P, C)``, from sums of exponentials, since ``log(1 - p)`` is inaccurate where p rounds to 1."""
    others = torch.ones_like(student, dtype=torch.bool).scatter_(1, target, False)
    binary, rest = [], []
    for logits in (student, teacher):
        without = logits[others].reshape(len(logits), -1)  # (P, C - 1)
        pair = torch.cat([logits.gather(1, target), without.logsumexp(1, keepdim=True)], dim=1)
        binary.append(F.log_softmax(pair, dim=1))
        rest.append(F.log_softmax(without, dim=1))
    tckd = F.kl_div(binary[0], binary[1], reduction="batchmean", log_target=True)
    return tckd, F.kl_div(rest[0], rest[1], reduction="batchmean", log_target=True)


class DKDLoss(Loss):
    """:func:`decoupled_loss` with its settings, as a callable ``(student_logits, teacher_logits, target) -> loss``.

    A :class:`DistillationModule` passes the target that its ``target`` selects from the batch.

    Args:
        temperature: above 0.
        alpha: weight of the target class, at least 0.
        beta: weight of the other classes, at least 0.
        dim: dimension of the classes; ``None`` requires logits ``(N, C)``.
        ignore_index: target of positions to exclude.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> student, teacher = torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 2.0, 1.0]])
        >>> DKDLoss(temperature=1.0, beta=1.0)(student, teacher, torch.tensor([0]))
        tensor(1.1920)
    """

    outputs = "classes"

    def __init__(
        self,
        temperature: Number = 4.0,
        alpha: float = 1.0,
        beta: float = 8.0,
        dim: int | None = None,
        ignore_index: int = -100,
    ) -> None:
        check_positive("temperature", temperature)
        check_positive("alpha", alpha, zero=True)
        check_positive("beta", beta, zero=True)
        self.temperature, self.alpha, self.beta = temperature, alpha, beta
        self.dim, self.ignore_index = dim, ignore_index

    def check(self, logits: Tensor) -> None:
        """Raise if the loss is constant for logits of this shape; without the target's part, two classes are too few."""
        check_classes(logits, self.dim, "DKDLoss", 2 if self.alpha > 0 else 3)
        super().check(logits)

    def __call__(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, mask: Tensor | None = None
    ) -> Tensor:
        """The loss of logits ``(N, C)`` and classes ``(N,)``, a scalar."""
        settings = (float(self.temperature), self.alpha, self.beta, self.dim, mask, self.ignore_index)
        return decoupled_loss(student_logits, teacher_logits, target, *settings)
