"""Fold a convolution or linear layer and its batch norm into one operator with integer weights."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import nn

from lightning_accel.quantization.arithmetic.dynamic_linear import dynamic_linear
from lightning_accel.quantization.arithmetic.fake_quant import TINY, per_channel, quantize_weight, stored, straight
from lightning_accel.quantization.arithmetic.observers import PLAIN, RangeBank, Refined
from lightning_accel.quantization.arithmetic.targets import Target

aten = torch.ops.aten


def fold_norm(
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    axis: int,
    target: Target,
    norm: Sequence[torch.Tensor | None] = (),
    epsilon: float | None = None,
    refined: Refined = PLAIN,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Quantize a weight, and fold the batch norm after it into scales and bias.

    Scaling an output channel scales its step: ``norm(conv(x, q * s)) = conv(x, q * (s * f)) + b`` with
    ``f = gamma / sqrt(var + eps)``, so the integers don't change. A negative ``f`` flips their sign; a zero one
    sets them to zero.

    Args:
        weight: of a convolution or linear layer.
        bias: ``(C,)``, or none.
        axis: output channels of the weight.
        target: determines the largest integer, and the type of the scales.
        norm: scale, shift, mean and variance of the batch norm, each ``(C,)``; the first two may be missing.
        epsilon: of the batch norm; ``None`` if there is none.
        refined: integers and a shift of the result that calibration has found.

    Returns:
        Integers (in float, the weight's shape), scales ``(C,)`` and bias ``(C,)``.
    """
    integers, scale = quantize_weight(refined.scaled(weight), axis, target, refined.integers)
    if epsilon is None:
        return integers, scale, _sum(bias, refined.shift)
    gamma, beta, mean, variance = norm
    assert mean is not None
    assert variance is not None
    deviation = torch.sqrt(variance + epsilon)
    factor = 1.0 / deviation if gamma is None else gamma / deviation
    integers = integers * per_channel(torch.sign(factor), weight.ndim, axis)
    folded = scale * factor.abs()
    # gamma 0: the scale of zeros is arbitrary
    scale = stored(torch.where(folded < TINY, scale, folded), target)
    shift = -mean if bias is None else bias - mean
    return integers, scale, _sum(shift * factor if beta is None else beta + shift * factor, refined.shift)


def _sum(bias: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor | None:
    return bias if shift is None else shift if bias is None else bias + shift


class FoldedOperator(nn.Module):
    """A convolution or linear layer with quantized weight, and the following batch norm folded by :func:`fold_norm`.

    The conversion replaces it.

    Args:
        bank: ranges and target.
        operator: an ``aten`` convolution or linear.
        axis: output channels of the weight.
        rest: arguments of ``operator`` after the bias.
        epsilon: of the batch norm; ``None`` if there is none.
        name: of the operator in the plan.
    """

    def __init__(
        self, bank: RangeBank, operator: Any, axis: int, rest: tuple[Any, ...], epsilon: float | None, name: str
    ) -> None:
        super().__init__()
        self.bank, self.operator, self.axis, self.rest, self.epsilon = bank, operator, axis, rest, epsilon
        self.name = name

    def fold(
        self, weight: torch.Tensor, bias: torch.Tensor | None, *norm: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Integers (in float, the weight's shape), scales ``(C,)`` and bias ``(C,)`` for export."""
        refined = self.bank.refined.get(self.name, PLAIN)
        return fold_norm(weight, bias, self.axis, self.bank.target, norm, self.epsilon, refined)


class DynamicLinear(nn.Module):
    """A linear layer with integer weights whose input is quantized by its range in each call."""

    def __init__(self, bank: RangeBank, name: str) -> None:
        super().__init__()
        self.bank, self.name = bank, name

    def fold(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers ``(in, out)``, int8, and scales ``(out,)`` for export."""
        integers, scale = quantize_weight(weight, 0, self.bank.target)
        return integers.t().contiguous().to(torch.int8), scale

    def forward(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """Output of the layer; the gradient, if there is one, is that of the float layer."""
        if not self.bank.active or self.name in self.bank.off:
            return cast(torch.Tensor, aten.linear.default(x, weight, bias))
        integers, scale = self.fold(weight)
        with torch.no_grad():
            result = dynamic_linear(x.float(), integers, scale, bias)
        return straight(aten.linear.default(x, weight, bias), result) if torch.is_grad_enabled() else result


class FoldedEmbedding(nn.Module):
    """An embedding whose table is stored as integers with one scale; the conversion replaces it."""

    def __init__(self, bank: RangeBank) -> None:
        super().__init__()
        self.bank = bank

    def fold(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers (in float, the table's shape) and the scale ``(1,)`` for export."""
        return quantize_weight(weight, None, self.bank.target)
