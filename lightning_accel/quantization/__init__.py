"""Quantization: targets, fake-quantization with their arithmetic, capture, conversion, and callbacks."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.quantization.arithmetic.targets import Target as Target
    from lightning_accel.quantization.arithmetic.targets import register_target as register_target
    from lightning_accel.quantization.budget import quantize_within as quantize_within
    from lightning_accel.quantization.ptq import quantize as quantize
    from lightning_accel.quantization.ptq import quantize_ as quantize_
    from lightning_accel.quantization.sensitivity import sensitivity as sensitivity
    from lightning_accel.quantization.weight_only.group_grid import GroupGrid as GroupGrid
    from lightning_accel.quantization.weight_only.ptq import quantize_weights_ as quantize_weights_

_PUBLIC = {
    "Target": "quantization.arithmetic.targets",
    "register_target": "quantization.arithmetic.targets",
    "quantize": "quantization.ptq",
    "quantize_": "quantization.ptq",
    "quantize_within": "quantization.budget",
    "sensitivity": "quantization.sensitivity",
    "GroupGrid": "quantization.weight_only.group_grid",
    "quantize_weights_": "quantization.weight_only.ptq",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
