"""Losses between the relations of samples in a batch; channels and sizes of features may differ."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accel.distillation.losses.base import Loss, check_positive, in_float32
from lightning_accel.errors import InvalidArgumentError

_SMALLEST = 1e-12  # squared distance below which samples are considered equal


def _check_batch(student: Tensor, teacher: Tensor, least: int) -> None:
    if len(student) != len(teacher) or len(student) < least:
        raise InvalidArgumentError(
            f"Features must belong to the same samples, at least {least} of them, but got {len(student)} of the student "
            f"and {len(teacher)} of the teacher."
        )


@in_float32
def similarity_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Similarity-preserving loss of `Tung & Mori 2019 <https://arxiv.org/abs/1907.09682>`_.

    ``‖G_T - G_S‖² / N²`` (Frobenius) with ``G = A Aᵀ`` of flattened features A ``(N, -1)``, each row of G with length 1.

    Args:
        student: ``(N, ...)``.
        teacher: ``(N, ...)``; other dimensions may differ.

    Returns:
        Scalar.

    Raises:
        InvalidArgumentError: numbers of samples differ.

    Example:
        >>> similarity_loss(torch.eye(2), torch.ones(2, 3)).round(decimals=4)
        tensor(0.2929)
    """
    _check_batch(student, teacher, 1)
    grams = [F.normalize(a @ a.T, dim=1) for a in (student.flatten(1), teacher.flatten(1))]  # (N, N)
    return F.mse_loss(grams[0], grams[1])


class SimilarityLoss(Loss):
    """:func:`similarity_loss` as a callable.

    Example:
        >>> SimilarityLoss()(torch.eye(2), torch.ones(2, 3)).round(decimals=4)
        tensor(0.2929)
    """

    layers = "optional"
    adapts = False

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features ``(N, ...)``, a scalar."""
        return similarity_loss(student, teacher)


def _distances(features: Tensor) -> Tensor:
    """Distances of the pairs i ≠ j, divided by their mean: ``(N, N - 1)``."""
    squared = (features[:, None] - features[None]).square().sum(-1).clamp_min(_SMALLEST)  # avoids a NaN gradient at 0
    off_diagonal = ~torch.eye(len(features), dtype=torch.bool, device=features.device)
    distances = squared[off_diagonal].sqrt().reshape(len(features), -1)
    return distances / distances.mean().clamp_min(_SMALLEST)


def _angles(features: Tensor) -> Tensor:
    """Cosine of the angle at j between i and k, for all ordered triplets of different samples."""
    count = len(features)
    edges = features[None] - features[:, None]  # [j, i]: vector from j to i
    edges = edges / edges.square().sum(-1, keepdim=True).clamp_min(_SMALLEST).sqrt()
    cosines = torch.bmm(edges, edges.transpose(1, 2))  # (N, N, N): j, i, k
    index = torch.arange(count, device=features.device)
    j, i, k = index[:, None, None], index[None, :, None], index[None, None, :]
    return cosines[(i != j) & (k != j) & (i != k)]


@in_float32
def relational_loss(
    student: Tensor, teacher: Tensor, distance_weight: float = 1.0, angle_weight: float = 2.0
) -> Tensor:
    """RKD of `Park et al. 2019 <https://arxiv.org/abs/1904.05068>`_: Huber losses of distances and of angles.

    Distances are those of all pairs, divided by their mean; angles those of all triplets. Each loss is averaged over its
    pairs or triplets. Memory grows with ``N² · D``, so it suits embeddings and pooled features.

    Args:
        student: ``(N, ...)``.
        teacher: ``(N, ...)``; other dimensions may differ.
        distance_weight: weight of the distances; 1 in the paper.
        angle_weight: weight of the angles; 2 in the paper.

    Returns:
        Scalar.

    Raises:
        InvalidArgumentError: numbers of samples differ, or there are fewer than 3.

    Example:
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
        >>> relational_loss(student, 7 * student).item() < 1e-9  # the same shape, at another scale
        True
    """
    _check_batch(student, teacher, 3)
    student, teacher = student.flatten(1), teacher.flatten(1)
    loss = student.new_zeros(())
    if distance_weight:
        loss = loss + distance_weight * F.huber_loss(_distances(student), _distances(teacher))
    if angle_weight:
        loss = loss + angle_weight * F.huber_loss(_angles(student), _angles(teacher))
    return loss


class RKDLoss(Loss):
    """:func:`relational_loss` with its settings, as a callable.

    Args:
        distance_weight: weight of the distances, at least 0.
        angle_weight: weight of the angles, at least 0.

    Raises:
        InvalidArgumentError: a weight is negative.

    Example:
        >>> RKDLoss(angle_weight=0.0).distance_weight
        1.0
    """

    layers = "optional"
    adapts = False

    def __init__(self, distance_weight: float = 1.0, angle_weight: float = 2.0) -> None:
        check_positive("distance_weight", distance_weight, zero=True)
        check_positive("angle_weight", angle_weight, zero=True)
        self.distance_weight, self.angle_weight = distance_weight, angle_weight

    def __call__(self, student: Tensor, teacher: Tensor) -> Tensor:
        """The loss of features ``(N, ...)``, a scalar."""
        return relational_loss(student, teacher, self.distance_weight, self.angle_weight)
