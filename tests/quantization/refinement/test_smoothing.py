"""Smoothing: outliers of single channels move into weights; in float nothing changes."""

import onnx
import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.refinement.smoothing import smooth_inputs


class Block(nn.Module):
    """A residual block in the form of a transformer's: two layers read one normalized tensor, which the sum reads, too."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.out = nn.LayerNorm(32), nn.Linear(32, 32), nn.Linear(32, 32), nn.Linear(32, 32)
        with torch.no_grad():
            self.norm.weight[3], self.norm.weight[17] = 40.0, 25.0  # outliers in two channels

    def forward(self, x):
        h = self.norm(x)
        return h * 0.01 + self.out(torch.nn.functional.gelu(self.a(h)) * self.b(h).sigmoid())


def prepared(target):
    torch.manual_seed(0)
    module, batches = Block(), [torch.randn(8, 10, 32) for _ in range(3)]
    quantized = la.quantize(module, batches, target=target, effort="low")
    return module, batches, quantized, quantized_forwards(quantized)[""]


def noise(module, quantized, batches):
    with torch.no_grad():
        return float(torch.stack([(module(x) - quantized(x)).square().mean() for x in batches]).mean())


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "portable", "tensorrt"])
def test_outliers_cost_less_and_the_file_is_the_simulation(target):
    module, batches, quantized, forward = prepared(target)
    before = noise(module, quantized, batches)
    with torch.no_grad():
        smooth_inputs([forward], quantized, [((x,), {}) for x in batches])
    assert forward.bank.smooth
    factors = torch.cat(list(forward.bank.smooth.values()))
    assert torch.equal(factors, torch.exp2(factors.log2().round()))
    assert noise(module, quantized, batches) < 0.3 * before
    with torch.no_grad():
        assert torch.equal(quantized(batches[0]), convert(forward)[0](batches[0]))
        forward.bank.active = False
        assert torch.equal(quantized(batches[0]), module(batches[0]))


def test_an_operator_that_is_off_reads_what_the_others_read():
    module, batches, quantized, forward = prepared("onnxruntime")
    with torch.no_grad():
        smooth_inputs([forward], quantized, [((x,), {}) for x in batches])
        forward.bank.off = frozenset({"a"})
        assert noise(module, quantized, batches) < 1e-2
        forward.bank.off = frozenset(forward.quantized)
        assert torch.allclose(quantized(batches[0]), module(batches[0]), atol=1e-5)


def test_training_reads_the_smoothed_weights():
    _, batches, quantized, forward = prepared("onnxruntime")
    with torch.no_grad():
        smooth_inputs([forward], quantized, [((x,), {}) for x in batches])
        evaluated = quantized(batches[0])
        assert torch.allclose(quantized.train()(batches[0]), evaluated, atol=1e-5)


def test_nothing_is_smoothed_where_it_does_not_help():
    torch.manual_seed(0)
    module, batches = nn.Sequential(nn.Linear(32, 32)), [torch.rand(64, 32)]
    quantized = la.quantize(module, batches, target="onnxruntime", effort="low")
    forward = quantized_forwards(quantized)[""]
    before = noise(module, quantized, batches)
    smooth_inputs([forward], quantized, [((x,), {}) for x in batches])
    assert noise(module, quantized, batches) <= before


def test_a_layer_that_reads_several_tensors_keeps_one_set_of_integers():
    class Repeated(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.scale = nn.Linear(32, 32), nn.Parameter(torch.ones(32))
            with torch.no_grad():
                self.scale[3] = 40.0

        def forward(self, x):
            return self.layer(torch.tanh(self.layer(torch.tanh(x) * self.scale)) * self.scale)

    torch.manual_seed(0)
    quantized = la.quantize(Repeated(), [torch.randn(64, 32)], target="onnxruntime", effort="high")
    forward = quantized_forwards(quantized)[""]
    assert not forward.bank.smooth
    weights = [name for name, _ in convert(forward)[0].named_buffers() if name.endswith("weight_int8")]
    assert len(weights) == 1


class Ends(nn.Module):
    """Inputs of a linear layer that come from different operators, with outliers in some channels."""

    def __init__(self, kind):
        super().__init__()
        self.kind, self.a, self.norm, self.out = kind, nn.Linear(32, 32), nn.LayerNorm(32), nn.Linear(32, 32)
        self.conv, self.head = nn.Conv1d(10, 4, 1), nn.Linear(128, 8)
        with torch.no_grad():
            for parameter in (self.a.weight, self.norm.weight):
                parameter[3] *= 40.0

    def forward(self, x):
        if self.kind == "norm":
            return self.out(self.norm(x))
        if self.kind == "product":
            return self.out((x @ x.transpose(1, 2)).softmax(-1) @ self.a(x))
        if self.kind == "mean":
            return self.out(self.a(x).mean(1))
        if self.kind == "flattened":
            return self.head(self.conv(self.a(x).tanh() * 9).flatten(1))
        return self.out(torch.nn.functional.gelu(self.a(x)))


@pytest.mark.parametrize("target", ["portable", "openvino", "onnxruntime"])
@pytest.mark.parametrize(
    ("kind", "scaled", "products"),
    [("norm", 1, 0), ("gelu", 1, 1), ("product", 0, 0), ("mean", 0, 0), ("flattened", 0, 0)],
)
def test_where_the_channels_are_scaled(tmp_path, kind, scaled, products, target):
    """A layer norm takes the factors up; into products of activations, means and pooling engines would fuse them, some wrongly."""
    torch.manual_seed(0)
    module, x = Ends(kind), torch.randn(8, 10, 32)
    quantized = la.quantize(module, [x], target=target, effort="low")
    forward = quantized_forwards(quantized)[""]
    with torch.no_grad():
        smooth_inputs([forward], quantized, [((x,), {})])
    assert len(forward.bank.smooth) == scaled
    assert ("linear with scaled inputs" in forward.forms) is bool(scaled)
    path = la.export_onnx(quantized, x, tmp_path / "n.onnx").path
    nodes = onnx.load(path).graph.node
    assert sum(n.op_type == "Mul" and any("smoothing" in i for i in n.input) for n in nodes) == products
