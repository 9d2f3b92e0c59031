"""Losses between features of student and teacher layers."""

import torch.nn.functional as F
from torch import Tensor

from lightning_accel.distillation.losses.base import Loss, check_positive, check_same_shape, in_float32
from lightning_accel.errors import InvalidArgumentError


def _same_size(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Pool feature maps ``(N, C, H, W)`` to the smaller height and width; other tensors are returned unchanged.

    Raises:
        InvalidArgumentError: dimensions after the channels differ for other tensors.
    """
    if student.ndim != teacher.ndim or (student.ndim != 4 and student.shape[2:] != teacher.shape[2:]):
        raise InvalidArgumentError(
            f"Features of student and teacher must have shapes that can be aligned, but got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Choose layers of the same kind with `student_layer` and `teacher_layer`."
        )
    if student.ndim != 4 or student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    size = min(student.shape[2], teacher.shape[2]), min(student.shape[3], teacher.shape[3])
    return F.adaptive_avg_pool2d(student, size), F.adaptive_avg_pool2d(teacher, size)


@in_float32
def hint_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hint of `FitNets <https://arxiv.org/abs/1412.6550>`_: squared error of features, averaged over all elements.

    Args:
        student: ``(N, C, H, W)``, ``(N, T, D)`` or ``(N, D)``; maps of different size are pooled to the smaller one.
        teacher: as ``student``, with the same number of channels.

    Returns:
        Scalar.

    Raises:
        InvalidArgumentError: shapes that can't be aligned.

    Example:
        >>> hint_loss(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(5.)
    """
    student, teacher = _same_size(student, teacher)
    check_same_shape(student, teacher, "Features")
    return F.mse_loss(student, teacher)


class HintLoss(Loss):
    """:func:`hint_loss` as a callable. If channels differ, a :class:`LossTerm` adds a trained 1x1 layer.

    Example:
        >>> HintLoss()(torch.tensor([[1.0, 3.0]]), torch.tensor([[0.0, 0.0]]))
        tensor(5.)
    """

    layers = "required"

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features, a scalar."""
        return hint_loss(student, teacher)


@in_float32
def attention_transfer_loss(student: Tensor, teacher: Tensor, power: float = 2.0) -> Tensor:
    """Attention transfer of `Zagoruyko & Komodakis 2017 <https://arxiv.org/abs/1612.03928>`_.

    A map is the mean over channels of ``|A|^power``, as a vector of length 1. The loss is the squared error of maps, averaged
    over samples and positions as in the authors' code, with a weight of about 1000.

    Args:
        student: ``(N, C, H, W)``; maps of different size are pooled to the smaller one.
        teacher: ``(N, D, H, W)``; channels may differ.
        power: above 0; higher values emphasize the strongest channels.

    Returns:
        Scalar.

    Raises:
        InvalidArgumentError: features that aren't maps.

    Example:
        >>> a, b = torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]])
        >>> attention_transfer_loss(a, b)
        tensor(1.)
    """
    if student.ndim != 4 or teacher.ndim != 4:
        raise InvalidArgumentError(
            f"Features must be maps (N, C, H, W) for attention transfer, but got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Choose convolutional layers."
        )
    student, teacher = _same_size(student, teacher)
    maps = [F.normalize(f.abs().pow(power).mean(1).flatten(1), dim=1) for f in (student, teacher)]  # (N, H·W)
    return F.mse_loss(maps[0], maps[1])


class AttentionTransferLoss(Loss):
    """:func:`attention_transfer_loss` with its settings, as a callable.

    Args:
        power: above 0; 2 in the paper.

    Raises:
        InvalidArgumentError: ``power`` is not above 0.

    Example:
        >>> AttentionTransferLoss()(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[0.0, 2.0]]]]))
        tensor(1.)
    """

    layers = "required"
    adapts = False

    def __init__(self, power: float = 2.0) -> None:
        check_positive("power", power)
        self.power = power

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of maps ``(N, C, H, W)``, a scalar."""
        return attention_transfer_loss(student, teacher, self.power)
