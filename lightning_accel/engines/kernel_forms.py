"""Build small Q/DQ files with known exact results, one for each form of integer operator.

A file holds several branches: channel counts and zero points for which engines choose different kernels. The reference is
computed in float64, in which sums of products of 8-bit integers are exact. Needs onnx and numpy, and no torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_accel.engines.arithmetic import Arithmetic

_CHANNELS = (4, 32)  # small, and a multiple of every vector width
_SIZE, _BATCH = 8, 4
_SCALE = 2.0**-6
_TINY = (2.0**-30, 2.0**-35, 2.0**-40)  # 9e-10, 3e-11, 9e-13


@dataclass(frozen=True)
class Value:
    """A tensor of the file and its exact values: float64, or integers for indices."""

    name: str
    real: np.ndarray


@dataclass(frozen=True)
class Expected:
    """An output of the file.

    Args:
        name: of the output.
        real: exact values.
        step: quantization step of the output.
    """

    name: str
    real: np.ndarray
    step: float


class KernelFile:
    """Builder of a Q/DQ file and its exact results, node by node.

    Args:
        arithmetic: activations and weights.
        spatial: whether tensors are feature maps ``(N, C, H, W)``; otherwise channels are last.
    """

    def __init__(self, arithmetic: Arithmetic, *, spatial: bool = True) -> None:
        self.arithmetic, self.spatial, self.rng = arithmetic, spatial, np.random.default_rng(0)
        self.signed = arithmetic.activations == "int8"
        self.feeds: dict[str, np.ndarray] = {}
        self.expected: list[Expected] = []
        self._nodes: list[onnx.NodeProto] = []
        self._constants: list[onnx.TensorProto] = []

    def model(self) -> onnx.ModelProto:
        """The ONNX model, with a dynamic batch."""
        kinds = {np.dtype(np.float32): TensorProto.FLOAT, np.dtype(np.int64): TensorProto.INT64}
        inputs = [
            helper.make_tensor_value_info(name, kinds[array.dtype], ["n", *array.shape[1:]])
            for name, array in self.feeds.items()
        ]
        outputs = [
            helper.make_tensor_value_info(e.name, TensorProto.FLOAT, ["n", *e.real.shape[1:]]) for e in self.expected
        ]
        graph = helper.make_graph(self._nodes, "probe", inputs, outputs, self._constants)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)

    def node(self, kind: str, inputs: list[str], real: np.ndarray, **attributes: Any) -> Value:
        """Add an operator and its exact result."""
        name = f"v{len(self._nodes)}"
        self._nodes.append(helper.make_node(kind, inputs, [name], name=f"n{len(self._nodes)}", **attributes))
        return Value(name, real)

    def constant(self, array: Any) -> str:
        """Add a stored tensor."""
        name = f"c{len(self._constants)}"
        self._constants.append(numpy_helper.from_array(np.asarray(array), name))
        return name

    def given(self, array: np.ndarray) -> Value:
        """Add an input of the file."""
        name = f"x{len(self.feeds)}"
        self.feeds[name] = array
        return Value(name, array if array.dtype == np.int64 else array.astype(np.float64))

    def activation(self, *shape: int, zero: int = 0, scale: float = _SCALE) -> Value:
        """Add a quantized input with integers near the ends of their range, where sums are largest."""
        integers = self.rng.integers(64, 128, (_BATCH, *shape))  # of int8
        integers[1::2] = -1 - integers[1::2]
        if not self.signed:
            integers += 128
            integers[::2] = self.rng.integers(128, 256, integers[::2].shape)
        given = self.given(((integers - zero) * scale).astype(np.float32))
        return self.quantized(given, scale, zero)

    def quantized(self, value: Value, scale: float | None = None, zero: int = 0) -> Value:
        """Quantize and dequantize a tensor, by default with the range of its values."""
        low, high = min(value.real.min(), 0.0), max(value.real.max(), 0.0)
        if scale is None and self.signed:
            scale = max(-low, high) / 127
        elif scale is None:
            scale = (high - low) / 255
            zero = round(-low / scale)
        step, kind = np.float32(scale), np.int8 if self.signed else np.uint8
        limits = np.iinfo(kind)
        integers = np.clip(np.rint(value.real / float(step)) + zero, limits.min, limits.max)
        constants = [self.constant(step), self.constant(kind(zero))]
        stored = self.node("QuantizeLinear", [value.name, *constants], integers)
        return self.node("DequantizeLinear", [stored.name, *constants], (integers - zero) * float(step))

    def weight(self, *shape: int, axis: int) -> Value:
        """Add int8 weights: most output channels hold only the largest integers, the others random ones."""
        largest = self.arithmetic.weight_max
        integers = self.rng.integers(-largest, largest + 1, shape)
        channels = np.moveaxis(integers, axis, 0)
        scales = np.full(shape[axis], 2.0**-7, np.float32)
        scales[3::4] = 2.0**-5
        channels[0::4], channels[1::4] = largest, -largest
        channels[2::4] = largest * self.rng.choice([-1, 1], channels[2::4].shape)
        inputs = [self.constant(integers.astype(np.int8)), self.constant(scales)]
        inputs.append(self.constant(np.zeros(shape[axis], np.int8)))
        broad = scales.astype(np.float64).reshape([-1 if a == axis else 1 for a in range(len(shape))])
        return self.node("DequantizeLinear", inputs, integers * broad, axis=axis)

    def convolution(
        self, x: Value, channels: int, *, kernel: int = 3, group: int = 1, bias: float | None = None
    ) -> Value:
        """A convolution with equal input and output size; the default bias has the magnitude of the input."""
        incoming = x.real.shape[1]
        w = self.weight(channels, incoming // group, kernel, kernel, axis=0)
        added = self._bias(channels, np.abs(x.real).max() if bias is None else bias)
        pad = kernel // 2
        padded = np.pad(x.real, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (kernel, kernel), (2, 3))
        parts = zip(np.split(windows, group, 1), np.split(w.real, group, 0), strict=True)
        real = np.concatenate([np.einsum("nchwij,ocij->nohw", a, b, optimize=True) for a, b in parts], 1)
        inputs = [x.name, w.name, self.constant(added)]
        return self.node("Conv", inputs, real + added.reshape(-1, 1, 1), pads=[pad] * 4, group=group)

    def transposed(self, x: Value, channels: int) -> Value:
        """A transposed convolution that doubles the size."""
        n, incoming, height, width = x.real.shape
        w, bias = self.weight(incoming, channels, 2, 2, axis=1), self._bias(channels, np.abs(x.real).max())
        real = np.einsum("nchw,coij->nohiwj", x.real, w.real, optimize=True)
        real = real.reshape(n, channels, 2 * height, 2 * width) + bias.reshape(-1, 1, 1)
        return self.node("ConvTranspose", [x.name, w.name, self.constant(bias)], real, strides=[2, 2])

    def linear(self, x: Value, channels: int) -> Value:
        """A linear layer, as it is exported for two dimensions and for more."""
        w, bias = self.weight(channels, x.real.shape[-1], axis=0), self._bias(channels, np.abs(x.real).max())
        real = x.real @ w.real.T
        if x.real.ndim == 2:
            return self.node("Gemm", [x.name, w.name, self.constant(bias)], real + bias, transB=1)
        turned = self.node("Transpose", [w.name], w.real.T, perm=[1, 0])
        product = self.node("MatMul", [x.name, turned.name], real)
        return self.node("Add", [product.name, self.constant(bias)], real + bias)

    def rectified(self, x: Value) -> Value:
        """A rectifier."""
        return self.node("Relu", [x.name], np.maximum(x.real, 0))

    def matmul(self, a: Value, b: Value) -> Value:
        """A product of two activations."""
        return self.node("MatMul", [a.name, b.name], a.real @ b.real)

    def sum(self, a: Value, b: Value) -> Value:
        """A sum of two."""
        return self.node("Add", [a.name, b.name], a.real + b.real)

    def joined(self, a: Value, b: Value) -> Value:
        """A concatenation along the channels."""
        return self.node("Concat", [a.name, b.name], np.concatenate([a.real, b.real], 1), axis=1)

    def output(self, value: Value, *, quantized: bool) -> None:
        """Add a tensor to the outputs; a quantized one through a layer that computes the identity.

        The outputs of exported networks are not quantized, and the fusions of engines depend on the next operator.
        """
        span = max(value.real.max(), 0.0) - min(value.real.min(), 0.0)
        step = max(-value.real.min(), value.real.max()) / 127 if self.signed else span / 255
        final = self._read(self.quantized(value)) if quantized else value
        self.expected.append(Expected(final.name, final.real, float(step)))

    def _read(self, x: Value) -> Value:
        channels = x.real.shape[1 if self.spatial else -1]
        one, scales = np.eye(channels, dtype=np.int8), self.constant(np.ones(channels, np.float32))
        zeros = self.constant(np.zeros(channels, np.int8))
        if self.spatial:
            stored = self.constant(one[:, :, None, None])
            w = self.node("DequantizeLinear", [stored, scales, zeros], one, axis=0)
            return self.node("Conv", [x.name, w.name], x.real)
        w = self.node("DequantizeLinear", [self.constant(one), scales, zeros], one, axis=0)
        turned = self.node("Transpose", [w.name], one, perm=[1, 0])
        return self.node("MatMul", [x.name, turned.name], x.real)

    def outputs(self, make: Callable[[], Value], *, always: bool | None = None) -> None:
        """Add results to the outputs in each form of the target: quantized and, unless results always are, in float.

        Args:
            make: adds the operator; called for each form, so that no result has two readers.
            always: whether results are always quantized; default: as those of convolutions and sums.
        """
        for quantized in (True,) if (self.arithmetic.outputs if always is None else always) else (True, False):
            self.output(make(), quantized=quantized)

    @property
    def zeros(self) -> tuple[int, ...]:
        """Zero points of a tensor without negative values, and of another one."""
        return (0,) if self.signed else (0, 131)

    def _bias(self, channels: int, largest: float) -> np.ndarray:
        return (largest * self.rng.integers(-64, 65, channels) / 64).astype(np.float32)


def _variants(file: KernelFile) -> Iterator[tuple[int, int]]:
    """Channels and zero points."""
    return ((channels, zero) for channels in _CHANNELS for zero in file.zeros)


def _convolution(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        file.outputs(partial(file.convolution, x, channels))
        file.outputs(partial(_rectified, file, partial(file.convolution, x, channels, kernel=1)))


def _rectified(file: KernelFile, make: Callable[[], Value]) -> Value:
    return file.rectified(make())


def _depthwise(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        file.outputs(partial(file.convolution, x, channels, group=channels))


def _grouped(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        file.outputs(partial(file.convolution, x, channels, group=2))


def _transposed(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        file.outputs(partial(file.transposed, x, channels))


def _linear(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        for shape in ((channels,), (5, channels)):
            file.outputs(partial(file.linear, file.activation(*shape, zero=zero), channels), always=False)


def _scaled_linear(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        for shape in ((channels,), (5, channels)):
            x = file.activation(*shape, zero=zero)
            hidden = file.rectified(file.linear(x, channels))
            file.output(file.linear(_scaled(file, hidden, channels), channels), quantized=False)
            given = file.given(file.rng.normal(size=(_BATCH, *shape)).astype(np.float32))
            file.output(file.linear(_scaled(file, given, channels), channels), quantized=False)


def _scaled(file: KernelFile, x: Value, channels: int) -> Value:
    """A tensor whose channels are multiplied by powers of two, quantized."""
    factor = np.exp2(file.rng.integers(-3, 3, channels)).astype(np.float32)
    return file.quantized(file.node("Mul", [x.name, file.constant(factor)], x.real * factor))


def _dynamic_linear(file: KernelFile) -> None:
    for channels in _CHANNELS:
        x = file.given(file.rng.normal(size=(_BATCH, 5, channels)).astype(np.float32) + np.float32(2))
        low, high = min(float(x.real.min()), 0.0), max(float(x.real.max()), 0.0)
        step = np.float32((np.float32(high) - np.float32(low)) / np.float32(255))
        zero = float(np.clip(np.rint(-low / float(step)), 0, 255))
        integers = np.clip(np.rint(x.real / float(step)) + zero, 0, 255)
        names = [f"d{len(file._nodes)}_{part}" for part in ("q", "s", "z")]
        file._nodes.append(helper.make_node("DynamicQuantizeLinear", [x.name], names))
        largest = file.arithmetic.weight_max
        w = np.full((channels, channels), largest)
        w[:, 1::2] = file.rng.integers(-largest, largest + 1, w[:, 1::2].shape)
        sums = (integers - zero) @ w
        product = file.node("MatMulInteger", [names[0], file.constant(w.astype(np.int8)), names[2]], sums)
        cast = file.node("Cast", [product.name], sums, to=TensorProto.FLOAT)
        scale = file.constant(np.full(channels, 2.0**-7, np.float32))
        scales = file.node("Mul", [names[1], scale], np.array(float(step) * 2.0**-7))
        y = file.node("Mul", [cast.name, scales.name], sums * scales.real)
        file.output(y, quantized=False)


def _matmul(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        file.outputs(partial(_product, file, channels, zero), always=False)


def _product(file: KernelFile, channels: int, zero: int) -> Value:
    a, b = (file.activation(2, *shape, zero=zero) for shape in ((5, channels), (channels, 5)))
    return file.matmul(a, b)


def _shared_matmul(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        y = _product(file, channels, zero)
        file.output(y, quantized=True)
        file.output(y, quantized=False)


def _attention(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        file.outputs(partial(_attended, file, channels, zero), always=False)


def _attended(file: KernelFile, channels: int, zero: int) -> Value:
    q, k, v = (file.activation(2, *s, zero=zero) for s in ((5, channels), (channels, 5), (5, channels)))
    scores = file.matmul(q, k)
    factor = np.float32(
        2 / np.abs(scores.real).max()
    )  # attention weights of all magnitudes, instead of a single large one
    scaled = file.node("Mul", [scores.name, file.constant(factor)], scores.real * float(factor))
    powers = np.exp(scaled.real - scaled.real.max(-1, keepdims=True))
    weights = file.node("Softmax", [scaled.name], powers / powers.sum(-1, keepdims=True), axis=-1)
    return file.matmul(file.quantized(weights), v)


def _sum(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        for both in (True,) if file.arithmetic.both_summands else (True, False):
            file.outputs(partial(_summed, file, x, channels, both))
            file.outputs(partial(_rectified, file, partial(_summed, file, x, channels, both)))


def _summed(file: KernelFile, x: Value, channels: int, both: bool) -> Value:
    convolved, side = file.convolution(x, channels), file.quantized(file.convolution(x, channels, kernel=1))
    return file.sum(file.quantized(convolved) if both else convolved, side)


def _pooling(file: KernelFile) -> None:
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        n, c, height, width = x.real.shape
        blocks = x.real.reshape(n, c, height // 2, 2, width // 2, 2)
        largest = file.node("MaxPool", [x.name], blocks.max((3, 5)), **window)
        file.output(file.convolution(largest, channels), quantized=True)
        file.output(file.node("AveragePool", [x.name], blocks.mean((3, 5)), **window), quantized=True)
        axes = file.constant(np.array([2, 3], np.int64))
        file.output(file.node("ReduceMean", [x.name, axes], x.real.mean((2, 3), keepdims=True)), quantized=True)


def _embedding(file: KernelFile) -> None:
    for channels in _CHANNELS:
        rows = file.rng.integers(-file.arithmetic.weight_max, file.arithmetic.weight_max + 1, (11, channels))
        indices = file.given(file.rng.integers(0, len(rows), (_BATCH, 5)))
        taken = file.node("Gather", [file.constant(rows.astype(np.int8)), indices.name], rows[indices.real], axis=0)
        scale, zero = file.constant(np.float32(_SCALE)), file.constant(np.int8(0))
        x = file.node("DequantizeLinear", [taken.name, scale, zero], taken.real * _SCALE)
        # The same grid: a rounding in between would be as large as one of the result.
        requantized = file.quantized(x, _SCALE, 0 if file.signed else 128)
        file.output(file.linear(requantized, channels), quantized=False)


def _concatenation(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        x = file.activation(channels, _SIZE, _SIZE, zero=zero)
        file.output(_joined(file, x, channels), quantized=False)
        joined = _joined(file, x, channels)
        hidden = file.quantized(file.rectified(file.convolution(joined, channels, kernel=1)))
        file.outputs(partial(file.convolution, hidden, channels))
        y = file.activation(channels, _SIZE, _SIZE, zero=zero)
        file.outputs(partial(_reading, file, x, y, channels))


def _reading(file: KernelFile, x: Value, y: Value, channels: int) -> Value:
    return file.convolution(file.joined(x, y), channels, kernel=1)


def _shared_concatenation(file: KernelFile) -> None:
    for channels, zero in _variants(file):
        joined = _joined(file, file.activation(channels, _SIZE, _SIZE, zero=zero), channels)
        file.output(joined, quantized=False)
        file.outputs(partial(file.convolution, joined, channels, kernel=1))


def _joined(file: KernelFile, x: Value, channels: int) -> Value:
    """Results of two convolutions, quantized with one scale and concatenated."""
    a, b = file.convolution(x, channels), file.convolution(x, channels)
    both = np.concatenate([a.real, b.real])
    low, high = min(both.min(), 0.0), max(both.max(), 0.0)
    scale = max(-low, high) / 127 if file.signed else (high - low) / 255
    zero = 0 if file.signed else round(-low / scale)
    return file.joined(*(file.quantized(value, scale, zero) for value in (a, b)))


def _tiny(file: KernelFile) -> None:
    for scale in _TINY:
        x = file.activation(_CHANNELS[1], _SIZE, _SIZE, scale=scale)
        file.output(file.convolution(x, _CHANNELS[1]), quantized=True)
        # The bias of a folded batch norm may exceed int32 in the steps of small products.
        file.output(file.convolution(x, _CHANNELS[1], bias=1.0), quantized=True)


BUILDERS: dict[str, Callable[[KernelFile], None]] = {
    "convolution": _convolution,
    "depthwise convolution": _depthwise,
    "grouped convolution": _grouped,
    "transposed convolution": _transposed,
    "linear": _linear,
    "linear with scaled inputs": _scaled_linear,
    "dynamic linear": _dynamic_linear,
    "matmul": _matmul,
    "matmul also read in float": _shared_matmul,
    "attention": _attention,
    "sum": _sum,
    "pooling": _pooling,
    "embedding": _embedding,
    "concatenation": _concatenation,
    "concatenation also read in float": _shared_concatenation,
    "tiny scales": _tiny,
}


_CHANNELS_LAST = (
    "linear",
    "linear with scaled inputs",
    "dynamic linear",
    "matmul",
    "matmul also read in float",
    "attention",
    "embedding",
)


def kernel_file(form: str, arithmetic: Arithmetic) -> KernelFile:
    """Build the file of a form.

    Args:
        form: one of :data:`BUILDERS`.
        arithmetic: activations and weights.
    """
    file = KernelFile(arithmetic, spatial=form not in _CHANNELS_LAST)
    BUILDERS[form](file)
    return file
