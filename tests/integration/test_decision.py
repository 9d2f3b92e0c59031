"""A run that ends with the choice of what ships."""

import json

import pytest
import torch
from jsonargparse import ArgumentParser
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.benchmarking.comparison import Comparison
from lightning_accel.engines.manifest import read_manifest, resolve_bundle
from tests.models import Classifier, images, loader

QUICK = la.BenchmarkSettings(
    batches=(1, 8), callers=(1,), seconds=0.1, turn_s=0.01, warmup_s=0.02, min_rounds=4, threads=1
)


def test_the_run_ends_with_the_fastest_way_within_the_budgets_as_the_default(trainer, tmp_path, capsys):
    torch.manual_seed(0)
    export = la.ModelExport(
        tmp_path / "bundle",
        engines=["onnxruntime", "openvino"],
        budgets=la.Budgets(
            max_drop=100, max_bytes=12_000
        ),  # the float32 file is larger, so that an int8 way has to ship
        benchmark=QUICK,
    )
    qat = la.QuantizationAwareTraining("portable", start=1)
    trainer(qat, export).fit(Classifier(24), loader(128), DataLoader(images(96, 77), 32))
    bundle = tmp_path / "bundle"
    assert (bundle / "reference.onnx").stat().st_size > 12_000 > (bundle / "model.onnx").stat().st_size
    found = Comparison.from_dict(json.loads((bundle / "comparison.json").read_text()))
    report, manifest = json.loads((bundle / "report.json").read_text()), read_manifest(bundle)
    assert Comparison.from_dict(report["comparison"]).ways == found.ways
    ship = found.decision["ship"]
    assert ship in ("onnxruntime int8", "openvino int8")
    assert resolve_bundle(bundle, None) == (ship.split()[0], bundle / "model.onnx")
    assert manifest["decision"] == found.decision
    assert "its file has" in found.decision["refused"]["onnxruntime fp32"]
    # All of the held-out data, whose accuracy the report counted in another process and another way.
    rows = {(row["engine"], row["name"].partition(",")[0]): row for row in report["rows"]}
    assert found["onnxruntime fp32"].accuracy == rows["onnxruntime", "network fp32"]["accuracy"]
    assert found["onnxruntime int8"].accuracy == rows["onnxruntime", "network int8"]["accuracy"]
    assert found["openvino int8"].accuracy == rows["openvino", "network int8"]["accuracy"]
    assert found["onnxruntime int8"].agreement > 0.98  # with the trained network, which is the int8 one
    assert found.settings["agreement_with"] == "the trained network"
    assert found.settings["data"] == "96 held-out samples, the validation loader"
    assert f"Decision: {found.decision['why']}" in capsys.readouterr().out
    text = (bundle / "report.md").read_text()
    assert "## Ways to run it" in text
    assert found.decision["why"] in text


def test_the_report_names_a_way_that_ships_though_the_run_asked_for_no_such_engine(trainer, tmp_path):
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
