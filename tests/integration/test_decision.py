"""A run that ends with the choice of what ships."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics.regression import R2Score

import lightning_accel as la
from lightning_accel.benchmarking.comparison import Comparison
from lightning_accel.cli.main import main
from lightning_accel.engines.manifest import read_manifest, resolve_bundle
from lightning_accel.export.logging import scalars
from tests.support.models import Classifier, images, loader

QUICK = la.BenchmarkSettings(
    batches=(1, 8), callers=(1,), seconds=0.1, turn_s=0.01, warmup_s=0.02, min_rounds=4, threads=1
)


def test_the_run_ends_with_the_fastest_variant_within_the_budgets_as_the_default(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    export = la.ModelExport(
        tmp_path / "bundle",
        engines=["onnxruntime", "openvino"],
        budgets=la.Budgets(
            max_drop=100, max_bytes=12_000
        ),  # the float32 file is larger, so that an int8 variant has to ship
        benchmark=QUICK,
    )
    qat = la.QuantizationAwareTraining("portable", start=1)
    trainer(qat, export).fit(Classifier(24), loader(128), DataLoader(images(96, 77), 32))
    bundle = tmp_path / "bundle"
    assert (bundle / "reference.onnx").stat().st_size > 12_000 > (bundle / "model.onnx").stat().st_size
    found = Comparison.from_dict(json.loads((bundle / "comparison.json").read_text()))
    report, manifest = json.loads((bundle / "report.json").read_text()), read_manifest(bundle)
    assert Comparison.from_dict(report["comparison"]).variants == found.variants
    ship = found.decision["ship"]
    assert ship in ("onnxruntime int8", "openvino int8")
    assert resolve_bundle(bundle, None) == (ship.split()[0], bundle / "model.onnx")
    assert manifest["decision"] == found.decision
    assert "its file has" in found.decision["refused"]["onnxruntime fp32"]
    # All of the held-out data, whose accuracy the report counted in another process and by another count.
    rows = {(row["engine"], row["name"].partition(",")[0]): row for row in report["rows"]}
    assert found["onnxruntime fp32"].accuracy == rows["onnxruntime", "network fp32"]["accuracy"]
    assert found["onnxruntime int8"].accuracy == rows["onnxruntime", "network int8"]["accuracy"]
    assert found["openvino int8"].accuracy == rows["openvino", "network int8"]["accuracy"]
    assert found["onnxruntime int8"].agreement > 0.98  # with the trained network, which is the int8 one
    assert found.settings["agreement_with"] == "the trained network"
    assert found.settings["data"] == "96 held-out samples, the validation loader"
    assert f"Decision: {found.decision['why']}" in capsys.readouterr().out
    text = (bundle / "report.md").read_text()
    assert "## Runtime variants" in text
    assert found.decision["why"] in text


def test_the_report_names_a_variant_that_ships_though_the_run_asked_for_no_such_engine(trainer, tmp_path):
    folder = tmp_path / "bundle"
    budgets = la.Budgets(max_drop=100, max_bytes=12_000)  # the PyTorch program, the only engine asked for, is larger
    export = la.ModelExport(folder, engines=["pytorch"], budgets=budgets, benchmark=QUICK)
    trainer(export).fit(Classifier(), loader(64), DataLoader(images(96, 77), 32))
    report, default = json.loads((folder / "report.json").read_text()), read_manifest(folder)["default"]
    assert (folder / "model.pt2").stat().st_size > 12_000 > (folder / "model.onnx").stat().st_size
    assert default["engine"] in ("onnxruntime", "openvino")
    first, ships = report["rows"]
    assert report["ships"] == ships["name"] == f"network fp32, {default['engine']}"
    assert ships["engine"] == default["engine"]
    assert ships["file_bytes"] == (folder / default["file"]).stat().st_size
    assert (ships["correct"], ships["total"]) == (first["correct"], 96)
    assert ships["p50_ms"] > 0
    assert ships["speedup_low"] <= ships["speedup"] <= ships["speedup_high"]
    assert first["speedup"] == 1
    assert read_manifest(folder)["benchmark"]["rows"] == report["rows"]


class Regressor(L.LightningModule):
    """Two numbers for each image: more than one column, and no logits."""

    def __init__(self, outputs=2):
        super().__init__()
        self.net = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, outputs)
        )

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        x, y = batch
        return torch.nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch, index):
        self.log("val_loss", self.training_step(batch, index))

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def values(count, seed, columns=2):
    torch.manual_seed(seed)
    x = torch.randn(count, 1, 8, 8)
    y = torch.stack([x[:, 0, :4].sum((1, 2)), x[:, 0, 4:].sum((1, 2))], 1)[:, :columns]
    return DataLoader(TensorDataset(x, y), 32)


def test_values_are_decided_by_their_r_squared(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    qat = la.QuantizationAwareTraining("portable", start=4)
    export = la.ModelExport(
        tmp_path / "bundle", budgets=la.Budgets(max_drop=100), benchmark=QUICK, keep_samples=64, engines=["onnxruntime"]
    )
    held_out = values(600, 1)
    trainer(qat, export, max_epochs=8).fit(Regressor(), values(512, 2), held_out)
    bundle = tmp_path / "bundle"
    assert (read_manifest(bundle)["output_kind"], read_manifest(bundle)["trained"]) == ("values", "int8")
    found = Comparison.from_dict(json.loads((bundle / "comparison.json").read_text()))
    assert found.settings["output_kind"] == "values"
    variant = found["onnxruntime int8"]
    assert variant.samples == 600  # more than kernels are held against the file on
    x, y = (array.numpy() for array in held_out.dataset.tensors)
    with la.load_runner(bundle / "model.onnx") as runner:
        runner_outputs = runner(x)
    expected = R2Score(multioutput="variance_weighted")(torch.from_numpy(runner_outputs), torch.from_numpy(y))
    assert variant.accuracy == pytest.approx(float(expected), abs=1e-4)
    assert variant.accuracy > 0.8
    assert 0.99 < found["onnxruntime fp32"].agreement < 1
    assert variant.agreement > 0.99999
    rows = {row["name"]: row for row in export.report["rows"]}
    mse = float(((torch.from_numpy(runner_outputs) - torch.from_numpy(y)) ** 2).mean())
    assert rows["network int8"]["metrics"]["val_loss"] == pytest.approx(mse, rel=1e-3)
    assert rows["network fp32"]["metrics"]["val_loss"] == pytest.approx(mse, rel=0.5)
    assert rows["network fp32"]["metrics"] != rows["network int8"]["metrics"]
    assert scalars(export.report)["shipped/val_loss"] == rows[export.report["ships"]]["metrics"]["val_loss"]
    assert "val_loss" in (bundle / "report.md").read_text()
    assert "<th" in (page := (bundle / "report.html").read_text())
    assert "R² of outputs" in page
    # Without labels, from what the bundle says and keeps; from the command line, with labels.
    again = la.benchmark_bundle(bundle, variants=["onnxruntime int8"], settings=QUICK, record=False)
    assert (again.settings["output_kind"], again["onnxruntime int8"].accuracy) == ("values", None)
    assert again["onnxruntime int8"].agreement > 0.99999
    np.savez(tmp_path / "held.npz", **{read_manifest(bundle)["inputs"][0]: x})
    np.save(tmp_path / "values.npy", y)
    arguments = [
        "benchmark",
        str(bundle),
        "--data",
        str(tmp_path / "held.npz"),
        "--variant",
        "onnxruntime int8",
        "--seconds",
        "0.05",
    ]
    assert main([*arguments, "--labels", str(tmp_path / "values.npy"), "--json", str(tmp_path / "found.json")]) == 0
    told = Comparison.from_dict(json.loads((tmp_path / "found.json").read_text()))
    assert told["onnxruntime int8"].accuracy == pytest.approx(variant.accuracy, abs=1e-6)
    capsys.readouterr()
    np.save(tmp_path / "values.npy", y[:, :1])
    assert main([*arguments, "--labels", str(tmp_path / "values.npy")]) == 1
    assert (
        "or the values (600, 2) that the first output should have, but got float32 of shape (600, 1)"
        in capsys.readouterr().err
    )
    assert main([*arguments, "--output-kind", "classes"]) == 0
    assert "R²" not in capsys.readouterr().out


def test_zeros_and_ones_are_no_values_for_logits(trainer, tmp_path):
    loader = DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), (torch.arange(64)[:, None] % 2).float()), 32)
    export = la.ModelExport(tmp_path / "bundle", budgets=la.Budgets(max_drop=100), benchmark=QUICK)
    trainer(export).fit(Regressor(1), loader, loader)
    variant = Comparison.from_dict(export.report["comparison"])["onnxruntime fp32"]
    assert variant.accuracy is None
    assert variant.agreement == pytest.approx(1, abs=1e-6)


class Reconstructing(Regressor):
    """As many outputs as pixels, and class labels in its batches that it has no use for."""

    def __init__(self):
        super().__init__(64)

    def training_step(self, batch, index):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[0].flatten(1))


def test_the_user_says_what_outputs_are(trainer, tmp_path):
    data = DataLoader(TensorDataset(torch.randn(64, 1, 8, 8), torch.arange(64) % 4), 32)
    qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=1)
    export = la.ModelExport(
        tmp_path / "bundle", budgets=la.Budgets(max_drop=100), benchmark=QUICK, output_kind="values"
    )
    trainer(qat, export).fit(Reconstructing(), data, data)
    rows = export.report["rows"]
    assert [(row["name"], row["accuracy"]) for row in rows] == [("network fp32", None), ("network int8", None)]
    assert all(row["metrics"]["val_loss"] > 0 for row in rows)
    found = Comparison.from_dict(export.report["comparison"])
    assert found.settings["output_kind"] == read_manifest(tmp_path / "bundle")["output_kind"] == "values"
    assert found["onnxruntime int8"].accuracy is None
    assert 0.9 < found["onnxruntime fp32"].agreement < 1
    with pytest.raises(ValueError, match=r"Argument `output_kind` must be 'classes', 'values' or None, but got 'r2'"):
        la.ModelExport(output_kind="r2")


class Segmenter(L.LightningModule):
    """A class for each pixel."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Conv2d(1, 3, 3, padding=1)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return torch.nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.05)


def test_a_class_for_each_pixel(trainer, tmp_path):
    x = torch.randn(64, 1, 8, 8)
    y = (x[:, 0] > 0.5).long() + (x[:, 0] > -0.5).long()
    loader = DataLoader(TensorDataset(x, y), 32)
    export = la.ModelExport(tmp_path / "bundle", data=loader, budgets=la.Budgets(max_drop=100), benchmark=QUICK)
    module = Segmenter()
    trainer(export).fit(module, loader)
    found = Comparison.from_dict(export.report["comparison"])
    assert read_manifest(tmp_path / "bundle")["output_kind"] == "classes"
    with torch.no_grad():
        expected = float((module.cpu().eval()(x).argmax(1) == y).float().mean())
    assert found["onnxruntime fp32"].accuracy == pytest.approx(expected, abs=1e-6)


def test_what_was_quantized_without_training_is_held_against_float32(trainer, tmp_path):
    ptq, export = la.PostTrainingQuantization("onnxruntime"), la.ModelExport(tmp_path / "bundle", keep_samples=64)
    trainer(ptq, export).fit(Classifier(), loader(64), DataLoader(images(96, 77), 32))
    assert read_manifest(tmp_path / "bundle")["trained"] == "fp32"
    found = la.benchmark_bundle(tmp_path / "bundle", variants=["onnxruntime int8"], settings=QUICK, record=False)
    assert found.settings["agreement_with"] == "onnxruntime fp32"
    assert found["onnxruntime fp32"].agreement == 1
    assert found["onnxruntime int8"].agreement <= 1


def test_budgets_from_yaml():
    parser = ArgumentParser()  # the one that LightningCLI is built on
    parser.add_class_arguments(la.ModelExport, "export")
    text = "export: {dirpath: b, budgets: {max_drop: 0.5}, benchmark: {batches: [1, 8], threads: 2}}"
    export = parser.instantiate(parser.parse_string(text)).export
    assert export.budgets == la.Budgets(max_drop=0.5)
    assert export.benchmark == la.BenchmarkSettings(batches=(1, 8), threads=2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"benchmark": QUICK}, "Argument `benchmark` must come with `budgets`"),
        (
            {"budgets": la.Budgets(batch=8)},
            r"Argument `budgets` must name a batch size that is measured \(1, 32\), but got 8",
        ),
        (
            {"budgets": la.Budgets(batch=32), "benchmark": QUICK},
            r"Argument `budgets` must name a batch size that is measured \(1, 8\), but got 32",
        ),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        la.ModelExport(**arguments)
