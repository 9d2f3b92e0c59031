"""Measure the speed of an int8 convolution relative to float32 in the same engine.

Correctness is measured by :mod:`~lightning_accel.engines.kernel_probe`.
"""

import math
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from lightning_accel.benchmarking.measure import NOISY, benchmark
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.kernel_forms import Expected, KernelFile

CHANNELS, SIZE = 64, 16


@dataclass(frozen=True)
class Int8Speed:
    """Speed of one engine with one int8 format.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.
        activations: ``"uint8"`` or ``"int8"``.
        weight_max: largest integer of a weight.
        speedup: time of the same engine in float32 divided by that in int8.
        low: lower end of its 95 % interval.
        high: upper end.
        noisy: whether the machine was too noisy: float32 against itself, or the interval, is off by more than a tenth.
    """

    engine: str
    activations: str
    weight_max: int
    speedup: float
    low: float = 0.0
    high: float = math.inf
    noisy: bool = False


def int8_speed(engine: str, activations: str, weight_max: int, *, seconds: float = 0.6) -> Int8Speed:
    """Measure a 3x3 convolution as Q/DQ and in float32.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.
        activations: ``"uint8"`` or ``"int8"``.
        weight_max: largest integer of a weight.
        seconds: time for the measurement.

    Raises:
        MissingPackageError: the engine isn't installed.
    """
    files = _files(Arithmetic(activations, weight_max))
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, Runner] = {}
        try:
            for name, file in files.items():
                path = Path(folder) / f"{name}.onnx"
                onnx.save(file.model(), path)
                runners[name] = load_runner(path, engine, threads=1)
            calls: dict[str, Callable[[], Any]] = {
                name: partial(runner.run, files[name].feeds) for name, runner in runners.items()
            }
            result = benchmark(calls, baseline="float32", max_seconds=seconds, min_rounds=15, warmup_s=seconds / 10)
        finally:
            for runner in runners.values():
                runner.close()
    ratio = result["int8"].speedup
    wide = ratio.high - ratio.low > 2 * NOISY * ratio.value
    return Int8Speed(engine, activations, weight_max, ratio.value, ratio.low, ratio.high, result.noisy or wide)


def _files(arithmetic: Arithmetic) -> dict[str, KernelFile]:
    """The same convolution in int8 and in float32."""
    integers, floats = KernelFile(arithmetic), KernelFile(arithmetic)
    x = integers.activation(CHANNELS, SIZE, SIZE)
    y = integers.quantized(integers.convolution(x, CHANNELS))
    integers.expected.append(Expected(y.name, y.real, 1.0))
    given = floats.given(next(iter(integers.feeds.values())))
    weight = floats.constant(floats.rng.normal(size=(CHANNELS, CHANNELS, 3, 3)).astype(np.float32))
    plain = floats.node("Conv", [given.name, weight], y.real, pads=[1, 1, 1, 1])
    floats.expected.append(Expected(plain.name, plain.real, 1.0))
    return {"int8": integers, "float32": floats}
