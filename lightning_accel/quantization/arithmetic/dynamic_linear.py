"""Operator ``lightning_accel::dynamic_linear``: a linear layer with dynamically quantized input.

Importing this module registers it, which saved programs with this operator need.
"""

import torch

_EXACT = 2**24 // (255 * 127)  # number of products that float32 adds without rounding


@torch.library.custom_op("lightning_accel::dynamic_linear", mutates_args=())
def dynamic_linear(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
) -> torch.Tensor:
    """Linear layer with DynamicQuantizeLinear and MatMulInteger, operation by operation as ONNX defines them.

    https://onnx.ai/onnx/operators/onnx__DynamicQuantizeLinear.html

    Args:
        x: float32 ``(..., K)``, quantized to uint8 with one scale and zero point for all of it.
        weight: int8 ``(K, C)``.
        scale: of each column of the weight, float32 ``(C,)``.
        bias: float32 ``(C,)``, or none.

    Returns:
        ``(..., C)``, float32.
    """
    if x.numel() == 0:  # an expert without tokens
        return x.new_zeros((*x.shape[:-1], weight.shape[1]))
    low, high = x.min().clamp(max=0.0), x.max().clamp(min=0.0)
    step = torch.where(high > low, (high - low) / 255, torch.ones_like(low))
    zero = (-low / step).clamp(0, 255).round()
    integers = (torch.div(x, step).round_() + zero).clamp_(0, 255) - zero
    exact = torch.float32 if x.shape[-1] <= _EXACT else torch.float64
    sums = (integers.to(exact) @ weight.to(exact)).float()
    result = sums * (step * scale)
    return result if bias is None else result + bias


@dynamic_linear.register_fake
def _(x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[1]))
