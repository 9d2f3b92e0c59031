"""Tolerances for differences between engines and PyTorch, with their reasons.

Errors are shares of the output's range (largest minus smallest reference value over all samples).
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Tolerance:
    """Limits for one kind of implementation.

    Args:
        median: of the errors.
        p99: of the errors.
        maximum: of the errors.
        agreement: least share with the same largest logit, of the samples that are decided by more than twice the 99th
            percentile of the error: errors within it can't change their order.
        metric: most that the user's metric may differ.
        why: the reason for these numbers.
    """

    median: float
    p99: float
    maximum: float
    agreement: float
    metric: float
    why: str


FLOAT = Tolerance(
    median=1e-6,
    p99=1e-5,
    maximum=1e-4,
    agreement=0.999,
    metric=0.001,
    why="the same float32 operators in another order of summation: a few units in the last place, more in deep nets",
)
EMULATED_INT8 = Tolerance(
    median=1e-6,
    p99=2e-2,
    maximum=1e-1,
    agreement=0.995,
    metric=0.005,
    why=(
        "the same integers and float operators; where a last-place difference falls on the edge between two integers one "
        "rounding flips by a whole step, and what lies behind it moves: rare, but visible"
    ),
)
KERNEL_INT8 = Tolerance(
    median=1e-2,
    p99=5e-2,
    maximum=2e-1,
    agreement=0.98,
    metric=0.01,
    why="integer kernels also round biases and sums to integers, where the file computes in float",
)
FP16 = Tolerance(
    median=1e-3,
    p99=5e-3,
    maximum=2e-2,
    agreement=0.99,
    metric=0.005,
    why="each operator rounds to 11 bits, 5e-4 of a value; a few of these add up, in every layer anew",
)
BF16 = Tolerance(
    median=8e-3,
    p99=4e-2,
    maximum=1.6e-1,
    agreement=0.98,
    metric=0.01,
    why="8 bits instead of 11: eight times the rounding of fp16",
)
INT8_FP16 = Tolerance(
    median=2e-2,
    p99=1e-1,
    maximum=3e-1,
    agreement=0.97,
    metric=0.01,
    why=(
        "the trained integers, but what is quantized was rounded to 11 bits before, as were the scales: of the integers "
        "near 127 one in fifteen moves by a step"
    ),
)
FILES = {"fp32": FLOAT, "fp16": FP16, "bf16": BF16, "int8": EMULATED_INT8, "int8+fp16": INT8_FP16}  # as written
ENGINES = {"fp32": FLOAT, "fp16": FP16, "bf16": BF16, "int8": KERNEL_INT8, "int8+fp16": INT8_FP16}  # on their kernels
