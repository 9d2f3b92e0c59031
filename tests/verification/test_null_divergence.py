"""How far a network is from itself: noise is put where it was measured, and predicts what engines differ by."""

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper

import lightning_accel as la
from lightning_accel.verification.compare import verify
from lightning_accel.verification.kernels import check_kernels
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.nodes import check_nodes
from lightning_accel.verification.null_divergence import NullDivergence, noisy_runners, one_ulp, with_noise
from lightning_accel.verification.tolerances import EMULATED_INT8, FLOAT, KERNEL_INT8
from tests.support.zoo import network, samples


def chain():
    """``y = relu(x) * 2``, quantized in between with a scale of 0.5."""
    constants = {"two": np.float32(2), "scale": np.float32(0.5), "zero": np.int8(0)}
    nodes = [
        helper.make_node("Relu", ["x"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Mul", ["d", "two"], ["y"]),
    ]
    value = [helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, ["n", 4]) for n in ("x", "y")]
    stored = [numpy_helper.from_array(np.asarray(a), n) for n, a in constants.items()]
    graph = helper.make_graph(nodes, "chain", value[:1], value[1:], stored)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


def run(model, x, folder):
    onnx.save(model, folder / "n.onnx")
    with la.load_runner(folder / "n.onnx", emulate=True) as runner:
        return runner(x)


def test_noise_of_a_kernel_moves_what_lies_on_an_edge_alone(tmp_path):
    x = np.tile(np.array([0.5, 0.75, 1.0, 1.24], np.float32), (2000, 1))  # in steps 1, 1.5 (an edge), 2 and 2.48
    clean, noisy = run(chain(), x, tmp_path), run(with_noise(chain(), steps={"d": 0.01}), x, tmp_path)
    assert (clean[:, [0, 2, 3]] == noisy[:, [0, 2, 3]]).all()
    assert set(np.unique(noisy[:, 1])) == {1.0, 2.0}
    assert 0.4 < (noisy[:, 1] == 1.0).mean() < 0.6
    wider = run(with_noise(chain(), steps={"d": 0.1}), x, tmp_path)
    assert set(np.unique(wider[:, 3])) == {2.0, 3.0}  # 2.48 lies within a tenth of the edge
    assert (wider[:, 0] == clean[:, 0]).all()


def test_noise_of_a_node_has_the_size_that_was_measured(tmp_path):
    x = np.random.default_rng(0).normal(size=(4000, 4)).astype(np.float32)
    off = run(with_noise(chain(), rms={"y": 0.3}), x, tmp_path) - run(chain(), x, tmp_path)
    assert off.std() == pytest.approx(0.3, rel=0.05)
    assert off.mean() == pytest.approx(0.0, abs=0.02)
    other = run(with_noise(chain(), rms={"y": 0.3}, seed=1), x, tmp_path) - run(chain(), x, tmp_path)
    assert abs(np.corrcoef(off.ravel(), other.ravel())[0, 1]) < 0.05


def test_rounding_is_relative(tmp_path):
    x = np.abs(np.random.default_rng(0).normal(size=(4000, 4))).astype(np.float32) + 1
    share = run(with_noise(chain(), rounding="fp16"), x, tmp_path) / run(chain(), x, tmp_path) - 1
    # What is quantized may step to its neighbour; the rest is within the rounding of the product.
    assert np.median(np.abs(share)) < 2**-11
    assert 0 < (np.abs(share) > 2**-10).mean() < 0.02


def test_shapes_carry_no_noise(tmp_path):
    """Sizes that are computed in floating point decide about shapes."""

    class Resized(torch.nn.Module):
        def forward(self, x):
            return torch.nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear").mean((2, 3))

    x = torch.randn(3, 2, 10, 14)
    export = la.export_onnx(Resized(), x, tmp_path / "m.onnx")
    shapes = {
        name: next(iter(runner.run({export.input_names[0]: x.numpy()}).values())).shape
        for name, runner in noisy_runners(export.path, rounding="fp16")
    }
    assert list(shapes.values()) == 4 * [(3, 2)]


def test_inputs_are_moved_by_one_ulp():
    feeds = {"x": np.array([1.0, -1.0, 0.0], np.float32), "i": np.array([1, 2, 3])}
    moved = one_ulp(lambda f: f)(feeds)
    assert (moved["x"] != feeds["x"]).all()
    np.testing.assert_array_equal(np.abs(moved["x"][:2]), np.nextafter(np.float32(1), np.float32(2)))
    assert moved["i"] is feeds["i"]


@pytest.mark.parametrize("name", ["resnet", "vit"])
def test_measured_noise_predicts_what_kernels_differ_by(tmp_path, name):
    """The yardstick is right: local differences, carried through the network, give the difference at its end."""
    inputs = samples(name, 128)
    copy = la.quantize(network(name), [inputs], target="onnxruntime")
    export = la.export_onnx(copy, inputs, tmp_path / "m.onnx")
    feeds = {export.input_names[0]: inputs[0].numpy()}
    reference = ModuleNetwork(copy, export)
    nodes = check_nodes(export.path, export.program, feeds)
    null = NullDivergence(export.path, feeds, nodes.noise, reference, reference.orders())
    isolated = check_kernels(export.path, "onnxruntime", feeds)
    with la.load_runner(export.path, "onnxruntime") as runner:
        check = verify(reference, runner.run, feeds, tolerance=KERNEL_INT8, batch_sizes=(32,))
    expected = [v.p99_error for v in null.noise(KERNEL_INT8, steps=isolated.noise).values()]
    assert 0.4 * min(expected) < check.p99_error < 2.0 * max(expected)
    names = list(null.orders(EMULATED_INT8))
    assert names == ["without oneDNN", "channels last", "inputs moved by one ulp"]


def test_a_float_network_is_as_far_from_itself_as_its_file(tmp_path):
    inputs = samples("resnet", 64)
    module = network("resnet")
    export = la.export_onnx(module, inputs, tmp_path / "m.onnx")
    feeds = {export.input_names[0]: inputs[0].numpy()}
    nodes = check_nodes(export.path, export.program, feeds)
    null = NullDivergence(export.path, feeds, nodes.noise)
    with la.load_runner(export.path, emulate=True) as runner:
        check = verify(ModuleNetwork(module, export), runner.run, feeds, batch_sizes=(32,))
    sizes = [v.p99_error for v in null.noise(FLOAT).values()]
    assert 0.3 * min(sizes) < check.p99_error < 3 * max(sizes)
    assert null.orders(FLOAT) == {}
