"""Show the operators of quantized forwards to taps while calls run."""

from collections.abc import Sequence

from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.quantization.arithmetic.observers import Tap
from lightning_accel.quantization.graph.prepare import QuantizedForward


def observe_operators(
    forwards: Sequence[QuantizedForward],
    taps: Sequence[Tap],
    caller: nn.Module,
    calls: Sequence[Call],
    *,
    quantized: bool,
) -> None:
    """Run calls with one tap on each forward; afterwards quantization is active, and nothing is tapped.

    Args:
        forwards: calibrated forwards that are in place.
        taps: one for each of them.
        caller: module that is called.
        calls: arguments of each call.
        quantized: whether operators are seen quantized, or in float.
    """
    try:
        for forward, tap in zip(forwards, taps, strict=True):
            forward.bank.active, forward.bank.tap = quantized, tap
        for args, kwargs in calls:
            caller(*args, **kwargs)
    finally:
        for forward in forwards:
            forward.bank.active, forward.bank.tap = True, None
