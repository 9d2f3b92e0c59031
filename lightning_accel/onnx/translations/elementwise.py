"""Functions of single values that ONNX has no operator for."""

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, always, argument

aten = torch.ops.aten


def mean_slope(x: torch.Tensor, lower: float = 1 / 8, upper: float = 1 / 3, *_: Any, **__: Any) -> torch.Tensor:
    """``rrelu`` outside of training: its slope is the middle of the range."""
    return F.leaky_relu(x, (lower + upper) / 2)


def hypotenuse(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``sqrt(x^2 + y^2)``, scaled so that the squares don't overflow."""
    large = torch.maximum(x.abs(), y.abs())
    safe = torch.where(large == 0, torch.ones_like(large), large)
    return large * ((x / safe).square() + (y / safe).square()).sqrt()


def sign_bit(x: torch.Tensor) -> torch.Tensor:
    """Whether a value is below zero, or the negative zero."""
    return (x < 0) | ((x == 0) & (1.0 / x < 0)) if x.is_floating_point() else x < 0


def with_sign(x: torch.Tensor, sign: Any) -> torch.Tensor:
    """Size of ``x`` with the sign of ``sign``."""
    negative = sign_bit(sign) if isinstance(sign, torch.Tensor) else torch.full_like(x, sign < 0, dtype=torch.bool)
    return torch.where(negative, -x.abs(), x.abs())


def _evaluated(node: Node) -> Stand | None:
    return None if argument(node, "training") else mean_slope


RULES: Mapping[Any, Rule] = {
    aten.rrelu.default: _evaluated,
    aten.hypot.default: always(hypotenuse),
    aten.signbit.default: always(sign_bit),
    aten.copysign.Tensor: always(with_sign),
    aten.copysign.Scalar: always(with_sign),
}
