"""Translation of this library's own operator to ONNX, for torch's exporter."""

from collections.abc import Callable
from typing import Any

import torch
from onnx import TensorProto
from onnxscript import opset18 as op

import lightning_accel.quantization.arithmetic.dynamic_linear  # noqa: F401 - registers the operator


def _dynamic_linear(x: Any, weight: Any, scale: Any, bias: Any = None) -> Any:
    """Translate to the pattern that ONNX Runtime fuses into one kernel."""
    integers, step, zero = op.DynamicQuantizeLinear(x)
    sums = op.Cast(op.MatMulInteger(integers, weight, zero), to=TensorProto.FLOAT)
    result = op.Mul(sums, op.Mul(step, scale))
    return result if bias is None else op.Add(result, bias)


TRANSLATIONS: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.lightning_accel.dynamic_linear.default: _dynamic_linear
}
