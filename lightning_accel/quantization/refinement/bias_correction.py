"""Bias correction: quantization shifts the mean of each output channel, and a bias takes the shift back.

The shift is measured (https://arxiv.org/abs/1906.04721, section 4.2): each batch runs in float and quantized, and the difference of the
channels' means is added up from the first operator to the last, so that each operator is corrected with its predecessors corrected.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.quantization.arithmetic.observers import PLAIN, RangeBank, Ranks, SeenOperator
from lightning_accel.quantization.graph.prepare import QuantizedForward

_POSITIONS = 256  # of a sample's result that are compared
_ROUNDS = 2  # in the second one all operators before are corrected with all batches


class _Floats:
    """Results of a batch in float, at some positions of each sample."""

    def __init__(self) -> None:
        self.found: dict[str, torch.Tensor] = {}

    def seen(self, operator: SeenOperator) -> torch.Tensor:
        self.found[operator.name] = _at_positions(operator)
        return operator.result


class _Corrector:
    """Compares with the results in float, and corrects each operator at once, so that the next ones see it corrected."""

    def __init__(self, bank: RangeBank, ranks: Ranks | None) -> None:
        self.bank, self._ranks = bank, ranks
        self.floats: dict[str, torch.Tensor] = {}  # of the present batch
        self._asked: dict[str, list[torch.Tensor]] = {}  # shifts of each sample in the batches of this round

    def begin(self) -> None:
        """Begin a round."""
        self._asked = {}

    def seen(self, operator: SeenOperator) -> torch.Tensor:
        wanted, quantized = self.floats.get(operator.name), _at_positions(operator)
        if wanted is None or wanted.shape != quantized.shape or not wanted.numel():
            return operator.result
        refined = self.bank.refined.get(operator.name, PLAIN)
        before = torch.zeros_like(wanted[0, 0]) if refined.shift is None else refined.shift
        asked = self._asked.setdefault(operator.name, [])
        asked.append(_middle(wanted - quantized) + before)
        shift = _significant(torch.cat(asked), self._ranks)
        self.bank.refined[operator.name] = replace(refined, shift=shift)
        sizes = [-1 if i == operator.channel else 1 for i in range(operator.result.ndim)]
        return operator.result + (shift - before).view(sizes)


def _at_positions(operator: SeenOperator) -> torch.Tensor:
    """A result ``(N, positions, C)``, at every position or a sample of them."""
    result = operator.result.movedim(operator.channel, -1)
    flat = result.flatten(1, -2) if result.ndim > 2 else result[:, None]
    stride = max(1, flat.shape[1] // _POSITIONS) | 1  # odd: so that it doesn't meet the same column of each row
    return flat[:, ::stride].detach()


def _middle(differences: torch.Tensor) -> torch.Tensor:
    """Mean ``(N, C)`` of the middle half of the positions: single ones that the range cuts off mustn't move all others."""
    count = differences.shape[1]
    return differences.sort(1).values[:, count // 4 : count - count // 4].mean(1)


def _significant(asked: torch.Tensor, ranks: Ranks | None) -> torch.Tensor:
    """Mean over the samples ``(N, C)``, shrunk by the share of it that is chance (https://doi.org/10.1214/aos/1176343123)."""
    mean = asked.mean(0)
    chance = asked.var(0) / len(asked) if len(asked) > 1 else torch.zeros_like(mean)
    if ranks is not None:
        mean, chance = ranks.mean(mean), ranks.mean(chance)
    return mean * (1 - chance / mean.square().clamp(min=1e-30)).clamp(min=0.0)


def correct_biases(
    forwards: Sequence[QuantizedForward], caller: nn.Module, calls: Sequence[Call], ranks: Ranks | None = None
) -> None:
    """Find a shift for each output channel of operators with weights; it goes into their biases.

    Args:
        forwards: calibrated forwards that are in place and active.
        caller: module that is called, in eval mode.
        calls: arguments of each call; batches of training data.
        ranks: reductions over the ranks of a distributed run.
    """
    correctors: list[Any] = [_Corrector(forward.bank, ranks) for forward in forwards]
    try:
        for _ in range(_ROUNDS):
            for corrector in correctors:
                corrector.begin()
            for args, kwargs in calls:
                for corrector in correctors:
                    corrector.bank.active, corrector.bank.tap = False, _Floats()
                caller(*args, **kwargs)
                for corrector in correctors:
                    corrector.floats = corrector.bank.tap.found
                    corrector.bank.active, corrector.bank.tap = True, corrector
                caller(*args, **kwargs)
    finally:
        for corrector in correctors:
            corrector.bank.active, corrector.bank.tap = True, None
