"""What this machine's engines make of int8: measured on one convolution, not read from a list."""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.engines.base import Runner, load_runner

CHANNELS, SIZE = 64, 16
_SCALE = 1 / 64
ACTIVATIONS = {"uint8": (TensorProto.UINT8, 255), "int8": (TensorProto.INT8, 127)}


@dataclass(frozen=True)
class Int8Probe:
    """What one engine does with one int8 format.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.
        activations: ``"uint8"`` or ``"int8"``.
        weight_max: largest integer of a weight.
        error: largest difference from the exact sums, in shares of the output's range.
        speedup: time of the same engine in float32 divided by that in int8.
    """

    engine: str
    activations: str
    weight_max: int
    error: float
    speedup: float

    @property
    def exact(self) -> bool:
        """Whether the sums are right, up to the last rounding of the output to 8 bits."""
        return self.error <= 1.01 / 255


def probe_int8(engine: str, activations: str, weight_max: int, *, seconds: float = 0.6) -> Int8Probe:
    """Run a 3x3 convolution with the largest integers there are, as Q/DQ and in float32.

    Large values of one sign are what saturates: CPUs without VNNI add two products of 8-bit integers in 16 bits.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.
        activations: ``"uint8"`` or ``"int8"``.
        weight_max: largest integer of a weight.
        seconds: time for the measurement.

    Raises:
        ModuleNotFoundError: the engine isn't installed.
    """
    rng = np.random.default_rng(0)
    kind, largest = ACTIVATIONS[activations]
    x = (rng.integers(largest // 2, largest + 1, (8, CHANNELS, SIZE, SIZE)) * _SCALE).astype(np.float32)
    weight = rng.integers(-weight_max, weight_max + 1, (CHANNELS, CHANNELS, 3, 3)).astype(np.int8)
    weight[: CHANNELS // 2] = weight_max  # half of the output channels reach the largest sums
    want = _exact(x, weight)
    span = np.float32(np.abs(want).max())
    with tempfile.TemporaryDirectory() as folder:
        runners: dict[str, Runner] = {}
        for name, integers in (("int8", True), ("float32", False)):
            path = Path(folder) / f"{name}.onnx"
            onnx.save(_model(weight, kind, largest, span, integers), path)
            runners[name] = load_runner(path, engine, threads=1)
        try:
            calls: dict[str, Callable[[], Any]] = {n: partial(r.run, {"x": x}) for n, r in runners.items()}
            got = runners["int8"].run({"x": x})["y"]
            result = benchmark(calls, baseline="float32", max_seconds=seconds, min_rounds=15, warmup_s=seconds / 10)
        finally:
            for runner in runners.values():
                runner.close()
    error = float(np.abs(got - want).max() / (2 * span))
    return Int8Probe(engine, activations, weight_max, error, result["int8"].speedup.value)


def _exact(x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """The convolution in float64: the integers' sums are exact in it."""
    n, c, h, w = x.shape
    padded = np.zeros((n, c, h + 2, w + 2))
    padded[:, :, 1:-1, 1:-1] = x
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), (2, 3))
    return np.einsum("nchwij,ocij->nohw", windows, weight * _SCALE, optimize=True)


def _model(weight: np.ndarray, kind: int, largest: int, span: np.float32, integers: bool) -> onnx.ModelProto:
    low = 128 if kind == TensorProto.UINT8 else 0  # the output has both signs
    constants = {
        "s": np.float32(_SCALE),
        "z": np.zeros((), np.uint8 if kind == TensorProto.UINT8 else np.int8),
        "ws": np.full(CHANNELS, _SCALE, np.float32),
        "wz": np.zeros(CHANNELS, np.int8),
        "w": weight,
        "os": span / np.float32(127),
        "oz": np.array(low, np.uint8 if kind == TensorProto.UINT8 else np.int8),
    }
    if integers:
        nodes = [
            helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
            helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xd"]),
            helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wd"], axis=0),
            helper.make_node("Conv", ["xd", "wd"], ["c"], pads=[1, 1, 1, 1]),
            helper.make_node("QuantizeLinear", ["c", "os", "oz"], ["cq"]),
            helper.make_node("DequantizeLinear", ["cq", "os", "oz"], ["y"]),
        ]
    else:
        constants = {"wf": (weight * np.float32(_SCALE)).astype(np.float32)}
        nodes = [helper.make_node("Conv", ["x", "wf"], ["y"], pads=[1, 1, 1, 1])]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n", CHANNELS, SIZE, SIZE]) for n in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()]
    graph = helper.make_graph(nodes, "probe", value[:1], value[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
