"""Perplexity of next tokens, with the shift and the padding of causal language models."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric

from lightning_accel.errors import InvalidArgumentError

IGNORED = -100  # label of a position that isn't scored, as in transformers


def next_tokens(labels: Tensor) -> Tensor:
    """Labels ``(N, T)`` moved one position to the left, so that they line up with the logits; the last one is ignored."""
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


def labels_of(input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Labels ``(N, T)``: the tokens themselves, and -100 at padding."""
    return input_ids if attention_mask is None else input_ids.masked_fill(attention_mask == 0, IGNORED)


def token_nll(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Negative log-likelihood of the next tokens, in nats.

    Args:
        logits: ``(N, T, V)``; those at position ``t`` predict token ``t + 1``.
        labels: ``(N, T)``, unshifted; -100 is ignored.

    Returns:
        Sum over all scored tokens, and their number.

    Raises:
        InvalidArgumentError: shapes don't fit.
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise InvalidArgumentError(
            f"Argument `labels` must be (N, T) for logits (N, T, V), but got {tuple(labels.shape)} for {tuple(logits.shape)}."
        )
    targets = next_tokens(labels).reshape(-1)
    loss = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), targets, ignore_index=IGNORED, reduction="sum")
    return loss, (targets != IGNORED).sum()


class Perplexity(Metric):
    """``exp`` of the mean negative log-likelihood of all tokens seen, each with the same weight.

    Unlike ``torchmetrics.text.Perplexity`` it shifts the labels itself, and sums in float64 over batches of any length.

    Example:
        >>> metric = Perplexity()
        >>> metric.update(torch.zeros(1, 3, 4), torch.tensor([[0, 1, 2]]))
        >>> metric.compute()
        tensor(4.)
    """

    full_state_update = False
    is_differentiable = False
    higher_is_better = False
    total: Tensor
    count: Tensor

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, logits: Tensor, labels: Tensor) -> None:
        """Add a batch: logits ``(N, T, V)`` and unshifted labels ``(N, T)``, -100 at ignored positions."""
        loss, count = token_nll(logits, labels)
        self.total += loss.detach().double()
        self.count += count

    def compute(self) -> Tensor:
        """The perplexity so far, float32."""
        return (self.total / self.count.clamp_min(1)).exp().float()
