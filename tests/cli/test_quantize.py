"""`lightning-accel quantize`: a verified bundle from a checkpoint, without training."""

import json

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.cli.main import main
from tests.cli.test_lightning_cli import Data, _process, pytestmark, told  # noqa: F401 - the fixture and marks serve here too
from tests.support.models import Classifier, images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    trainer = L.Trainer(
        max_epochs=3, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=folder, limit_val_batches=0,
    )  # fmt: skip
    module = Classifier(lr=0.02)
    trainer.fit(module, Data(train=256))
    trainer.save_checkpoint(folder / "best.ckpt")
    return folder / "best.ckpt", module.eval()


class HeldOutForTest(Data):
    """Held out for the test alone, and there only once it is set up for it."""

    val_dataloader = None

    def setup(self, stage):
        if stage == "test":
            self.held = images(self.held_out, seed=1)

    def test_dataloader(self):
        return DataLoader(self.held, 32)


def config(tmp_path):
    content = {
        "model": {"class_path": "tests.support.models.Classifier"},
        "data": {"class_path": "tests.cli.test_lightning_cli.Data"},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False},
    }
    (tmp_path / "data.yaml").write_text(yaml.safe_dump(content))
    return ["-c", str(tmp_path / "data.yaml")]


@pytest.mark.parametrize(("target", "engine"), [("onnxruntime", "onnxruntime"), ("openvino", "openvino")])
def test_a_checkpoint_becomes_a_verified_bundle(checkpoint, tmp_path, capsys, target, engine):
    path, module = checkpoint
    arguments = ["quantize", *config(tmp_path), "--ckpt-path", str(path), "--target", target, "--dirpath", "bundle"]
    assert main([*arguments, "--calibration-batches", "4"]) == 0
    assert "network int8" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert list(manifest["engines"]) == [engine]
    assert all(not line.get("failures") for line in manifest["verification"])
    x = images(32, 7).tensors[0]
    with la.load_runner(tmp_path / "bundle", engine) as runner, torch.no_grad():
        got, want = runner(x.numpy()), module(x).numpy()
    assert np.abs(got - want).max() < 0.1 * np.ptp(want)
    assert not np.array_equal(got, want)


def test_errors_are_told_in_one_line_and_leave_nothing(checkpoint, tmp_path, capfd):
    path, _ = checkpoint
    base = ["quantize", *config(tmp_path), "--dirpath", "bundle"]
    for arguments, expected in (
        ([], "Argument `ckpt_path` must be the path of a checkpoint, but got None"),
        (["--ckpt-path", "none.ckpt"], "none.ckpt"),
        (["--ckpt-path", str(path), "--engine", "tensorrt"], "suit target 'onnxruntime', but got 'tensorrt': its parser refuses uint8"),
        (["--ckpt-path", str(path), "--exclude", "neck"], "`exclude` must match the name of a quantizable operator"),
    ):  # fmt: skip
        assert main([*base, *arguments]) == 1
        assert expected in told(capfd)
        assert not (tmp_path / "bundle").exists()


def test_the_configs_export_says_the_rest(checkpoint, tmp_path, capfd):
    path, _ = checkpoint
    settings = {
        "dirpath": "trained",
        "engines": ["onnxruntime"],
        "precision": "fp16",
        "ckpt_path": "best",
        "data": "test",
    }
    settings |= {"metadata": {"class_names": ["a", "b"]}, "keep_samples": 8}
    export = {"class_path": "lightning_accel.ModelExport", "init_args": settings}
    overlay = tmp_path / "export.yaml"
    data = {"class_path": "tests.cli.test_quantize.HeldOutForTest"}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [export]}, "data": data}))
    base = ["quantize", *config(tmp_path), "-c", str(overlay), "--ckpt-path", str(path), "--calibration_batches", "2"]
    assert main([*base, "--target", "openvino", "--dirpath", "bundle", "--module", "net"]) == 0
    assert not (tmp_path / "trained").exists()
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert (manifest["precision"], list(manifest["engines"])) == ("int8", ["openvino"])
    assert manifest["metadata"] == {"class_names": ["a", "b"]}
    with np.load(tmp_path / "bundle" / "samples.npz") as samples:
        assert {len(array) for array in samples.values()} == {8}

    second = {**export, "init_args": {**settings, "name": "second"}}
    overlay.write_text(yaml.safe_dump({"trainer": {"callbacks": [export, second]}}))
    assert main(base) == 1
    assert "must hold one ModelExport at most, but got 2" in told(capfd)


def test_a_file_or_a_folder_of_the_user_s_is_not_replaced(checkpoint, tmp_path, capfd):
    path, _ = checkpoint
    (tmp_path / "thesis.tex").write_text("mine")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("mine")
    base = ["quantize", *config(tmp_path), "--ckpt-path", str(path), "--dirpath"]
    assert main([*base, "thesis.tex"]) == 1
    assert "Argument `dirpath` must be a folder, but got the file 'thesis.tex'" in told(capfd)
    assert main([*base, "notes"]) == 1
    assert "must be a new folder or an earlier bundle, but got 'notes'" in told(capfd)
    assert {p.read_text() for p in (tmp_path / "thesis.tex", tmp_path / "notes" / "a.txt")} == {"mine"}


def test_a_checkpoint_of_another_network_is_told_in_one_line(checkpoint, tmp_path, capfd):
    path, _ = checkpoint
    base = ["quantize", *config(tmp_path), "--dirpath", "bundle", "--ckpt-path", str(path)]
    assert main([*base, "--model.width", "16"]) == 1
    line = told(capfd)
    assert "must be of the model in the config, Classifier, built with the same arguments, but: " in line
    assert "size mismatch for net.conv1.weight" in line


def test_a_quantized_checkpoint_is_refused(tmp_path, capfd):
    module = Classifier()
    trainer = L.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path, callbacks=[la.QuantizationAwareTraining("portable", start=0)],
        limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, Data())
    trainer.save_checkpoint(tmp_path / "int8.ckpt")
    assert main(["quantize", *config(tmp_path), "--ckpt-path", str(tmp_path / "int8.ckpt")]) == 1
    assert "must be of a float network, but" in told(capfd)


def test_the_callback_and_model_export_in_one_fit(tmp_path):
    export = la.ModelExport(str(tmp_path / "bundle"))
    trainer = L.Trainer(
        max_epochs=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, default_root_dir=tmp_path,
        callbacks=[la.PostTrainingQuantization("onnxruntime", calibration_batches=4), export],
    )  # fmt: skip
    trainer.fit(Classifier(), Data())
    kinds = [row["name"] for row in export.report["rows"]]
    assert "network int8" in kinds
    with pytest.raises(ValueError, match='Argument `ckpt_path` must be "last" with PostTrainingQuantization'):
        L.Trainer(
            max_epochs=1, accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=tmp_path,
            callbacks=[la.PostTrainingQuantization(), la.ModelExport(str(tmp_path / "b"), ckpt_path="best")],
        ).fit(Classifier(), Data())  # fmt: skip
