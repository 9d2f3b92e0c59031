"""`effort` of quantization without training: better in each network and target, kept in checkpoints and files, never worse."""

import numpy as np
import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.refinement import steps
from tests.support.models import Classifier, loader
from tests.support.zoo import network, samples


def decibels(module, quantized, x):
    with torch.no_grad():
        want = module(*x)
        return float(10 * torch.log10(want.square().sum() / (want - quantized(*x)).square().sum()))


@pytest.mark.parametrize("name", ["resnet", "depthwise", "unet", "vit", "bert"])
@pytest.mark.parametrize("target", ["onnxruntime", "portable"])
def test_more_effort_is_better_on_other_data(name, target):
    module, calibration, fresh = network(name).eval(), samples(name, 64, seed=1), samples(name, 64, seed=2)
    found = [
        decibels(module, la.quantize(module, [calibration], target=target, effort=effort), fresh)
        for effort in ("low", "standard", "high")
    ]
    low, standard, high = found
    assert standard > low - 0.3
    assert high > max(low, standard) - 0.5


@pytest.mark.parametrize("target", ["onnxruntime", "openvino", "portable", "tensorrt"])
@pytest.mark.parametrize("name", ["depthwise", "vit"])
def test_the_file_computes_what_was_refined(name, target, tmp_path):
    x = samples(name, 16)
    quantized = la.quantize(network(name), [x], target=target, effort="high")
    forward = quantized_forwards(quantized)[""]
    assert any(refined.integers is not None for refined in forward.bank.refined.values())
    export = la.export_onnx(quantized, x, tmp_path / "m.onnx")
    feeds = dict(zip(export.input_names, (t.numpy() for t in x), strict=True))
    with la.load_runner(export.path, "onnxruntime", emulate=True) as runner, torch.no_grad():
        (got,), want = runner.run(feeds).values(), quantized(*x).numpy()
    assert np.median(np.abs(got - want)) <= 1e-6 * np.ptp(want)


def test_dynamic_activations_are_not_refined():
    quantized = la.quantize(network("bert"), [samples("bert", 8)], target="onnxruntime", activations="dynamic")
    assert not quantized_forwards(quantized)[""].bank.refined


def test_what_was_found_is_in_the_checkpoint(trainer, tmp_path):
    run = trainer(la.PostTrainingQuantization("portable", effort="high"), max_epochs=1)
    run.fit(module := Classifier(), loader())
    run.save_checkpoint(tmp_path / "a.ckpt")
    fresh = la.load_from_checkpoint(Classifier, tmp_path / "a.ckpt")
    x = torch.randn(4, 3, 8, 8)
    with torch.no_grad():
        assert torch.equal(module.eval()(x), fresh.eval()(x))
    assert quantized_forwards(fresh)[""].bank.refined


def test_a_step_that_makes_results_worse_is_undone(monkeypatch, caplog):
    def harm(forwards, caller, calls, ranks):
        for forward in forwards:
            forward.bank.low.mul_(0.1)
            forward.bank.high.mul_(0.1)
            forward.bank.refresh()

    x = samples("resnet", 16)
    plain = la.quantize(network("resnet"), [x], target="portable", effort="low")
    monkeypatch.setitem(steps.EFFORTS, "low", (("harm", harm),))
    with caplog.at_level("INFO"):
        harmed = la.quantize(network("resnet"), [x], target="portable", effort="low")
    assert "harm would make the results worse, and is left out" in caplog.text
    with torch.no_grad():
        assert torch.equal(plain(*x), harmed(*x))


def test_a_coarse_network_is_told_with_ways_out():
    module = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 1))
    x = torch.randn(64, 4)
    with torch.no_grad():
        module[2].weight[0, 1::2] = -module[2].weight[0, ::2]
        module[0].weight[1::2] = module[0].weight[::2] * 1.001
        module[0].bias[1::2] = module[0].bias[::2]
        module[2].bias.zero_()
    with pytest.warns(UserWarning, match=r'is coarse: results have .* dB .* \(`onnxruntime`, .* `effort="high"`'):
        la.quantize(module, [x], target="portable", effort="low")


def test_unknown_effort():
    with pytest.raises(
        InvalidArgumentError, match=r"`effort` must be one of \['high', 'low', 'standard', 'trained'\], but got 'max'"
    ):
        la.quantize(nn.Linear(2, 2), [torch.zeros(1, 2)], effort="max")
