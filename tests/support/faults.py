"""Faults that exported files have had in practice, one function each, to see which checks find them.

A fault changes an ONNX graph in place. `FAULTS` has those of any file, `INTEGER_FAULTS` those of Q/DQ files; whoever checks a file
must find every one of them. What makes a file unreadable (truncation, missing weights, another checksum) is in `damage`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import NodeProto, TensorProto, helper, numpy_helper
from torch import nn
from torch.nn.functional import interpolate

Graph = onnx.ModelProto


class Victim(nn.Module):
    """One of each: convolutions, batch norms, pooling, upsampling, a residual, attention-like softmax, layer norm, dropout.

    Images and references ``(N, 3, 8, 8)`` to logits ``(N, 5)`` and features ``(N, 5)``.
    """

    def __init__(self, eps: float = 1e-5) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.wide, self.pool = nn.Conv2d(8, 8, 3, padding=1), nn.AvgPool2d(3, 1, 1)
        self.weigh, self.drop = nn.Linear(8, 8), nn.Dropout(0.3)
        self.layer_norm, self.act = nn.LayerNorm(8, eps=eps), nn.GELU()
        self.head, self.features = nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, image: torch.Tensor, reference: torch.Tensor) -> dict[str, torch.Tensor]:
        """Logits and features."""
        x = torch.relu(self.norm(self.stem(image)))
        x = torch.relu(x + self.norm2(self.conv(x)))
        y = interpolate(torch.relu(self.wide(self.pool(x)))[:, :, ::2, ::2], scale_factor=2.0)
        tokens = (x + y).flatten(2).transpose(1, 2)  # (N, 64, 8)
        weights = torch.softmax(self.weigh(tokens), 1)
        token = self.layer_norm((weights * tokens).sum(1)) + reference.mean((2, 3)).repeat(1, 3)[:, :8]
        token = self.drop(self.act(token))
        return {"logits": self.head(token), "features": torch.tanh(self.features(token))}


def victim(seed: int = 0) -> Victim:
    """In eval mode, with batch norms that have seen data."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        net = Victim().train()
        for norm in (net.norm, net.norm2):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        with torch.no_grad():
            for _ in range(4):
                net(*inputs(32))
    return net.eval()


def inputs(count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Random inputs of the victim."""
    return torch.randn(count, 3, 8, 8), torch.randn(count, 3, 8, 8) + 1.0


@dataclass(frozen=True)
class Fault:
    """A fault.

    Args:
        change: changes the graph in place.
        at: operator that must be named as the first diverging node; empty where no single node is at fault.
        several: whether that node is one of several that the exporter wrote for one operator.
    """

    change: Callable[[Graph], None]
    at: str = ""
    several: bool = False

    @property
    def name(self) -> str:
        """What it does."""
        return self.change.__name__.replace("_", " ")


def _nodes(model: Graph, kind: str) -> list[NodeProto]:
    return [node for node in model.graph.node if node.op_type == kind]


def _tensor(model: Graph, name: str) -> TensorProto:
    return next(tensor for tensor in model.graph.initializer if tensor.name == name)


def _edit(model: Graph, name: str, change: Callable[[np.ndarray], Any]) -> None:
    tensor = _tensor(model, name)
    array = np.array(change(numpy_helper.to_array(tensor).copy()), order="C")
    tensor.CopyFrom(numpy_helper.from_array(array, name))


def _attribute(node: NodeProto, name: str, value: Any) -> None:
    for attribute in [a for a in node.attribute if a.name == name]:
        node.attribute.remove(attribute)
    if value is not None:
        node.attribute.append(helper.make_attribute(name, value))


def _bypass(model: Graph, node: NodeProto, source: str) -> None:
    """Whoever read the node's output reads ``source``."""
    for reader in model.graph.node:
        if reader is not node:
            for i, name in enumerate(reader.input):
                if name == node.output[0]:
                    reader.input[i] = source


def _insert(model: Graph, after: NodeProto, nodes: list[NodeProto]) -> None:
    place = next(i for i, node in enumerate(model.graph.node) if node is after) + 1
    for offset, node in enumerate(nodes):
        model.graph.node.insert(place + offset, node)


def one_wrong_weight(model: Graph) -> None:
    """A single weight of a convolution."""

    def change(w: np.ndarray) -> np.ndarray:
        w.flat[10] += 0.1
        return w

    _edit(model, _nodes(model, "Conv")[1].input[1], change)


def transposed_kernel(model: Graph) -> None:
    """Height and width of a kernel."""
    _edit(model, _nodes(model, "Conv")[1].input[1], lambda w: w.swapaxes(2, 3))


def transposed_matrix(model: Graph) -> None:
    """Rows and columns of a square matrix."""
    _edit(model, _nodes(model, "MatMul")[0].input[1], lambda w: w.T)


def reordered_channels(model: Graph) -> None:
    """Output channels of a convolution."""
    _edit(model, _nodes(model, "Conv")[1].input[1], lambda w: w[::-1])


def missing_bias(model: Graph) -> None:
    """A convolution without the bias that batch norm left it."""
    del _nodes(model, "Conv")[1].input[2]


def wrong_bias(model: Graph) -> None:
    """The first channel's."""

    def change(b: np.ndarray) -> np.ndarray:
        b[0] += 0.05
        return b

    _edit(model, _nodes(model, "Gemm")[0].input[2], change)


def wrong_padding(model: Graph) -> None:
    """All of it on one side, as TensorFlow's "same" does."""
    _attribute(_nodes(model, "Conv")[1], "pads", [0, 0, 2, 2])


def wrong_stride(model: Graph) -> None:
    """Two instead of one."""
    _attribute(_nodes(model, "Conv")[1], "strides", [2, 2])


def wrong_dilation(model: Graph) -> None:
    """Two instead of one, padded to the same size."""
    _attribute(_nodes(model, "Conv")[1], "dilations", [2, 2])
    _attribute(_nodes(model, "Conv")[1], "pads", [2, 2, 2, 2])


def wrong_activation(model: Graph) -> None:
    """A leaky rectifier."""
    _nodes(model, "Relu")[1].op_type = "LeakyRelu"


def dropped_activation(model: Graph) -> None:
    """None at all."""
    _nodes(model, "Relu")[0].op_type = "Identity"


def approximate_gelu(model: Graph) -> None:
    """Erf replaced by tanh, which is close to it."""
    _nodes(model, "Erf")[0].op_type = "Tanh"


def dropped_residual(model: Graph) -> None:
    """The sum reads one branch twice."""
    add = _nodes(model, "Add")[0]
    add.input[0] = add.input[1]


def off_by_one_layer(model: Graph) -> None:
    """A layer reads what went into its predecessor."""
    relu = _nodes(model, "Relu")[0]
    _nodes(model, "Conv")[1].input[0] = relu.input[0]


def wrong_eps(model: Graph) -> None:
    """Of the layer norm: 1e-3 instead of 1e-5."""
    _attribute(_nodes(model, "LayerNormalization")[0], "epsilon", 1e-3)


def wrong_softmax_axis(model: Graph) -> None:
    """Over channels instead of tokens."""
    _attribute(_nodes(model, "Softmax")[0], "axis", -1)


def older_opset(model: Graph) -> None:
    """The same nodes read as opset 12, in which softmax flattens and means take attributes."""
    model.opset_import[0].version = 12


def padding_not_counted(model: Graph) -> None:
    """Average pooling divides by the pixels inside the picture only."""
    _attribute(_nodes(model, "AveragePool")[0], "count_include_pad", 0)


def wrong_pooling(model: Graph) -> None:
    """The largest instead of the mean."""
    node = _nodes(model, "AveragePool")[0]
    _attribute(node, "count_include_pad", None)
    node.op_type = "MaxPool"


def wrong_resize(model: Graph) -> None:
    """Linear instead of nearest."""
    _attribute(_nodes(model, "Resize")[0], "mode", "linear")


def half_in_the_middle(model: Graph) -> None:
    """A tensor goes through float16."""
    conv = _nodes(model, "Conv")[1]
    first = helper.make_node("Cast", [conv.output[0]], ["half"], to=TensorProto.FLOAT16, name="to_half")
    second = helper.make_node("Cast", ["half"], ["full"], to=TensorProto.FLOAT, name="from_half")
    _bypass(model, conv, "full")
    _insert(model, conv, [first, second])


def active_dropout(model: Graph) -> None:
    """Dropout that still drops: the network was written in training mode."""
    relu = _nodes(model, "Relu")[0]
    model.graph.initializer.append(numpy_helper.from_array(np.float32(0.3), "ratio"))
    model.graph.initializer.append(numpy_helper.from_array(np.bool_(True), "training"))
    _bypass(model, relu, "dropped")
    node = helper.make_node("Dropout", [relu.output[0], "ratio", "training"], ["dropped"], name="dropout", seed=1)
    _insert(model, relu, [node])


def batch_statistics(model: Graph) -> None:
    """Batch norm in training mode: it normalizes with the batch it is given, on top of what was folded."""
    conv = _nodes(model, "Conv")[0]
    for name, value in (("one", 1.0), ("zero", 0.0)):
        model.graph.initializer.append(numpy_helper.from_array(np.full(8, value, np.float32), name))
    _bypass(model, conv, "normalized")
    node = helper.make_node(
        "BatchNormalization",
        [conv.output[0], "one", "zero", "zero", "one"],
        ["normalized", "batch_mean", "batch_var"],
        name="batch_norm",
        training_mode=1,
    )
    _insert(model, conv, [node])


def batch_norm_not_folded(model: Graph) -> None:
    """A convolution whose batch norm was forgotten."""
    _edit(
        model,
        _nodes(model, "Conv")[0].input[1],
        lambda w: w * np.linspace(0.5, 1.5, 8, dtype=np.float32)[:, None, None, None],
    )


def swapped_inputs(model: Graph) -> None:
    """Two inputs of one shape change names."""
    first, second = model.graph.input[0].name, model.graph.input[1].name
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            node.input[i] = {first: second, second: first}.get(name, name)


def swapped_outputs(model: Graph) -> None:
    """Two outputs of one shape change names."""
    first, second = model.graph.output[0].name, model.graph.output[1].name
    for node in model.graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                names[i] = {first: second, second: first}.get(name, name)


def fixed_batch(model: Graph) -> None:
    """The batch is that of the example."""
    for value in model.graph.input:
        value.type.tensor_type.shape.dim[0].dim_value = 1


def stale_weights(model: Graph) -> None:
    """A file of another training, every weight a little different."""
    rng = np.random.default_rng(0)
    for tensor in list(model.graph.initializer):
        if tensor.data_type == TensorProto.FLOAT and len(tensor.dims) > 1:
            _edit(model, tensor.name, lambda w: (w * (1 + 1e-3 * rng.standard_normal(w.shape))).astype(np.float32))


FAULTS = [
    Fault(one_wrong_weight, "Conv"),
    Fault(transposed_kernel, "Conv"),
    Fault(transposed_matrix, "MatMul"),
    Fault(reordered_channels, "Conv"),
    Fault(missing_bias, "Conv"),
    Fault(wrong_bias, "Gemm"),
    Fault(wrong_padding, "Conv"),
    Fault(wrong_stride, "Conv"),
    Fault(wrong_dilation, "Conv"),
    Fault(wrong_activation, "LeakyRelu"),
    Fault(dropped_activation, "Identity"),
    Fault(approximate_gelu, "Tanh", several=True),
    Fault(dropped_residual, "Add"),
    Fault(off_by_one_layer, "Conv"),
    Fault(wrong_eps, "LayerNormalization"),
    Fault(wrong_softmax_axis, "Softmax"),
    Fault(older_opset),
    Fault(padding_not_counted, "AveragePool"),
    Fault(wrong_pooling, "MaxPool"),
    Fault(wrong_resize, "Resize"),
    Fault(half_in_the_middle, "Cast"),
    Fault(active_dropout, "Dropout"),
    Fault(batch_statistics, "BatchNormalization"),
    Fault(batch_norm_not_folded, "Conv"),
    Fault(swapped_inputs),
    Fault(swapped_outputs),
    Fault(fixed_batch),
    Fault(stale_weights, "Conv"),
]


def _scale_of(model: Graph, kind: str) -> str:
    return _nodes(model, kind)[0].input[1]


def dropped_pair(model: Graph) -> None:
    """A tensor that was quantized in training isn't in the file."""
    quantize = _nodes(model, "QuantizeLinear")[1]
    back = next(n for n in _nodes(model, "DequantizeLinear") if n.input[0] == quantize.output[0])
    _bypass(model, back, quantize.input[0])
    model.graph.node.remove(quantize)
    model.graph.node.remove(back)


def wrong_activation_scale(model: Graph) -> None:
    """5 % more."""
    _edit(model, _scale_of(model, "QuantizeLinear"), lambda s: np.asarray(s * np.float32(1.05)))


def wrong_zero_point(model: Graph) -> None:
    """Three steps off."""
    quantize = _nodes(model, "QuantizeLinear")[0]
    old = numpy_helper.to_array(_tensor(model, quantize.input[2]))
    model.graph.initializer.append(numpy_helper.from_array(np.asarray(old + 3, old.dtype), "other_zero_point"))
    back = next(n for n in _nodes(model, "DequantizeLinear") if n.input[0] == quantize.output[0])
    quantize.input[2] = back.input[2] = "other_zero_point"


def _weight_reader(model: Graph) -> NodeProto:
    stored = {tensor.name for tensor in model.graph.initializer}
    return next(n for n in _nodes(model, "DequantizeLinear") if n.input[0] in stored)


def one_wrong_integer(model: Graph) -> None:
    """Eleven steps off."""

    def change(w: np.ndarray) -> np.ndarray:
        w.flat[5] += 11 if w.flat[5] < 0 else -11
        return w

    _edit(model, _weight_reader(model).input[0], change)


def wrong_weight_scale(model: Graph) -> None:
    """Those of two channels change places."""
    _edit(model, _weight_reader(model).input[1], lambda s: s[[1, 0, *range(2, len(s))]])


def one_scale_for_all_channels(model: Graph) -> None:
    """The largest."""
    _edit(model, _weight_reader(model).input[1], lambda s: np.full_like(s, s.max()))


def wrong_axis_of_scales(model: Graph) -> None:
    """Input channels are scaled instead of output channels."""
    square = {tensor.name for tensor in model.graph.initializer if list(tensor.dims[:2]) == [8, 8]}
    node = next(n for n in _nodes(model, "DequantizeLinear") if n.input[0] in square)
    _attribute(node, "axis", 1)


INTEGER_FAULTS = [
    Fault(dropped_pair, "Conv"),
    Fault(wrong_activation_scale, "QuantizeLinear"),
    Fault(wrong_zero_point, "QuantizeLinear"),
    Fault(one_wrong_integer, "DequantizeLinear"),
    Fault(wrong_weight_scale, "DequantizeLinear"),
    Fault(one_scale_for_all_channels, "DequantizeLinear"),
    Fault(wrong_axis_of_scales, "DequantizeLinear"),
]


def damage(path: Path, how: str) -> None:
    """Damage a file as copying does: ``"truncated"``, ``"missing"``, ``"one bit"``, ``"empty"`` or ``"stale"`` (another, valid one)."""
    data = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "stale":
        model = onnx.load_from_string(data)
        stale_weights(model)
        onnx.save(model, path)
    else:
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 1
        path.write_bytes({"truncated": data[: len(data) // 2], "empty": b"", "one bit": bytes(flipped)}[how])
