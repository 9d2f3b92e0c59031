from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from lightning_accel import VerificationError, export_onnx, load_runner, verify
from lightning_accel.export.divergence import check_nodes
from lightning_accel.export.evaluate import ModuleNetwork
from lightning_accel.export.tolerances import EMULATED_INT8, FLOAT, KERNEL_INT8
from tests.quantization.test_prepare import make, quantized

SAMPLES = {"x": np.random.default_rng(0).normal(size=(40, 5)).astype(np.float32)}


def linear(weight):
    return lambda feeds: {"y": feeds["x"] @ weight}


def test_errors_against_numpy():
    rng = np.random.default_rng(1)
    weight, off = rng.normal(size=(5, 3)), rng.normal(size=(5, 3)) * 1e-3
    result = verify(linear(weight), linear(weight + off), SAMPLES, batch_sizes=(40,), tolerance=FLOAT)
    want, got = SAMPLES["x"] @ weight, SAMPLES["x"] @ (weight + off)
    error = np.abs(want - got) / (want.max() - want.min())
    assert result.max_error == pytest.approx(error.max(), rel=1e-9)
    assert result.median_error == pytest.approx(np.quantile(error, 0.5, method="lower"), rel=1e-9)
    assert result.p99_error == pytest.approx(np.quantile(error, 0.99, method="higher"), rel=1e-9)
    assert result.agreement == (want.argmax(1) == got.argmax(1)).mean()
    assert (result.samples, result.batch_sizes, result.passed) == (40, {40: 40}, False)


def test_each_batch_size_is_run():
    sizes = []

    def spy(feeds):
        sizes.append(len(feeds["x"]))
        return {"y": feeds["x"]}

    result = verify(spy, lambda feeds: {"y": feeds["x"]}, SAMPLES, batch_sizes=(1, 7, 64), few=10)
    assert sizes == [1] * 10 + [7, 3] + [40]
    assert (result.max_error, result.agreement, result.batch_sizes) == (0.0, 1.0, {1: 10, 7: 10, 40: 40})


def test_agreement_is_held_against_its_limit_where_the_error_cannot_turn_the_order():
    near, far = np.array([[0.0, 1e-3], [0.0, 1.0]]).repeat(20, 0), np.array([[2e-3, 0.0], [0.0, 1.0]]).repeat(20, 0)
    tolerance = replace(KERNEL_INT8, p99=5e-3, maximum=5e-3)
    ties = verify(lambda f: {"y": near}, lambda f: {"y": far}, SAMPLES, batch_sizes=(40,), tolerance=tolerance)
    assert (ties.agreement, ties.decided, ties.agreement_decided, ties.failures) == (0.5, 0.5, 1.0, [])
    # Turned although both were far apart: rare enough for the percentile, and still caught.
    turned = near.copy()
    turned[-1] = turned[-1, ::-1]
    loose = replace(tolerance, maximum=2.0, agreement=0.99)
    result = verify(lambda f: {"y": near}, lambda f: {"y": turned}, SAMPLES, batch_sizes=(40,), tolerance=loose)
    assert any("predictions agree on 95.00% of the samples that are decided" in line for line in result.failures)


@pytest.mark.parametrize(
    ("network", "failure"),
    [
        (lambda f: {"y": f["x"] + 1}, "the median error is"),
        (lambda f: {"y": f["x"] * np.nan}, "the largest error is inf"),
        (lambda f: {"y": f["x"][:, ::-1]}, "predictions agree on"),
        (lambda f: {"y": f["x"][:1]}, "has shape"),
        (lambda f: {"y": f["x"] + (len(f["x"]) == 7)}, "the largest error"),
    ],
)
def test_faults_fail(network, failure):
    result = verify(lambda f: {"y": f["x"]}, network, SAMPLES, batch_sizes=(1, 7, 40))
    assert any(failure in line for line in result.failures)
    with pytest.raises(VerificationError, match=r"Repeat this step with: again"):
        result.raise_if_failed("again")


def test_samples_are_checked():
    same = linear(np.eye(5))
    with pytest.raises(ValueError, match="the same number of samples"):
        verify(same, same, {"x": SAMPLES["x"], "z": SAMPLES["x"][:3]})
    with pytest.raises(ValueError, match="at least 1"):
        verify(same, same, {"x": SAMPLES["x"][:0]})


def scale_a_weight(model):
    tensor = next(t for t in model.graph.initializer if t.name.endswith("conv2.weight"))
    tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * np.float32(1.2), tensor.name))


def wrong_padding(model):
    node = [n for n in model.graph.node if n.op_type == "Conv"][1]
    pads = next(a for a in node.attribute if a.name == "pads")
    pads.ints[:] = [0, 0, 2, 2]


def drop_an_activation(model):
    relu = next(n for n in model.graph.node if n.op_type == "Relu")
    relu.op_type = "Identity"


@pytest.mark.parametrize(
    ("fault", "named"), [(scale_a_weight, "Conv"), (wrong_padding, "Conv"), (drop_an_activation, "Identity")]
)
def test_the_first_diverging_node_is_named(tmp_path, fault, named):
    module, x = make("residual")
    export = export_onnx(module, x, tmp_path / "m.onnx")
    model = onnx.load(export.path)
    fault(model)
    onnx.save(model, export.path)
    network = ModuleNetwork(module, export, ((x,), {}))
    samples = {"x": x.numpy()}
    with load_runner(export.path, emulate=True) as runner:
        assert not verify(network, runner.run, samples).passed
    sentence = check_nodes(export.path, export.program, samples).diverging
    assert named in sentence
    assert "fed the reference's inputs it is off by" in sentence


def test_no_node_is_blamed_for_rounding_flips(tmp_path):
    module, x = make("residual")
    quantized(module, x)
    export = export_onnx(module, x, tmp_path / "q.onnx")
    check = check_nodes(export.path, export.program, {"x": x.numpy()})
    assert (check.diverging, check.nodes) == ("", check.of)


@pytest.mark.parametrize(
    ("name", "target"), [("residual", "onnxruntime"), ("everything", "portable"), ("transformer", "tensorrt")]
)
def test_a_right_file_passes(tmp_path, name, target):
    from lightning_accel.quantization.targets import target_of

    module, x = make(name)
    export = export_onnx(module, x, tmp_path / "float.onnx")
    many = torch.randn(200, *x.shape[1:])
    samples = {export.input_names[0]: many.numpy()}
    with load_runner(export.path, emulate=True) as runner:
        result = verify(ModuleNetwork(module, export, ((x,), {})), runner.run, samples)
    assert result.passed, result.failures
    quantized(module, many, target=target_of(target))
    export = export_onnx(module, x, tmp_path / "int8.onnx")
    with load_runner(export.path, emulate=True) as runner:
        network = ModuleNetwork(module, export, ((x,), {}))
        result = verify(network, runner.run, samples, tolerance=EMULATED_INT8, check_agreement=False)
    assert result.passed, result.failures
