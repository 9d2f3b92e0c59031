"""Fake-quantization: QuantizeLinear and DequantizeLinear in one, with a straight-through gradient.

The forward pass follows the definition of the ONNX operators operation by operation (divide by the scale, round half to
even, saturate, multiply by the scale), so the trained values equal the exported ones bit for bit.
https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from typing import Any

import torch

from lightning_accel.quantization.arithmetic.targets import Target

TINY = 2.0**-126  # smallest normal float32: a smaller scale would lose bits, or be zero


class _StraightThrough(torch.autograd.Function):
    """``clamp(round(x / scale), low, high) * scale``; the gradient passes wherever ``x`` wasn't clamped."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int, edges: tuple[float, float]
    ) -> torch.Tensor:
        ctx.save_for_backward(x)
        ctx.edges = edges
        return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        # hardtanh_backward is one pass over memory; a mask would be three.
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.edges), None, None, None, None


class _StraightThroughInPlace(torch.autograd.Function):
    """The same, written to ``x``: whoever holds it sees the rounded values, with their gradient."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int, edges: tuple[float, float]
    ) -> torch.Tensor:
        values = x.data  # has a version of its own: the gradient may read it after `x` is overwritten
        ctx.save_for_backward(values)
        ctx.edges = edges
        ctx.mark_dirty(x)
        x.data = torch.div(values, scale).round_().clamp_(low, high).mul_(scale)
        return x

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None, None]:
        (x,) = ctx.saved_tensors
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.edges), None, None, None, None


class _LearnedStep(torch.autograd.Function):
    """Fake-quantization with a gradient of the scale (https://arxiv.org/abs/1902.08153, equation 3)."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, scale: torch.Tensor, low: int, high: int, edges: tuple[float, float]
    ) -> torch.Tensor:
        ratio = torch.div(x, scale)
        rounded = ratio.round().clamp_(low, high)
        ctx.save_for_backward(x, rounded - ratio.clamp_(low, high))
        ctx.edges = edges
        ctx.clamped = rounded
        return rounded * scale

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None, None, None]:
        x, error = ctx.saved_tensors
        grad = torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.edges)
        outside = grads[0] - grad  # clamped: the result is `low` or `high` times the scale
        step = (grad * error).sum() + (outside * ctx.clamped).sum()
        return grad, step, None, None, None


def straight_through(
    x: torch.Tensor, scale: torch.Tensor, low: int, high: int, edges: tuple[float, float], learn: bool = False
) -> torch.Tensor:
    """Round to a grid around 0 with a straight-through gradient between ``edges``, and a gradient of a learned ``scale``."""
    rounding = _LearnedStep if learn else _StraightThrough
    result: torch.Tensor = rounding.apply(x, scale, low, high, edges)  # type: ignore[no-untyped-call]  # torch has no annotation for it
    return result


def straight_through_(
    x: torch.Tensor, scale: torch.Tensor, low: int, high: int, edges: tuple[float, float]
) -> torch.Tensor:
    """:func:`straight_through` in place; ``x`` is float32 and no view."""
    result: torch.Tensor = _StraightThroughInPlace.apply(x, scale, low, high, edges)  # type: ignore[no-untyped-call]  # torch has no annotation for it
    return result


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int, low: int, high: int) -> torch.Tensor:
    """Round to the grid of an integer type and back.

    Args:
        x: float32 of any shape.
        scale: one positive element, on the device of ``x`` (a CPU scalar would be applied as a reciprocal on CUDA).
        zero_point: integer that represents 0.
        low: smallest integer, e.g. -128.
        high: largest integer, e.g. 127.

    Returns:
        ``(clamp(round(x / scale) + zero_point, low, high) - zero_point) * scale``, of the shape of ``x``. The gradient is
        1 where ``x`` lies within half a step of the representable range, else 0 (https://arxiv.org/abs/1308.3432).

    Example:
        >>> fake_quantize(torch.tensor([0.24, 0.26, 9.0]), torch.tensor(0.5), 0, -4, 3)
        tensor([0.0000, 0.5000, 1.5000])
    """
    low, high = low - zero_point, high - zero_point
    step = float(scale)
    return straight_through(x, scale, low, high, ((low - 0.5) * step, (high + 0.5) * step))


def stored(scale: torch.Tensor, target: Target) -> torch.Tensor:
    """Scales as stored in the target's file: rounded to float16 if the rest of the network is float16.

    Scales outside of float16's normal range (below 2**-14, above 65504) stay float32.
    """
    if target.rest != "float16":
        return scale
    half = scale.half().to(scale.dtype)
    return torch.where((scale >= 2.0**-14) & torch.isfinite(half), half, scale)


def activation_qparams(low: torch.Tensor, high: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that cover a range.

    Args:
        low: smallest values seen, shape ``(K,)``, one per tensor.
        high: largest values seen, shape ``(K,)``.
        target: determines symmetric or affine quantization, and the integer range.

    Returns:
        Scales (float32) and zero points (int64), each ``(K,)``. Zero is always exactly representable. An empty range
        has scale 1.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    smallest, largest = target.limits
    width, steps = (
        (torch.maximum(-low, high), largest) if target.signed_activations else (high - low, largest - smallest)
    )
    scale = stored(torch.where(width / steps < TINY, torch.ones_like(width), width / steps), target)
    if target.signed_activations:
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    return scale, (-low / scale).round().clamp(0, 255).to(torch.int64)


def quantize_weight(
    weight: torch.Tensor, axis: int | None, target: Target, integers: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers of a weight, one scale per output channel.

    Args:
        weight: float32, channels along ``axis``.
        axis: output channels; ``None``: one scale for all.
        target: determines the largest integer, and the type of the scales.
        integers: chosen otherwise than by rounding each weight to the nearest; int8, of the weight's shape.

    Returns:
        Integers (still in float, shape of ``weight``) and scales ``(C,)``, or ``(1,)``. A channel of zeros has scale 1.
    """
    weight, largest = weight.detach(), target.weight_max
    extreme = weight.abs().amax() if axis is None else weight.abs().amax(_others(weight.ndim, axis))
    scale = extreme.reshape(-1) / largest
    scale = stored(torch.where(scale < TINY, torch.ones_like(scale), scale), target)
    if integers is not None:
        return integers.to(weight.dtype), scale
    return torch.div(weight, per_channel(scale, weight.ndim, axis)).round_().clamp_(-largest, largest), scale


def fake_quantize_weight(weight: torch.Tensor, axis: int | None, target: Target) -> torch.Tensor:
    """Round a weight to its integers and back. All values lie within the range, so the gradient is 1.

    Args:
        weight: floating point, channels along ``axis``.
        axis: output channels; ``None``: one scale for all.
        target: determines the largest integer, and the type of the scales.

    Returns:
        Float32, of the shape of ``weight``.
    """
    integers, scale = quantize_weight(weight.float(), axis, target)
    return straight(weight, integers.mul_(per_channel(scale, weight.ndim, axis)))


def _others(ndim: int, axis: int) -> list[int]:
    return [i for i in range(ndim) if i != axis]


def per_channel(values: torch.Tensor, ndim: int, axis: int | None) -> torch.Tensor:
    """``(C,)`` viewed so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions; ``(1,)`` with ``None``."""
    return values.view([-1 if i == axis else 1 for i in range(ndim)])


def straight(weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Values of the second tensor, gradient to the first."""
    return _Identity.apply(weight, rounded) if torch.is_grad_enabled() and weight.requires_grad else rounded  # type: ignore[no-untyped-call]  # torch has no annotation for it


class _Identity(torch.autograd.Function):
    """Values of the second tensor, gradient to the first."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None
