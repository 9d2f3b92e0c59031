"""What a student learns from a teacher's logits."""

import torch
import torch.nn.functional as F
from torch import Tensor


def soft_target_loss(
    student_logits: Tensor, teacher_logits: Tensor, temperature: float = 4.0, dim: int | None = None
) -> Tensor:
    """Soft-target loss of `Hinton et al. 2015 <https://arxiv.org/abs/1503.02531>`_: ``T² · KL(teacher/T ‖ student/T)``.

    Computed in float32 (or float64, if the logits are) and averaged over positions, whatever the dtype of the logits.

    Args:
        student_logits: ``(N, C)``; with ``dim``, classes may lie in any dimension: ``(N, L, C)``, ``(N, C, H, W)``.
        teacher_logits: same shape.
        temperature: above 0; higher values show more of what the teacher knows about the wrong classes.
        dim: dimension of the classes. ``None`` asks for ``(N, C)``.

    Returns:
        Scalar: the divergence summed over classes, averaged over all other dimensions, times ``temperature²``.

    Raises:
        ValueError: shapes differ, or have more than two dimensions while ``dim`` is None.

    Example:
        >>> soft_target_loss(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]), temperature=1.0)
        tensor(1.5232)
    """
    if student_logits.shape != teacher_logits.shape:
        raise ValueError(
            f"Logits of student and teacher must have the same shape, but got {tuple(student_logits.shape)} and "
            f"{tuple(teacher_logits.shape)}."
        )
    if dim is None:
        if student_logits.ndim != 2:
            raise ValueError(
                f"Argument `dim` must name the dimension of the classes unless logits are (N, C), but got None with shape "
                f"{tuple(student_logits.shape)}. Use `losses=SoftTargetLoss(temperature, dim=...)`."
            )
        dim = 1
    dtype = torch.promote_types(student_logits.dtype, torch.float32)
    student = F.log_softmax(student_logits.to(dtype) / temperature, dim=dim)
    teacher = F.log_softmax(teacher_logits.to(dtype) / temperature, dim=dim)
    positions = student.numel() // student.shape[dim]
    return F.kl_div(student, teacher, reduction="sum", log_target=True) * (temperature**2 / positions)


class SoftTargetLoss:
    """:func:`soft_target_loss` with its settings, as a callable ``(student_logits, teacher_logits) -> loss``.

    Args:
        temperature: above 0. 1 compares the probabilities themselves; 2-10 is usual for classification.
        dim: dimension of the classes; ``None`` asks for logits ``(N, C)``.

    Raises:
        ValueError: ``temperature`` is not above 0.

    Example:
        >>> SoftTargetLoss(temperature=1.0)(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 2.0]]))
        tensor(1.5232)
    """

    def __init__(self, temperature: float = 4.0, dim: int | None = None) -> None:
        if not 0 < temperature < float("inf"):
            raise ValueError(f"Argument `temperature` must be above 0, but got {temperature}.")
        self.temperature = temperature
        self.dim = dim

    def __call__(self, student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
        """The loss of logits ``(N, C)``, a scalar."""
        return soft_target_loss(student_logits, teacher_logits, self.temperature, self.dim)

    def __repr__(self) -> str:
        return f"SoftTargetLoss(temperature={self.temperature}, dim={self.dim})"
