"""An engine's kernels, region by region: right ones pass, wrong ones are named, and rounding the other way is told from both."""

import re

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

import lightning_accel as la
from lightning_accel.quantization.arithmetic.targets import cannot_reproduce, target_of
from lightning_accel.verification import kernels
from lightning_accel.verification.kernels import check_kernels
from tests.support.zoo import network, samples


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A residual network in int8, and its inputs."""
    inputs = samples("resnet", 16)
    copy = la.quantize(network("resnet"), [inputs], target="onnxruntime")
    export = la.export_onnx(copy, inputs, tmp_path_factory.mktemp("kernels") / "m.onnx")
    return export.path, {export.input_names[0]: inputs[0].numpy()}


def test_the_file_as_written_is_equal_to_itself(exported):
    path, feeds = exported
    check = check_kernels(path, "onnxruntime", feeds, emulate=True)
    assert (check.largest_step, check.flipped, check.largest_float, check.diverging) == (0, 0.0, 0.0, "")
    pairs = sum(node.op_type == "QuantizeLinear" for node in onnx.load(path).graph.node)
    assert check.regions == pairs + 1  # and the output


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_right_kernels_round_at_most_to_the_neighbour(exported, engine):
    path, feeds = exported
    if cannot_reproduce(target_of("onnxruntime"), engine):
        pytest.skip("this machine's kernels compute something else, as its probe says")
    check = check_kernels(path, engine, feeds)
    assert check.diverging == ""
    assert check.largest_step <= 1
    assert check.farthest < 0.1
    assert all(0.0 <= distance <= check.farthest for distance in check.noise.values())


class Engine:
    """ONNX Runtime on a file that isn't the one it was given: an engine with a fault."""

    def __init__(self, change):
        self.change = change

    def __call__(self, path, engine, **options):
        model = onnx.load(path)
        self.change(model)
        onnx.save(model, path)
        return la.load_runner(path, "onnxruntime", emulate=True)


def truncating(model):
    """Integers are cut off instead of rounded."""
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
    node = [n for n in model.graph.node if n.op_type == "QuantizeLinear" and not n.output[0].endswith("::q")][3]
    half = numpy_helper.from_array(np.asarray(constants[node.input[1]] * np.float32(0.5)), "half_a_step")
    model.graph.initializer.append(half)
    place = list(model.graph.node).index(node)
    model.graph.node.insert(place, onnx.helper.make_node("Sub", [node.input[0], "half_a_step"], ["cut"]))
    node.input[0] = "cut"


def saturating(model):
    """The largest weights of one convolution are cut off."""
    names = {n.input[0] for n in model.graph.node if n.op_type == "DequantizeLinear"}
    tensor = [t for t in model.graph.initializer if t.name in names and len(t.dims) == 4][2]
    tensor.CopyFrom(numpy_helper.from_array(np.clip(numpy_helper.to_array(tensor), -90, 90), tensor.name))


def one_channel(model):
    """One channel of one convolution loses its bias."""
    node = [n for n in model.graph.node if n.op_type == "Conv"][4]
    tensor = next(t for t in model.graph.initializer if t.name == node.input[2])
    bias = numpy_helper.to_array(tensor).copy()
    bias[np.abs(bias).argmax()] = 0.0
    tensor.CopyFrom(numpy_helper.from_array(bias, tensor.name))


def no_residual(model):
    """A sum reads one of its two summands twice."""
    node = [n for n in model.graph.node if n.op_type == "Add"][1]
    node.input[0] = node.input[1]


@pytest.mark.parametrize(
    ("fault", "says"),
    [
        (truncating, r"moved by -0\.\d+ steps on average"),
        (saturating, r"off by up to \d+ steps"),
        (one_channel, r"off by up to \d+ steps"),
        (no_residual, r"off by up to \d+ steps"),
    ],
)
def test_wrong_kernels_are_named(exported, monkeypatch, fault, says):
    path, feeds = exported
    monkeypatch.setattr(kernels, "load_runner", Engine(fault))  # the engine has the fault, not the check
    check = check_kernels(path, "onnxruntime", feeds)
    assert check.diverging.startswith("First diverging kernel: ")
    assert "`" in check.diverging
    assert re.search(says, check.diverging), check.diverging


def test_a_file_without_quantization_has_its_outputs_compared(tmp_path):
    inputs = samples("resnet", 4)
    export = la.export_onnx(network("resnet"), inputs, tmp_path / "m.onnx")
    check = check_kernels(export.path, "onnxruntime", {export.input_names[0]: inputs[0].numpy()})
    assert (check.largest_step, check.noise, check.diverging) == (0, {}, "")
    assert check.largest_float < 1e-5
    assert check.regions >= 1


def test_what_is_concatenated_is_right_or_refused(tmp_path):
    """Isolated kernels and the whole network agree on whether an engine computes it, on each CPU and version."""
    inputs = samples("inception", 16)
    for target in ("portable", "openvino"):
        copy = la.quantize(network("inception"), [inputs], target=target)
        export = la.export_onnx(copy, inputs, tmp_path / f"{target}.onnx")
        feeds = {export.input_names[0]: inputs[0].numpy()}
        check = check_kernels(export.path, "openvino", feeds)
        with la.load_runner(export.path, "openvino") as runner, torch.no_grad():
            want = copy(*inputs).numpy()
            error = float(np.median(np.abs(runner.run(feeds)[export.output_names[0]] - want)) / np.ptp(want))
        assert (error < 5e-3) is (check.diverging == "")


def test_a_tensor_that_is_an_output_and_is_quantized(tmp_path):
    class Features(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.last = torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)

        def forward(self, x):
            features = torch.relu(self.first(x))
            return self.last(features), features

    x = torch.randn(16, 8)
    export = la.export_onnx(la.quantize(Features(), [x], target="onnxruntime"), x, tmp_path / "m.onnx")
    check = check_kernels(export.path, "onnxruntime", {"x": x.numpy()}, emulate=True)
    assert (check.largest_step, check.diverging) == (0, "")
