"""The fastest candidate that isn't worse than float32 ships; float32 where nothing is."""

import json

import numpy as np
import pytest
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.benchmarking.measure import Ratio
from lightning_accel.engines.manifest import read_manifest, resolve_bundle
from lightning_accel.export.default_rule import choose_default
from lightning_accel.export.quality import Change, Scores
from tests.support.models import Classifier, images, loader

FLOAT, INT8, OTHER = "network fp32", "network int8", "network int8, openvino"
LABELS = [FLOAT, INT8, OTHER]


def right(share: float) -> Scores:
    return Scores(np.arange(1000) < 1000 * share)


def choose(int8=0.9, other=0.9, fast=(1.5, 1.4, 1.6), faster=(2.0, 1.9, 2.1), **options):
    scores = {FLOAT: right(0.9), INT8: right(int8), OTHER: right(other)}
    speeds = {FLOAT: Ratio(1, 1, 1), INT8: Ratio(*fast), OTHER: Ratio(*faster)}
    return choose_default(LABELS, FLOAT, scores, speeds, options.pop("quiet", 1.02), modes={}, **options)


def test_the_fastest_that_is_not_worse_ships():
    choice = choose()
    assert (choice.ships, choice.why) == (
        OTHER,
        "the fastest candidate that is not worse than float32 of the same network",
    )
    assert choice.refused[INT8].reason == f"slower than {OTHER}"


def test_what_is_worse_beyond_its_interval_does_not_ship_however_fast_it_is():
    choice = choose(other=0.87)
    assert choice.ships == INT8
    assert choice.refused[OTHER].reason.startswith("worse than float32 beyond its interval: -3.00 points [-4.")
    assert choose(other=0.899).ships == OTHER  # a thousandth is within the interval of 1,000 samples


def test_equal_accuracy_and_a_third_of_the_speed_does_not_ship():
    choice = choose(fast=(0.31, 0.30, 0.32), faster=(0.5, 0.4, 0.6))
    assert choice.ships == FLOAT
    assert choice.refused[INT8].reason == "slower than float32: 0.31x [0.30, 0.32] its speed"
    assert choice.why == f"since `{INT8}` is slower and `{OTHER}` is slower"


def test_what_the_null_run_gives_too_is_no_speed_up():
    choice = choose(fast=(1.05, 1.01, 1.09), faster=(0.9, 0.8, 1.1), quiet=1.03)
    assert choice.ships == FLOAT
    assert choice.refused[INT8].short == "not clearly faster"
    assert choose(fast=(1.05, 1.01, 1.09), faster=(0.9, 0.8, 1.1), quiet=1.005).ships == INT8


def test_training_that_cost_accuracy_against_ptq_does_not_ship():
    choice = choose(
        trained={INT8: Change("accuracy", -0.11, -0.13, -0.09), OTHER: Change("accuracy", -0.11, -0.13, -0.09)}
    )
    assert choice.ships == FLOAT
    assert "quantization-aware training cost accuracy, -11.00 points [-13.00, -9.00]" in choice.refused[INT8].reason


def test_where_nothing_says_how_good_they_are_float32_ships():
    speeds = {FLOAT: Ratio(1, 1, 1), INT8: Ratio(3, 2.9, 3.1)}
    none = {FLOAT: Scores(), INT8: Scores()}
    choice = choose_default([FLOAT, INT8], FLOAT, none, speeds, 1.0, modes={})
    assert (choice.ships, choice.refused[INT8].short) == (FLOAT, "of unknown quality")
    assert choose_default([FLOAT, INT8], FLOAT, none, speeds, 1.0, modes={}, exact=[INT8]).ships == INT8


def test_a_single_candidate_needs_no_reason():
    assert choose_default([FLOAT], FLOAT, {}, {FLOAT: Ratio(1, 1, 1)}, 1.0, modes={}).why == "the only candidate"


class Dense(Classifier):
    """Learns the images of the tests in a few epochs, and from the fourth on other labels if it is to be ruined."""

    def __init__(self, ruined: bool):
        super().__init__(lr=0.02)
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 4))
        self.ruined = ruined

    def training_step(self, batch, index):
        x, y = batch
        return super().training_step((x, (y + 1) % 4 if self.ruined and self.current_epoch == 3 else y), index)


@pytest.mark.parametrize("ruined", [False, True], ids=["int8 as good", "int8 ruined"])
def test_a_run_ships_by_the_rule_and_says_so_last(trainer, tmp_path, capsys, ruined):
    """Independently of the rule: from the rows of the report."""
    folder = tmp_path / "bundle"
    qat = la.QuantizationAwareTraining("onnxruntime", start=3, calibration_batches=2)
    export = la.ModelExport(folder, engines=["onnxruntime"], samples=32)
    trainer(qat, export, max_epochs=4).fit(Dense(ruined), loader(512), DataLoader(images(512, 77), 64))
    report, manifest = json.loads((folder / "report.json").read_text()), read_manifest(folder)
    rows = {row["name"]: row for row in report["rows"]}
    before = rows["network int8, not trained (PTQ)"]
    worse = rows["network int8"]["correct"] < before["correct"] - 60
    assert worse is ruined
    slower = rows["network int8"]["speedup_low"] <= max(1.0, report["benchmark"]["null_ratio"][1])
    ships = "network fp32" if ruined or slower else "network int8"
    assert report["ships"] == ships
    assert resolve_bundle(folder, None)[1].name == ("model.onnx" if ships == "network int8" else "reference.onnx")
    assert resolve_bundle(folder, "onnxruntime")[1].name == "model.onnx"  # by name, int8 is still there
    assert manifest["default"]["engine"] == "onnxruntime"
    assert report["verdict"]["good"] is not ruined
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith(f"Ships {ships} (onnxruntime), ")
    text = (folder / "report.md").read_text().splitlines()
    assert text[2] == f"- {last}"
    if ruined:
        assert (
            "since `network int8` is less accurate than without quantization-aware training" in last or "worse" in last
        )
