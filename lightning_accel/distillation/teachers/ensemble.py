"""Ensemble of teachers with averaged outputs."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.core.arguments import checked
from lightning_accel.distillation.layers.selection import select_tensor, split_path
from lightning_accel.errors import InvalidArgumentError


class TeacherEnsemble(nn.Module):
    """An ensemble of teachers: the weighted mean of their logits or probabilities.

    Args:
        teachers: networks with the student's inputs and equal shapes of logits.
        weights: weight of each teacher, above 0, normalized to a sum of 1; ``None``: equal weights.
        average: ``"logits"``, or ``"probabilities"``: the logarithm of the mean of softmaxes over dimension 1, so that a
            teacher with large logits doesn't dominate.
        outputs: selection of the logits in a teacher's output: ``"[logits]"``, ``"[0]"``; empty for a Tensor.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> TeacherEnsemble([nn.Identity(), nn.Flatten()], weights=[3, 1])(torch.tensor([[1.0, 2.0]]))
        tensor([[1., 2.]])
    """

    @checked()
    def __init__(
        self,
        teachers: list[nn.Module],
        weights: list[float] | None = None,
        average: str = "logits",
        outputs: str = "",
    ) -> None:
        super().__init__()
        if not teachers:
            raise InvalidArgumentError("Argument `teachers` must hold a teacher, but got none.")
        weights = [1.0] * len(teachers) if weights is None else list(weights)
        if len(weights) != len(teachers) or not all(w > 0 and math.isfinite(w) for w in weights):
            raise InvalidArgumentError(
                f"Argument `weights` must be above 0, one for each of {len(teachers)} teachers, but got {weights}."
            )
        if average not in ("logits", "probabilities"):
            raise InvalidArgumentError(f'Argument `average` must be "logits" or "probabilities", but got {average!r}.')
        self.teachers = nn.ModuleList(teachers)
        self.weights = [weight / sum(weights) for weight in weights]
        self.average = average
        self._outputs, self._keys = outputs, split_path(outputs, "outputs")[1]

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """Averaged logits of all teachers."""
        logits = [select_tensor(t(*args, **kwargs), self._keys, self._outputs, "outputs") for t in self.teachers]
        if self.average == "probabilities":
            logs = [F.log_softmax(x.float(), dim=1) + math.log(w) for x, w in zip(logits, self.weights, strict=True)]
            return torch.logsumexp(torch.stack(logs), dim=0)
        return torch.stack([w * x for w, x in zip(self.weights, logits, strict=True)]).sum(0)
