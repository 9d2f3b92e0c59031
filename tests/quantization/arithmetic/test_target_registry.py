"""Targets from outside of the package: by object, by registered name, by entry point."""

import json

import pytest
import torch
from jsonargparse import ArgumentParser

import lightning_accel as la
from lightning_accel.quantization.arithmetic.targets import (
    Target,
    cannot_reproduce,
    register_target,
    target_names,
    target_of,
    unregister_target,
)
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.distributions import install
from tests.support.models import Classifier, images, loader

FIVE_BITS = Target("five_bits", "int8", 15, ("onnxruntime",), "weights of 5 bits", operators=("convolution", "linear"))


@pytest.fixture
def registered():
    register_target(FIVE_BITS)
    yield "five_bits"
    unregister_target("five_bits")


def largest_weight(module):
    trained = [convert(forward)[1] for forward in quantized_forwards(module).values()]
    return max(int(integers.abs().max()) for one in trained for integers, *_ in one.weights.values())


@pytest.mark.parametrize("by", ["object", "name"])
def test_a_network_is_quantized_for_it(by, registered):
    target = FIVE_BITS if by == "object" else registered
    x = images(16).tensors[0]
    small = la.quantize(Classifier().eval(), [x], target=target)
    assert largest_weight(small) == 15
    assert largest_weight(la.quantize(Classifier().eval(), [x], target="portable")) == 63
    assert not torch.equal(small(x), Classifier().eval()(x))


def test_a_run_trains_for_it_and_ships_it(registered, trainer, tmp_path):
    qat = la.QuantizationAwareTraining(registered, start=0, calibration_batches=1)
    export = la.ModelExport(tmp_path / "bundle", data="val")  # engines: the target's own
    trainer(qat, export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert list(manifest["engines"]) == ["onnxruntime"]
    assert manifest["precision"] == "int8"


def test_an_entry_point_is_a_target(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Argument `target` must be one of \[.*\], but got 'five_bits'"):
        target_of("five_bits")
    install(tmp_path, "dsp", "lightning_accel.targets", five_bits=f"{__name__}:FIVE_BITS")
    monkeypatch.syspath_prepend(tmp_path)
    assert target_names() == ["tensorrt", "onnxruntime", "openvino", "portable", "five_bits"]
    assert target_of("five_bits") is FIVE_BITS
    assert la.QuantizationAwareTraining("five_bits").target is FIVE_BITS


def test_an_entry_point_that_is_no_target_is_reported(tmp_path, monkeypatch):
    install(tmp_path, "none", "lightning_accel.targets", no_target=f"{__name__}:install")
    monkeypatch.syspath_prepend(tmp_path)
    with (
        pytest.warns(
            UserWarning, match="Entry point `no_target` of group .* it must be of type Target, but it is <function"
        ),
        pytest.raises(ValueError, match=r"Argument `target` must be one of .*, but got 'no_target'"),
    ):
        target_of("no_target")


def test_a_target_in_a_config():
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(la.QuantizationAwareTraining, "qat")
    path = "lightning_accel.quantization.arithmetic.targets.Target"
    own = (
        f"{{class_path: {path}, init_args: {{name: x, activations: int8, weight_max: 7, engines: [openvino], why: w}}}}"
    )
    made = parser.instantiate(parser.parse_string(f"qat: {{target: {own}}}")).qat
    assert (made.target.name, made.target.weight_max) == ("x", 7)


def test_a_name_belongs_to_one_target(registered):
    register_target(FIVE_BITS)  # the same again
    with pytest.raises(ValueError, match="must have a name that no other target has, but got 'five_bits'"):
        register_target(Target("five_bits", "int8", 15, ("openvino",), "another"))
    with pytest.raises(ValueError, match="must have a name that no other target has, but got 'portable'"):
        register_target(Target("portable", "int8", 15, ("openvino",), "another"))
    with pytest.raises(ValueError, match=r"Argument `name` must be one of \['five_bits'\], but got 'portable'"):
        unregister_target("portable")


def test_an_engine_that_is_no_target_can_be_refused_for_one():
    """The refusal names a target that the engine reproduces; the engine's own name need not be one."""
    assert cannot_reproduce(FIVE_BITS, "tensorrt") == ""
    assert cannot_reproduce(FIVE_BITS, "unknown engine") == ""
