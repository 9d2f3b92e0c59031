from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from lightning_accel import VerificationError, export_onnx, load_runner, verify
from lightning_accel.verification.compare import Remembered
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.nodes import check_nodes
from lightning_accel.verification.tolerances import EMULATED_INT8, FLOAT, FP16, KERNEL_INT8
from tests.quantization.graph.test_prepare import make, quantized

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
    network = ModuleNetwork(module, export)
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
    from lightning_accel.quantization.arithmetic.targets import target_of

    module, x = make(name)
    export = export_onnx(module, x, tmp_path / "float.onnx")
    many = torch.randn(200, *x.shape[1:])
    samples = {export.input_names[0]: many.numpy()}
    with load_runner(export.path, emulate=True) as runner:
        result = verify(ModuleNetwork(module, export), runner.run, samples)
    assert result.passed, result.failures
    quantized(module, many, target=target_of(target))
    export = export_onnx(module, x, tmp_path / "int8.onnx")
    with load_runner(export.path, emulate=True) as runner:
        network = ModuleNetwork(module, export)
        result = verify(network, runner.run, samples, tolerance=EMULATED_INT8, check_agreement=False)
    assert result.passed, result.failures


def detector(scores):
    """Boxes in pixels beside scores below 1, as ``(N, 4 + C, A)``."""

    def network(feeds):
        rng = np.random.default_rng(1)
        boxes, own = rng.uniform(0, 640, (40, 4, 6)), rng.uniform(0, 1, (40, 3, 6))
        return {"y": np.concatenate([boxes, scores(own)], 1).astype(np.float32)}

    return network


@pytest.mark.parametrize("tolerance", [FP16, KERNEL_INT8])
def test_a_small_channel_is_held_against_its_own_spread(tolerance):
    """Scores that are all zero are nothing beside boxes of 640 pixels; still they are wrong."""
    right = detector(lambda own: own)
    result = verify(right, detector(lambda own: own * 0), SAMPLES, batch_sizes=(40,), tolerance=tolerance)
    assert result.max_error < tolerance.p99
    assert any(line.startswith("channel 4 of output y, axis 1, is off by") for line in result.failures)
    near = verify(right, detector(lambda own: own * 1.001), SAMPLES, batch_sizes=(40,), tolerance=tolerance)
    assert near.passed
    assert near.worst_channel.startswith("channel ")


@pytest.mark.parametrize("step", [0, 4])
def test_one_time_step_of_a_sequence_is_seen(step):
    x = np.random.default_rng(0).normal(size=(40, 5, 3)).astype(np.float32)

    def wrong(feeds):
        y = x.copy()
        y[:, step] = y[::-1, step]
        return {"y": y}

    result = verify(lambda f: {"y": x}, wrong, SAMPLES, batch_sizes=(40,), tolerance=KERNEL_INT8)
    assert any(f"channel {step} of output y, axis 1" in line for line in result.failures)


def test_integers_and_booleans_are_counted():
    right = lambda feeds: {"class": feeds["x"].argmax(1), "on": feeds["x"] > 0}  # noqa: E731
    wrong = lambda feeds: {"class": (feeds["x"] + 1e-9).argmax(1), "on": feeds["x"] > 0.5}  # noqa: E731
    assert verify(right, right, SAMPLES, batch_sizes=(40,)).equal == 1.0
    result = verify(right, wrong, SAMPLES, batch_sizes=(40,))
    off = ((SAMPLES["x"] > 0) != (SAMPLES["x"] > 0.5)).sum()
    assert result.equal == result.outputs["on"]["equal"] == pytest.approx(1 - off / 200)
    assert result.outputs["class"] == {"kind": "integers", "equal": 1.0}
    assert any(line.startswith("integers and booleans of output on are equal on ") for line in result.failures)
    assert not any("output class" in line for line in result.failures)


def noisy(size, seed):
    def network(feeds):
        return {"y": feeds["x"] + np.random.default_rng(seed).normal(size=(40, 5)) * size}

    return network


def test_a_network_is_held_against_its_own_null_divergence():
    same = lambda feeds: {"y": feeds["x"]}  # noqa: E731
    nulls = {f"noise {i}": verify(same, noisy(1e-3, i), SAMPLES, batch_sizes=(40,)) for i in range(3)}
    as_large = verify(same, noisy(1e-3, 9), SAMPLES, batch_sizes=(40,))
    assert not as_large.passed  # by the tolerance of float32
    judged = as_large.against(nulls)
    assert judged.passed, judged.failures
    assert judged.limits["median"] == pytest.approx(2 * max(n.median_error for n in nulls.values()))
    assert set(judged.null) == set(nulls)
    assert judged.to_dict()["null"]["noise 0"]["p99"] == nulls["noise 0"].p99_error
    larger = verify(same, noisy(4e-3, 9), SAMPLES, batch_sizes=(40,)).against(nulls)
    assert [line.partition(" is ")[0] for line in larger.failures[:3]] == [
        "the median error",
        "the 99th percentile of the error",
        "the largest error",
    ]

    def one_channel(feeds):
        y = noisy(1e-3, 9)(feeds)["y"]
        y[:, 2] += 0.3
        return {"y": y}

    assert any(
        "channel 2 of output y" in f
        for f in verify(same, one_channel, SAMPLES, batch_sizes=(40,)).against(nulls).failures
    )


def test_shapes_are_no_matter_of_noise():
    same = lambda feeds: {"y": feeds["x"]}  # noqa: E731
    short = verify(same, lambda f: {"y": f["x"][:1]}, SAMPLES, batch_sizes=(40,))
    assert any("has shape" in line for line in short.against({"noise": short}).failures)


def test_thresholds_and_predictions_are_held_against_noise():
    logits = np.random.default_rng(0).normal(size=(400, 3))

    def network(size, seed=0):
        return lambda feeds: {"y": logits + np.random.default_rng(seed).normal(size=logits.shape) * size}

    samples = {"x": np.zeros((400, 1), np.float32)}
    nulls = {"noise": verify(network(0), network(0.05, 1), samples, batch_sizes=(400,))}
    assert nulls["noise"].same_side < 1.0
    assert verify(network(0), network(0.05, 2), samples, batch_sizes=(400,)).against(nulls).passed

    def flipped(feeds):  # as far away as noise is, and always to the side of another prediction
        y = network(0.05, 2)(feeds)["y"]
        best = np.sort(logits, 1)
        near = (best[:, 2] - best[:, 1]) < 0.25
        y[near] = np.take_along_axis(logits, logits.argsort(1)[:, ::-1], 1)[near][:, ::-1]
        return {"y": y}

    failures = verify(network(0), flipped, samples, batch_sizes=(400,)).against(nulls).failures
    assert any(line.startswith("predictions agree on") and line.count("of the samples") for line in failures)


def test_a_remembered_network_runs_once_on_the_same_inputs():
    calls = []

    def network(feeds):
        calls.append(len(feeds["x"]))
        return {"y": feeds["x"] * 2.0}

    once, x = Remembered(network), np.arange(12, dtype=np.float32).reshape(6, 2)
    for _ in range(2):
        assert verify(once, network, {"x": x}, batch_sizes=(2, 6)).max_error == 0.0
    assert sum(calls) == 12 + 2 * 12  # once by the remembered one
    # What is equal in size, kind or bytes alone is another input.
    for other in (x + 1, x.astype(np.float64), x.reshape(3, 4), x.view(np.int32), x.T):
        np.testing.assert_array_equal(once({"x": other})["y"], other * 2.0)
    np.testing.assert_array_equal(once({"x": x[::-1]})["y"], x[::-1] * 2.0)


def test_a_remembered_network_keeps_no_more_than_its_limit(monkeypatch):
    monkeypatch.setattr("lightning_accel.verification.compare._REMEMBERED", 100)
    once = Remembered(lambda feeds: {"y": feeds["x"]})
    for value in range(5):
        x = np.full(10, value, np.float32)
        np.testing.assert_array_equal(once({"x": x})["y"], x)
    assert len(once.memory) == 2
