"""A bundle from Python: a module, a plain network or a checkpoint, without a config and without training."""

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.engines.manifest import read_manifest
from tests.support.models import Classifier, images, loader

ONE = {"engines": ["onnxruntime"], "samples": 16}


def held_out() -> DataLoader:
    return DataLoader(images(64, 7), 16)


def test_a_module_stays_as_it_is_and_ships(tmp_path, capsys):
    module = Classifier().train()
    before = copy.deepcopy(module.state_dict())
    report = la.export_bundle(module, held_out(), tmp_path / "b", **ONE)
    assert module.training
    assert module._trainer is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert report["ships"] == "network fp32"
    assert report["command"] == f"lightning_accel.export_bundle(model, data, '{tmp_path / 'b'}')"
    x, y = images(64, 7).tensors
    with la.load_runner(tmp_path / "b") as runner, torch.no_grad():
        np.testing.assert_allclose(runner(x.numpy()), module.eval()(x).numpy(), rtol=1e-4, atol=1e-5)
        assert report["rows"][0]["correct"] == int((runner(x.numpy()).argmax(1) == y.numpy()).sum())
    assert capsys.readouterr().out.splitlines()[-1].startswith("Ships network fp32 (onnxruntime), the only candidate")


def test_a_plain_network_is_quantized_for_a_target(tmp_path):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 4))

        def forward(self, pixels, scale=None):
            return self.net(pixels)

    network = Two().eval()
    report = la.export_bundle(
        network, held_out(), tmp_path / "b", target="portable", calibration=loader(32), effort="low", **ONE
    )
    assert report["title"] == "Two, as it ships"
    assert [row["name"] for row in report["rows"]] == ["network fp32", "network int8"]
    assert report["rows"][0]["total"] == 64  # the next element of a batch is the target
    manifest = read_manifest(tmp_path / "b")
    assert (manifest["precision"], manifest["trained"], manifest["inputs"]) == ("int8", "fp32", ["pixels"])
    assert not hasattr(network, "_trainer")


def test_a_checkpoint_of_quantization_aware_training_ships_as_trained(trainer, tmp_path):
    qat = la.QuantizationAwareTraining("portable", start=0, calibration_batches=1)
    run = trainer(qat, la.ModelExport(tmp_path / "b", **ONE), max_epochs=1)
    run.fit(Classifier(), loader(32), held_out())
    again = la.export_bundle(f"{tmp_path}/b.ckpt", held_out(), tmp_path / "again", cls=Classifier, **ONE)
    assert read_manifest(tmp_path / "again")["precision"] == "int8"
    assert (tmp_path / "again/model.onnx").read_bytes() == (tmp_path / "b/model.onnx").read_bytes()
    with pytest.raises(
        ValueError, match="Argument `target` must be None for a network that is quantized already, for `portable`"
    ):
        la.export_bundle(
            f"{tmp_path}/b.ckpt", held_out(), tmp_path / "c", cls=Classifier, target="portable", calibration=loader(16)
        )
    assert again["command"].startswith("lightning_accel.export_bundle(")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        (
            {"model": "x.ckpt"},
            ValueError,
            "Argument `cls` must be the LightningModule's class with a checkpoint, but got None",
        ),
        ({"model": "x.ckpt", "cls": Classifier}, FileNotFoundError, "x.ckpt"),
        ({"model": 5}, TypeError, "Argument `model` must be a Module, a string or a path, but got 5"),
        ({"target": "portable"}, ValueError, "Argument `calibration` must come with `target`"),
        ({"calibration": []}, ValueError, "Argument `calibration` must come with `target`"),
        ({"engine": "x"}, TypeError, "unexpected keyword argument 'engine'"),
        ({"precision": "int8"}, ValueError, "Argument `precision` must be"),
    ],
)
def test_bad_arguments(tmp_path, arguments, error, message):
    given = {"model": Classifier(), "data": held_out(), "dirpath": tmp_path / "b", **arguments}
    with pytest.raises(error, match=message) as raised:
        la.export_bundle(given.pop("model"), given.pop("data"), **given)
    assert isinstance(raised.value, la.LightningAccelError)
    assert not (tmp_path / "b").exists()


def test_a_run_from_python_says_how_to_repeat_its_export_in_python(trainer, tmp_path):
    export = la.ModelExport(tmp_path / "b", **ONE)
    trainer(export, max_epochs=1).fit(Classifier(), loader(16), held_out())
    command = export.report["command"]
    assert command == f"lightning_accel.export_bundle('{tmp_path}/b.ckpt', data, '{tmp_path}/b', cls=Classifier)"
    repeated = eval(
        command.replace("/b', cls", "/again', cls"),
        {"lightning_accel": la, "data": held_out(), "Classifier": Classifier},
    )
    assert repeated["rows"][0]["correct"] == export.report["rows"][0]["correct"]
