"""Noise of a quantized network's results against the float network's."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call
from lightning_accel.quantization.arithmetic.observers import Ranks

Results = list[list[torch.Tensor]]  # floating-point tensors of the result of each call


def results_of(caller: nn.Module, calls: Sequence[Call]) -> Results:
    """Floating-point tensors of the result of each call."""
    return [[leaf for leaf in pytree.tree_leaves(caller(*args, **kwargs)) if _is_float(leaf)] for args, kwargs in calls]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def powers_of(wanted: Results) -> list[float]:
    """Sum of the squares of each tensor over all calls."""
    return [max(sum(float(b[i].square().sum()) for b in wanted), 1e-30) for i in range(len(wanted[0]))]


def noise_of(found: Results, wanted: Results, ranks: Ranks | None) -> float:
    """Squared error of the results divided by their square, averaged over the tensors."""
    shares = []
    for index, power in enumerate(powers_of(wanted)):
        error = sum(float((a[index] - b[index]).square().sum()) for a, b in zip(found, wanted, strict=True))
        shares.append(error / power)
    mean = torch.tensor(sum(shares) / max(len(shares), 1))
    return float(mean if ranks is None else ranks.mean(mean))
