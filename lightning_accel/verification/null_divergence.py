"""Null divergence: the difference between two runs of a network that differ only in rounding.

One flipped rounding changes the sums of the next layer, and spreads. In a deep int8 network every sample has values on the edge
between two integers, so two correct implementations differ by far more than float32's last place. The amount is a property of the
network, so it is measured: the network is compared with itself in another order of summation, and with the noise that was
measured in each of its nodes or kernels. The outputs of an engine are then judged by it (a parametric bootstrap).
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.onnx.file import reads
from lightning_accel.verification.compare import Feeds, Memory, Network, Remembered, verify
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.result import Verification
from lightning_accel.verification.tolerances import Tolerance

REPLICATES = 4  # runs with noise from different seeds; in every other one a channel's noise is the same everywhere
# Largest relative error of a rounding; in float32, of the few that one operator makes.
_ROUNDING = {"fp32": 2.0**-22, "fp16": 2.0**-11, "bf16": 2.0**-8}
_EDGE = 1e-4  # steps: what float32 sums alone move a value by before it is rounded, where none was seen to move
_SAMPLES, _BATCH = 64, 32  # of the comparisons of a network with itself
_NO_ROUNDING = {
    "DequantizeLinear",
    "Cast",
    "Reshape",
    "Transpose",
    "Flatten",
    "Identity",
    "Squeeze",
    "Unsqueeze",
    "Slice",
    "Gather",
}


def with_noise(
    model: onnx.ModelProto,
    *,
    steps: Mapping[str, float] | None = None,
    rms: Mapping[str, float] | None = None,
    rounding: str | None = None,
    seed: int = 0,
    coherent: bool = False,
) -> onnx.ModelProto:
    """Insert nodes that add noise to tensors of a file.

    Args:
        model: the file; stays as it is.
        steps: by dequantized tensor, the largest distance in steps by which a value is moved before it is quantized.
        rms: by floating-point tensor, the standard deviation of what is added to it.
        rounding: ``"fp32"``, ``"fp16"`` or ``"bf16"``: every floating-point tensor is moved by as much as computing in it can.
        seed: of the noise.
        coherent: whether all values of a channel are moved by the same amount before quantization, as by the rounding of a bias.
    """
    noisy = onnx.ModelProto()
    noisy.CopyFrom(model)
    inferred = onnx.shape_inference.infer_shapes(model)
    types = {v.name: v.type.tensor_type for v in (*inferred.graph.value_info, *inferred.graph.output)}
    kinds = {name: kind.elem_type for name, kind in types.items()}
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    nodes = list(noisy.graph.node)
    quantizers = {node.output[0]: node for node in nodes if node.op_type == "QuantizeLinear"}
    wide: dict[str, float] = {}  # QuantizeLinear -> noise in its input's unit
    for node in nodes:
        if node.op_type == "DequantizeLinear" and node.output[0] in (steps or {}) and node.input[0] in quantizers:
            quantize = quantizers[node.input[0]]
            wide[quantize.output[0]] = float(constants[quantize.input[1]]) * max((steps or {})[node.output[0]], _EDGE)
    draw = _Draw(seed, noisy)
    carried = {value.name for value in model.graph.input}  # what depends on the inputs' values, and not on shapes alone
    made: list[NodeProto] = []
    for node in nodes:
        if node.op_type not in ("Shape", "Size") and carried.intersection(reads(node)):
            carried.update(node.output)
        if node.op_type == "QuantizeLinear" and wide.get(node.output[0]):
            channels = _channels(types.get(node.input[0])) if coherent else None
            node.input[0] = draw.uniform(made, node.input[0], wide[node.output[0]], channels)
        made.append(node)
        if node.op_type in _NO_ROUNDING:
            continue
        for i, name in enumerate(node.output):
            if kinds.get(name) != TensorProto.FLOAT or name not in carried:
                continue
            size = (rms or {}).get(name, 0.0)
            if size > 0.0 or rounding:
                node.output[i] = f"{name}::clean"
                if rounding:
                    draw.relative(made, node.output[i], name, _ROUNDING[rounding])
                else:
                    draw.normal(made, node.output[i], name, size)
    del noisy.graph.node[:]
    noisy.graph.node.extend(made)
    return noisy


def _channels(kind: onnx.TypeProto.Tensor | None) -> tuple[int, ...] | None:
    """Shape of one value for each channel: axis 1 of images, the last axis of others; ``None`` where it isn't known."""
    dims = [] if kind is None else list(kind.shape.dim)
    axis = 1 if len(dims) > 3 else len(dims) - 1
    if len(dims) < 2 or not dims[axis].dim_value:
        return None
    return tuple(dims[axis].dim_value if i == axis else 1 for i in range(len(dims)))


class _Draw:
    """Builds nodes that draw noise, each with its own seed."""

    def __init__(self, seed: int, model: onnx.ModelProto) -> None:
        self.next, self.model = 1000.0 * (seed + 1), model
        self.rng = np.random.default_rng(seed)

    def _noise(self, made: list[NodeProto], like: str, kind: str, **settings: float) -> str:
        self.next += 1.0
        name = f"noise::{int(self.next)}"
        made.append(helper.make_node(kind, [like], [name], seed=self.next, **settings))
        return name

    def uniform(self, made: list[NodeProto], source: str, size: float, channels: tuple[int, ...] | None) -> str:
        if channels is None:
            noise = self._noise(made, source, "RandomUniformLike", low=-size, high=size)
        else:
            self.next += 1.0
            noise = f"noise::{int(self.next)}"
            values = self.rng.uniform(-size, size, channels).astype(np.float32)
            self.model.graph.initializer.append(numpy_helper.from_array(values, noise))
        made.append(helper.make_node("Add", [source, noise], [f"{noise}::sum"]))
        return f"{noise}::sum"

    def normal(self, made: list[NodeProto], source: str, target: str, size: float) -> None:
        noise = self._noise(made, source, "RandomNormalLike", mean=0.0, scale=size)
        made.append(helper.make_node("Add", [source, noise], [target]))

    def relative(self, made: list[NodeProto], source: str, target: str, size: float) -> None:
        noise = self._noise(made, source, "RandomUniformLike", low=1.0 - size, high=1.0 + size)
        made.append(helper.make_node("Mul", [source, noise], [target]))


def noisy_runners(path: str | Path, **noise: Any) -> Iterator[tuple[str, Runner]]:
    """``REPLICATES`` copies of a file with noise and their names, each loaded when it is its turn: a session keeps much memory.

    Args:
        path: the file.
        noise: ``steps``, ``rms`` or ``rounding`` of :func:`with_noise`.
    """
    model = onnx.load(path)
    with TemporaryDirectory() as folder:
        for seed in range(REPLICATES):
            file = Path(folder) / f"noise{seed}.onnx"
            noisy = with_noise(model, **noise, seed=seed, coherent=seed % 2 == 1)
            onnx.save(noisy, file, save_as_external_data=noisy.ByteSize() > 2**30)
            with load_runner(file, "onnxruntime", emulate=True) as runner:
                yield f"noise {seed + 1}", runner


@dataclass
class NullDivergence:
    """Null divergence of a network, measured on demand.

    Args:
        path: the file, run as it is written.
        samples: inputs, each ``(S, ...)``; at most 64 samples are used.
        rms: by tensor, the noise that was measured in the file's nodes.
        network: the network in PyTorch; ``None`` if it isn't available.
        others: the same in other orders of summation, by name.
        layout: how samples become the inputs of a call; ``None``: they are.
        written: outputs of the file that are known, see :class:`~lightning_accel.verification.compare.Remembered`.
    """

    path: Path
    samples: Feeds
    rms: Mapping[str, float] = field(default_factory=dict)
    network: Network | None = None
    others: Mapping[str, Network] = field(default_factory=dict)
    layout: Layout | None = None
    written: Memory = field(default_factory=dict)
    _known: dict[Any, dict[str, Verification]] = field(default_factory=dict)

    def orders(self, tolerance: Tolerance) -> dict[str, Verification]:
        """Compare the network in PyTorch with itself in other orders of summation, and on inputs moved by one ulp."""
        if self.network is None:
            return {}
        if "orders" not in self._known:
            found: dict[str, Verification] = {}
            for name, other in {**self.others, "inputs moved by one ulp": one_ulp(self.network)}.items():
                try:
                    found[name] = self._compared(self.network, other, name, tolerance)
                except RuntimeError:  # a `view` that asks for one memory format: this order can't be had
                    continue
            self._known["orders"] = found
        return self._known["orders"]

    def noise(
        self, tolerance: Tolerance, *, steps: Mapping[str, float] | None = None, rounding: str | None = None
    ) -> dict[str, Verification]:
        """Compare the file with itself with noise: of its nodes, of an engine's kernels, or of a precision's roundings.

        Args:
            tolerance: defines which samples are decided.
            steps: noise of an engine's kernels, see :class:`~lightning_accel.verification.kernels.KernelCheck`.
            rounding: ``"fp32"``, ``"fp16"`` or ``"bf16"``; ``None``: the noise measured in the file's nodes, or ``"fp32"`` without one.
        """
        key = (rounding, tuple(sorted((steps or {}).items())))
        if key not in self._known:
            with load_runner(self.path, "onnxruntime", emulate=True) as written:
                clean = Remembered(written.run, self.written)
                self._known[key] = {
                    name: self._compared(clean, runner.run, name, tolerance)
                    for name, runner in self.runners(steps=steps, rounding=rounding)
                }
        return self._known[key]

    def runners(
        self, *, steps: Mapping[str, float] | None = None, rounding: str | None = None
    ) -> Iterator[tuple[str, Runner]]:
        """Copies of the file with noise; arguments as for :meth:`noise`."""
        rounding = rounding or (None if self.rms else "fp32")
        return noisy_runners(self.path, steps=steps, rms=None if rounding else self.rms, rounding=rounding)

    def _compared(self, one: Network, other: Network, name: str, tolerance: Tolerance) -> Verification:
        few = {key: array[:_SAMPLES] for key, array in self.samples.items()}
        if self.layout is not None:
            one, other = self.layout.adapt(one), self.layout.adapt(other)
        return verify(one, other, few, engine=name, tolerance=tolerance, batch_sizes=(_BATCH,))


def one_ulp(network: Network) -> Network:
    """A network whose floating-point inputs are moved to the next float32, away from zero."""

    def run(feeds: Feeds) -> Mapping[str, np.ndarray]:
        moved = {
            name: np.nextafter(array, np.copysign(np.float32(np.inf), array)) if array.dtype == np.float32 else array
            for name, array in feeds.items()
        }
        return network(moved)

    return run
