"""Losses for transformers: hidden states, attention, and relations of tokens."""

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_accel.distillation.losses.base import Loss, check_same_shape, in_float32, positions
from lightning_accel.errors import InvalidArgumentError


@in_float32
def hidden_state_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Hidden states of `TinyBERT <https://arxiv.org/abs/1909.10351>`_: squared error over all included tokens.

    Args:
        student: ``(N, T, D)``, with the teacher's width.
        teacher: same shape.
        mask: ``(N, T)``, 0 at padding.

    Returns:
        Scalar, averaged over tokens and D.

    Raises:
        InvalidArgumentError: shapes differ, or ``mask`` doesn't fit.

    Example:
        >>> states = torch.tensor([[[1.0, 3.0], [9.0, 9.0]]])
        >>> hidden_state_loss(states, torch.zeros(1, 2, 2), mask=torch.tensor([[1, 0]]))
        tensor(5.)
    """
    check_same_shape(student, teacher, "Hidden states")
    return F.mse_loss(positions(student, mask), positions(teacher, mask))


class HiddenStateLoss(Loss):
    """:func:`hidden_state_loss` as a callable. If widths differ, a :class:`LossTerm` adds a trained linear layer.

    Example:
        >>> HiddenStateLoss()(torch.tensor([[[1.0, 3.0]]]), torch.zeros(1, 1, 2))
        tensor(5.)
    """

    layers = "required"

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of hidden states ``(N, T, D)``, a scalar."""
        return hidden_state_loss(student, teacher, mask)


@in_float32
def cosine_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Directions of hidden states, as in `DistilBERT <https://arxiv.org/abs/1910.01108>`_: ``1 - cos``.

    Args:
        student: ``(N, T, D)`` or ``(N, D)``.
        teacher: same shape.
        mask: ``(N, T)``, 0 at padding.

    Returns:
        Scalar, averaged over tokens.

    Raises:
        InvalidArgumentError: shapes differ, or ``mask`` doesn't fit.

    Example:
        >>> cosine_loss(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(1.)
    """
    check_same_shape(student, teacher, "Hidden states")
    return (1 - F.cosine_similarity(positions(student, mask), positions(teacher, mask), dim=1)).mean()


class CosineLoss(Loss):
    """:func:`cosine_loss` as a callable.

    Example:
        >>> CosineLoss()(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 3.0]]))
        tensor(1.)
    """

    layers = "optional"

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of hidden states ``(N, T, D)``, a scalar."""
        return cosine_loss(student, teacher, mask)


@in_float32
def attention_loss(student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention of `TinyBERT <https://arxiv.org/abs/1909.10351>`_: squared error of attention matrices.

    The paper uses the scores before the softmax; attention probabilities also work, on a smaller scale.

    Args:
        student: ``(N, heads, T, T)``.
        teacher: same shape.
        mask: ``(N, T)``, 0 at padding; excludes rows and columns.

    Returns:
        Scalar, averaged over heads and pairs of tokens.

    Raises:
        InvalidArgumentError: shapes differ, or ``mask`` doesn't fit.

    Example:
        >>> attention_loss(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3), mask=torch.tensor([[1, 1, 0]]))
        tensor(1.)
    """
    check_same_shape(student, teacher, "Attention")
    if mask is None:
        return F.mse_loss(student, teacher)
    tokens = _tokens(mask, student, student.shape[-1])
    pairs = (tokens[:, None, :, None] & tokens[:, None, None, :]).expand_as(student)
    return F.mse_loss(student[pairs], teacher[pairs])


class AttentionLoss(Loss):
    """:func:`attention_loss` as a callable.

    Example:
        >>> AttentionLoss()(torch.ones(1, 2, 3, 3), torch.zeros(1, 2, 3, 3))
        tensor(1.)
    """

    layers = "required"
    adapts = False

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of attention ``(N, heads, T, T)``, a scalar."""
        return attention_loss(student, teacher, mask)


def _tokens(mask: Tensor, values: Tensor, length: int) -> Tensor:
    """A padding mask ``(N, T)`` as booleans.

    Raises:
        InvalidArgumentError: it has another shape, or selects nothing.
    """
    if mask.shape != (len(values), length):
        raise InvalidArgumentError(
            f"Argument `mask` must be (N, T) = {(len(values), length)} for tokens, but got {tuple(mask.shape)}."
        )
    tokens = mask.to(values.device) != 0
    if not bool(tokens.any()):
        raise InvalidArgumentError("Argument `mask` must leave a position, but got one that leaves none in a batch.")
    return tokens


def _relation(values: Tensor, heads: int, tokens: Tensor | None) -> Tensor:
    """Log-probabilities of the scaled dot products of tokens: ``(N, heads, T, T)``."""
    split = values.unflatten(-1, (heads, -1)).transpose(1, 2)  # (N, heads, T, D / heads)
    scores = split @ split.transpose(2, 3) / split.shape[-1] ** 0.5
    if tokens is not None:  # finite, to avoid differences of infinities
        scores = scores.masked_fill(~tokens[:, None, None, :], torch.finfo(scores.dtype).min / 2)
    return F.log_softmax(scores, dim=-1)


@in_float32
def relation_loss(student: Tensor, teacher: Tensor, heads: int = 12, mask: Tensor | None = None) -> Tensor:
    """Self-attention relations of `MiniLM <https://arxiv.org/abs/2002.10957>`_ and `v2 <https://arxiv.org/abs/2012.15828>`_.

    ``KL(R_T ‖ R_S)`` with ``R = softmax(A Aᵀ / √d)`` in each of ``heads`` parts of A, averaged over heads and tokens. A is the
    output of a query, key or value projection; v2 adds the three losses.

    Args:
        student: ``(N, T, D)``.
        teacher: ``(N, T, E)``; the width may differ.
        heads: number of relation heads; divides both widths.
        mask: ``(N, T)``, 0 at padding.

    Returns:
        Scalar.

    Raises:
        InvalidArgumentError: widths aren't divisible by ``heads``, tokens differ, or ``mask`` doesn't fit.

    Example:
        >>> values = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])
        >>> relation_loss(values, torch.zeros(1, 2, 4), heads=2).round(decimals=4)
        tensor(0.0601)
    """
    for name, values in (("student", student), ("teacher", teacher)):
        if values.ndim != 3 or values.shape[-1] % heads:
            raise InvalidArgumentError(
                f"Argument `heads` must divide the width of (N, T, D), but got {heads} for {tuple(values.shape)} of the {name}."
            )
    if student.shape[:2] != teacher.shape[:2]:
        raise InvalidArgumentError(
            f"Features must belong to the same tokens, but got {tuple(student.shape)} and {tuple(teacher.shape)}."
        )
    tokens = None if mask is None else _tokens(mask, student, student.shape[1])
    ours, theirs = _relation(student, heads, tokens), _relation(teacher, heads, tokens)
    divergence = F.kl_div(ours, theirs, reduction="none", log_target=True).sum(-1)  # (N, heads, T)
    return divergence.mean() if tokens is None else divergence.transpose(1, 2)[tokens].mean()


class MiniLMLoss(Loss):
    """:func:`relation_loss` with its settings, as a callable.

    Args:
        heads: relation heads, at least 1.

    Raises:
        InvalidArgumentError: ``heads`` is below 1.

    Example:
        >>> MiniLMLoss(heads=2)(torch.tensor([[[1.0, 0.0], [0.0, 1.0]]]), torch.zeros(1, 2, 4)).round(decimals=4)
        tensor(0.0601)
    """

    layers = "required"
    adapts = False

    def __init__(self, heads: int = 12) -> None:
        if not isinstance(heads, int) or heads < 1:
            raise InvalidArgumentError(f"Argument `heads` must be an integer of at least 1, but got {heads!r}.")
        self.heads = heads

    def __call__(self, student: Tensor, teacher: Tensor, mask: Tensor | None = None) -> Tensor:
        """The loss of projections ``(N, T, D)``, a scalar."""
        return relation_loss(student, teacher, self.heads, mask)
