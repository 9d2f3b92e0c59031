"""Integer grids with one scale per group of inputs: rounding, fake-quantization, packing.

``int4``: with ``m`` the value of largest magnitude in a group, with its sign, the scale is ``d = float16(m / -8)`` and the integers are
``q = clamp(floor(w * (1 / (m / -8)) + 8.5), 0, 15) - 8``. This is the rule of ggml's Q4_0 and of ONNX Runtime's MatMulNBits: rounding
values that are on the grid already returns the same integers and scales, so stock quantizers keep what was trained.
``int8``: ``d = float16(max|w| / 127)`` and ``q = round(w / (max|w| / 127))``, the rule of ggml's Q8_0.
"""

from dataclasses import dataclass

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.fake_quant import straight

BITS = (4, 8)
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class GroupGrid:
    """Grid of a weight.

    Args:
        bits: 4 or 8.
        group: number of neighbouring inputs that share a scale; must divide the number of inputs.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> GroupGrid(4, 32)(torch.tensor([[-8.0, 3.3] + [0.4] * 30]))[0, :3]
        tensor([-8.,  3.,  0.])
    """

    bits: int = 4
    group: int = 32

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise InvalidArgumentError(f"Argument `bits` must be one of {BITS}, but got {self.bits!r}.")
        if isinstance(self.group, bool) or not isinstance(self.group, int) or self.group < 8 or self.group % 8:
            raise InvalidArgumentError(
                f"Argument `group` must be a positive multiple of 8, as packed formats need it, but got {self.group!r}."
            )

    def quantize(self, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Integers and scales of a weight.

        Args:
            weight: ``(out, in)``.

        Returns:
            Integers ``(out, in)`` in int8, and scales ``(out, in / group)`` in float16.

        Raises:
            InvalidArgumentError: ``group`` doesn't divide ``in``, or a scale is beyond float16.
        """
        integers, scale = _round(_grouped(weight.detach(), self.group), self.bits)
        half = scale.squeeze(-1).half()
        if not bool(torch.isfinite(half).all()):
            raise InvalidArgumentError(
                f"Argument `weight` must be finite and below {_LARGEST_HALF * 2 ** (self.bits - 1):g}, the largest with a float16 scale, "
                f"but got {float(weight.abs().max()):g}."
            )
        return integers.to(torch.int8).reshape(weight.shape), half

    def dequantize(self, integers: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        """Values ``(out, in)`` in float32 of integers ``(out, in)`` and scales ``(out, in / group)``."""
        groups = integers.float().reshape(*scales.shape, self.group)
        return (groups * scales.float().unsqueeze(-1)).reshape(integers.shape)

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Fake-quantize: round to the grid and back, with a straight-through gradient of 1.

        Args:
            weight: ``(out, in)``.

        Returns:
            Values on the grid, of the shape and dtype of ``weight``.
        """
        integers, scale = _round(_grouped(weight.detach(), self.group), self.bits)
        rounded = integers.mul_(scale).reshape(weight.shape).to(weight.dtype)
        return straight(weight, rounded)


def check_group(name: str, inputs: int, group: int) -> None:
    """Raise unless a group divides the number of inputs of a layer.

    Raises:
        InvalidArgumentError: it doesn't.
    """
    if inputs % group:
        raise InvalidArgumentError(
            f"Argument `group` must divide the inputs of each layer, but got {group} for `{name}` with {inputs} inputs. Leave the layer in "
            f'float: exclude=["{name}"].'
        )


def _grouped(weight: torch.Tensor, group: int) -> torch.Tensor:
    """``(out, in)`` as ``(out, in / group, group)`` in float32."""
    if weight.ndim != 2:
        raise InvalidArgumentError(f"Argument `weight` must be (out, in), but got shape {tuple(weight.shape)}.")
    check_group("weight", weight.shape[1], group)
    return weight.float().reshape(weight.shape[0], weight.shape[1] // group, group)


def _round(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Integers in float32 and float16-rounded scales in float32, ``(out, groups, group)`` and ``(out, groups, 1)``."""
    low, high = torch.aminmax(groups, dim=-1, keepdim=True)
    if bits == 8:
        step = torch.maximum(-low, high) / 127
        inverse = torch.where(step == 0, 0.0, 1.0 / step)
        integers = groups.mul(inverse)
        # roundf of C rounds halves away from zero.
        integers = integers.abs().add_(0.5).floor_().clamp_(max=127).copysign_(groups)
    else:
        extreme = torch.where(-low >= high, low, high)
        if bool(((-low == high) & (high > 0)).any()):  # of equal magnitudes the first one counts
            extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
        step = extreme / -8
        inverse = torch.where(step == 0, 0.0, 1.0 / step)
        integers = groups.mul(inverse).add_(8.5).floor_().clamp_(0, 15).sub_(8)
    scale = step.half().float()
    if bool((scale == 0).any()):  # weights too small for float16 are zeros, whose integers are 0
        integers = integers.masked_fill_(scale == 0, 0.0)
    return integers, scale
