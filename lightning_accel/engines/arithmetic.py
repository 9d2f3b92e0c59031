"""Description of the integer arithmetic of a file, to select and probe kernels."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Arithmetic:
    """Properties of a file's integer arithmetic that determine the kernels of an engine.

    Args:
        activations: ``"int8"`` with zero point 0, or ``"uint8"``.
        weight_max: largest integer of a weight.
        outputs: whether results of convolutions and sums are always quantized.
        both_summands: whether both operands of a sum are always quantized.
    """

    activations: str
    weight_max: int
    outputs: bool = False
    both_summands: bool = False
