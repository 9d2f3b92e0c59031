"""ONNX files: export, half precision, pre- and post-processing."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.onnx.export import OnnxExport as OnnxExport
    from lightning_accel.onnx.half_precision import check_lowered as check_lowered
    from lightning_accel.onnx.half_precision import lower_precision as lower_precision

_PUBLIC = {
    "OnnxExport": "onnx.export",
    "lower_precision": "onnx.half_precision",
    "check_lowered": "onnx.half_precision",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
