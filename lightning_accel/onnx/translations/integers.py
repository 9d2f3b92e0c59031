"""Bit shifts as products and floor divisions by powers of two: OpenVINO shifts signed integers as unsigned ones."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_accel.onnx.translations.rule import Rule, always

aten = torch.ops.aten


def right_shift(x: Any, places: Any) -> torch.Tensor:
    """``x >> places`` for integers: the sign is kept, so that -5 >> 1 is -3."""
    result: torch.Tensor = torch.div(x, _power(places), rounding_mode="floor")
    return result


def left_shift(x: Any, places: Any) -> torch.Tensor:
    """``x << places`` for integers; what leaves the type's range is lost, as in PyTorch."""
    result: torch.Tensor = x * _power(places)
    return result


def _power(places: Any) -> Any:
    return 2**places if isinstance(places, int) else torch.pow(torch.full_like(places, 2), places)


RULES: Mapping[Any, Rule] = {
    **{
        getattr(packet, overload): always(right_shift)
        for packet in (aten.bitwise_right_shift, aten.__rshift__)
        for overload in packet.overloads()
        if overload in ("Tensor", "Tensor_Scalar", "Scalar")
    },
    **{
        getattr(packet, overload): always(left_shift)
        for packet in (aten.bitwise_left_shift, aten.__lshift__)
        for overload in packet.overloads()
        if overload in ("Tensor", "Tensor_Scalar", "Scalar")
    },
}
