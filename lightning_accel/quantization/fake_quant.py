"""Fake-quant: QuantizeLinear and DequantizeLinear in one, with a straight-through gradient.

The forward is, operation by operation, what the ONNX operators are defined to do (division by the scale, round half to
even, saturate, multiply by the scale), so what is trained is bit for bit what is written into the file.
https://onnx.ai/onnx/operators/onnx__QuantizeLinear.html
"""

from typing import Any

import torch
from torch import nn

from lightning_accel.quantization.targets import Target

TINY = 2.0**-126  # the smallest normal float32: a scale below it would lose bits, or be zero


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
        # hardtanh's own kernel is one pass over memory; a mask would be three.
        return torch.ops.aten.hardtanh_backward(grads[0], x, *ctx.edges), None, None, None, None


def fake_quantize(x: torch.Tensor, scale: torch.Tensor, zero_point: int, low: int, high: int) -> torch.Tensor:
    """Round to the grid of an integer type and back.

    Args:
        x: float32 of any shape.
        scale: one positive element, on the device of ``x`` (a CPU scalar would be applied as a reciprocal on CUDA).
        zero_point: integer that stands for 0.
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
    return _StraightThrough.apply(x, scale, low, high, ((low - 0.5) * step, (high + 0.5) * step))


def activation_qparams(low: torch.Tensor, high: torch.Tensor, target: Target) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale and zero point that cover a range.

    Args:
        low: smallest values seen, shape ``(K,)``, one per tensor.
        high: largest values seen, shape ``(K,)``.
        target: says symmetric or affine, and the integers.

    Returns:
        Scales (float32) and zero points (int64), each ``(K,)``. Zero is always exactly representable. A range without
        width gets scale 1.
    """
    low, high = low.clamp(max=0.0), high.clamp(min=0.0)
    width, steps = (torch.maximum(-low, high), target.high) if target.signed_activations else (high - low, 255)
    scale = torch.where(width / steps < TINY, torch.ones_like(width), width / steps)
    if target.signed_activations:
        return scale, torch.zeros_like(scale, dtype=torch.int64)
    return scale, (target.low - low / scale).round().clamp(target.low, target.high).to(torch.int64)


def quantize_weight(weight: torch.Tensor, axis: int, weight_max: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric integers of a weight, one scale per output channel.

    Args:
        weight: float32, channels along ``axis``.
        axis: output channels.
        weight_max: largest integer.

    Returns:
        Integers (still in float, shape of ``weight``) and scales ``(C,)``. A channel of zeros gets scale 1.
    """
    flat = weight.detach().transpose(0, axis).flatten(1)
    scale = flat.abs().amax(1) / weight_max
    scale = torch.where(scale < TINY, torch.ones_like(scale), scale)
    return torch.div(weight.detach(), per_channel(scale, weight.ndim, axis)).round_().clamp_(
        -weight_max, weight_max
    ), scale


def per_channel(values: torch.Tensor, ndim: int, axis: int) -> torch.Tensor:
    """``(C,)`` viewed so that it broadcasts along ``axis`` of a tensor with ``ndim`` dimensions."""
    return values.view([-1 if i == axis else 1 for i in range(ndim)])


class WeightFakeQuant(nn.Module):
    """Fake-quant of a weight with the range of the moment; no state. All values lie within it, so the gradient is 1."""

    def __init__(self, bank: "RangeBank", axis: int) -> None:
        super().__init__()
        self.bank, self.axis = bank, axis

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Weight on the grid, same shape."""
        if not self.bank.active:
            return weight
        integers, scale = quantize_weight(weight.float(), self.axis, self.bank.target.weight_max)
        rounded = integers.mul_(per_channel(scale, weight.ndim, self.axis))
        return _Identity.apply(weight, rounded) if torch.is_grad_enabled() and weight.requires_grad else rounded


class _Identity(torch.autograd.Function):
    """Values of the second tensor, gradient to the first."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
        return rounded

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return grads[0], None


class RangeBank:
    """The ranges of all activations of one captured module, updated together once a step.

    They lie in two vectors outside the module: nothing is added to its ``state_dict``.

    Args:
        keys: names of the quantized tensors, e.g. ``"layer1.0.conv1:input"``.
        target: arithmetic to simulate.
        momentum: weight of a new batch in the moving average.
    """

    def __init__(self, keys: list[str], target: Target, momentum: float = 0.05) -> None:
        self.keys, self.target, self.momentum = keys, target, momentum
        self.active = False  # fake-quant happens
        self.learning = False  # training forwards are watched
        self.low = torch.zeros(len(keys))
        self.high = torch.zeros(len(keys))
        self.batches = 0  # batches seen so far
        self._seen: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self.refresh()

    def refresh(self) -> None:
        """Derive scales and zero points from the ranges."""
        self.scales, self.zero_points = activation_qparams(self.low, self.high, self.target)
        zero_points = self.zero_points.tolist()
        steps = self.scales.tolist()
        low, high = self.target.low, self.target.high
        self._per_key = [
            (self.scales[i], low - z, high - z, ((low - z - 0.5) * s, (high - z + 0.5) * s))
            for i, (s, z) in enumerate(zip(steps, zero_points, strict=True))
        ]

    def to(self, device: torch.device) -> None:
        """Move to the device of the activations."""
        if self.low.device != device:
            self.low, self.high = self.low.to(device), self.high.to(device)
            self.refresh()

    def quantize(self, index: int, x: torch.Tensor, training: bool) -> torch.Tensor:
        """Fake-quant of tensor ``index``; in training its range is noted down first."""
        if training and self.learning:
            low, high = x.detach().aminmax()
            if index in self._seen:
                low, high = torch.minimum(low, self._seen[index][0]), torch.maximum(high, self._seen[index][1])
            self._seen[index] = (low, high)
        if not self.active:
            return x
        scale, low_q, high_q, edges = self._per_key[index]
        return _StraightThrough.apply(x if x.dtype is torch.float32 else x.float(), scale, low_q, high_q, edges)

    def update(self, reduce: Any = None) -> None:
        """Take the ranges noted since the last call into the moving averages.

        Args:
            reduce: ``(low, high) -> (low, high)`` over all ranks; both ``(K,)``.

        Raises:
            ValueError: a range isn't finite; the message names the tensor.
        """
        if not self._seen and reduce is None:
            return
        low, high = self.low.clone(), self.high.clone()
        if self._seen:
            index = torch.tensor(list(self._seen), device=low.device)
            low[index] = torch.stack([pair[0].float() for pair in self._seen.values()])
            high[index] = torch.stack([pair[1].float() for pair in self._seen.values()])
        self._seen.clear()
        if reduce is not None:
            low, high = reduce(low, high)
        finite = torch.isfinite(low) & torch.isfinite(high)
        if not bool(finite.all()):
            names = [self.keys[i] for i in torch.nonzero(~finite).flatten().tolist()]
            raise ValueError(
                f"Activations must be finite while ranges are learned, but got NaN or Inf first at {names[0]}."
            )
        if self.batches == 0:
            self.low, self.high = low, high
        else:
            self.low, self.high = torch.lerp(self.low, low, self.momentum), torch.lerp(self.high, high, self.momentum)
        self.batches += 1
        self.refresh()

    def forget(self) -> None:
        """Drop what was noted since the last update."""
        self._seen.clear()

    def state_dict(self) -> dict[str, Any]:
        """Ranges by name, on the CPU."""
        return {
            "keys": list(self.keys),
            "low": self.low.cpu(),
            "high": self.high.cpu(),
            "batches": self.batches,
            "active": self.active,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over saved ranges.

        Raises:
            ValueError: they belong to other tensors.
        """
        if state["keys"] != self.keys:
            raise ValueError(
                f"Argument `ckpt_path` must hold ranges of this network's tensors, but got {len(state['keys'])} ranges for "
                f"{len(self.keys)} tensors, or other names. Resume with the same model and `include`/`exclude`."
            )
        device = self.low.device
        self.low, self.high = state["low"].to(device), state["high"].to(device)
        self.batches, self.active = state["batches"], state["active"]
        self.refresh()


class ActivationFakeQuant(nn.Module):
    """Fake-quant of one activation; its range is row ``index`` of the bank."""

    def __init__(self, bank: RangeBank, index: int, training: bool) -> None:
        super().__init__()
        self.bank, self.index, self.training_graph = bank, index, training

    def qparams(self) -> tuple[float, int]:
        """Scale (exactly representable in float32) and zero point in force."""
        return float(self.bank.scales[self.index]), int(self.bank.zero_points[self.index])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        return self.bank.quantize(self.index, x, self.training_graph)
