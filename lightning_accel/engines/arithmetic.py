"""Description of the integer arithmetic of a file, to select and probe kernels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arithmetic:
    """Integer arithmetic of a file, as far as it chooses kernels.

    Args:
        activations: ``"int8"`` with zero point 0, or ``"uint8"``.
        weight_max: largest integer of a weight.
        outputs: whether results of convolutions and sums are always quantized.
        both_summands: whether both operands of a sum always are.
    """

    activations: str
    weight_max: int
    outputs: bool = False
    both_summands: bool = False
