"""An engine that computes one channel, class, output or mask wrongly is found on real batches, whatever the precision; right ones pass."""

import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.onnx.half_precision import lower_precision
from lightning_accel.verification.engine import prove_engine
from lightning_accel.verification.file import prove_file
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.tolerances import ENGINES, FILES
from tests.support.networks import conv, with_statistics
from tests.support.reference_engine import ReferenceRunner


class Detector(nn.Module):
    """Boxes in pixels beside scores in one tensor, logits, an embedding, a class, a mask and one value of each sample."""

    def __init__(self):
        super().__init__()
        sizes = ((3, 16, 2), (16, 24, 2), (24, 24, 1))
        self.body = nn.Sequential(*(conv(a, b, 3, stride, act=nn.ReLU()) for a, b, stride in sizes))
        self.head, self.linear = nn.Conv2d(24, 4 + 6, 1), nn.Linear(24, 8)
        with torch.no_grad():
            self.head.weight *= 4

    def forward(self, x):
        features = self.body(x)
        y = self.head(features).flatten(2)
        pooled = features.mean((2, 3))
        logits = self.linear(pooled)
        return {
            "detections": torch.cat([torch.sigmoid(y[:, :4]) * 640, torch.sigmoid(y[:, 4:] - 2)], 1),
            "logits": logits,
            "embedding": nn.functional.normalize(pooled, dim=1),
            "top": logits.argmax(1),
            "mask": features[:, 0] > 0.5,
            "angle": pooled[:, 0],
        }


@pytest.fixture(scope="module", params=["fp32", "fp16", "int8"])
def proven(request, tmp_path_factory):
    """The network, its proven file, and what an engine in this precision is made of."""
    torch.manual_seed(0)
    x = torch.randn(96, 3, 16, 16)
    module = with_statistics(Detector(), x).eval()
    precision, folder = request.param, tmp_path_factory.mktemp(request.param)
    if precision == "int8":
        module = la.quantize(module, [x], target="onnxruntime")
    export = la.export_onnx(module, x[:2], folder / "m.onnx")
    samples, network = {export.input_names[0]: x.numpy()}, ModuleNetwork(module, export)
    proof = prove_file(export, network, samples, tolerance=FILES["int8" if precision == "int8" else "fp32"])
    file = export.path
    if precision == "fp16":
        file = folder / "half.onnx"
        lower_precision(export.path, file, "fp16", samples=samples)
    return network, samples, proof, file, precision


class Broken:
    """An engine that runs the file as it is and gets something wrong afterwards."""

    def __init__(self, runner, change):
        self.runner, self.change = runner, change
        self.engine = "broken"

    def run(self, feeds):
        return self.change({name: array.copy() for name, array in self.runner.run(feeds).items()})


def proved(proven, change):
    network, samples, proof, file, precision = proven
    with la.load_runner(file, "onnxruntime", emulate=True) as runner:
        return prove_engine(
            network,
            Broken(runner, change),
            samples,
            file=file,
            precision=precision,
            null=proof.null,
            tolerance=ENGINES[precision],
            batch_sizes=(1, 7, 32),
        )[0]


def changed(name, change):
    return lambda outputs: {**outputs, name: change(outputs[name])}


def column(array, channels, value):
    array[:, channels] = value(array[:, channels]) if callable(value) else value
    return array


FAULTS = {
    "all scores zero": (
        changed("detections", lambda y: column(y, slice(4, None), 0.0)),
        "of output detections, axis 1",
    ),
    "one class zero": (changed("detections", lambda y: column(y, 7, 0.0)), "channel 7 of output detections, axis 1"),
    "one box coordinate": (
        changed("detections", lambda y: column(y, 3, 320.0)),
        "channel 3 of output detections, axis 1",
    ),
    "two classes swapped": (
        changed("detections", lambda y: column(y, [4, 5], lambda v: v[:, ::-1])),
        "of output detections, axis 1",
    ),
    "one class of logits": (
        changed("logits", lambda y: column(y, 5, lambda v: -v)),
        "channel 5 of output logits, axis 1",
    ),
    "one channel of an embedding": (
        changed("embedding", lambda y: column(y, 9, 0.0)),
        "channel 9 of output embedding, axis 1",
    ),
    "one value a sample": (changed("angle", lambda y: -y), "channel 0 of output angle, axis 1"),
    "a mask inverted": (changed("mask", lambda y: ~y), "of output mask"),
    "a mask empty": (changed("mask", lambda y: y & False), "the value True of output mask"),
    "classes moved by one": (changed("top", lambda y: (y + 1) % 8), "of output top"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_its_place_named(proven, fault):
    change, place = FAULTS[fault]
    check = proved(proven, change)
    assert any(place in line for line in check.failures), check.failures
    name = place.rpartition("output ")[2].partition(",")[0]
    assert not [line for line in check.failures if " of output " in line and f"of output {name}" not in line]


def test_a_right_engine_passes(proven):
    check = proved(proven, lambda outputs: outputs)
    assert check.passed, check.failures
    assert {name: line["kind"] for name, line in check.outputs.items()} == {
        "detections": "mixed scales",
        "logits": "logits",
        "embedding": "values",
        "top": "integers",
        "mask": "integers",
        "angle": "values",
    }


def test_another_implementation_of_onnx_passes(tmp_path):
    torch.manual_seed(1)
    x = torch.randn(8, 3, 16, 16)
    module = with_statistics(Detector(), x).eval()
    export = la.export_onnx(module, x[:2], tmp_path / "m.onnx")
    samples, network = {export.input_names[0]: x.numpy()}, ModuleNetwork(module, export)
    proof = prove_file(export, network, samples, tolerance=FILES["fp32"], batch_sizes=(8,))
    with ReferenceRunner(export.path) as runner:
        check, _ = prove_engine(
            network,
            runner,
            samples,
            file=export.path,
            precision="fp32",
            null=proof.null,
            tolerance=ENGINES["fp32"],
            batch_sizes=(8,),
        )
    assert check.passed, check.failures
