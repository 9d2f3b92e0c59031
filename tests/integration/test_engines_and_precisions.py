"""Every subset of the engines in every precision, from `fit` to bundle: it ships, or it is refused before training."""

import json
from itertools import combinations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.engines.registry import engine_names
from lightning_accel.engines.tensorrt.cuda import has_gpu
from lightning_accel.export.logging import scalars
from lightning_accel.reports.model import Report

ENGINES = engine_names()
SUBSETS = [list(engines) for count in range(1, len(ENGINES) + 1) for engines in combinations(ENGINES, count)]
PRECISIONS = ("fp32", "fp16", "bf16", "int8 by QAT", "int8 by PTQ")
QUICK = la.BenchmarkSettings(
    batches=(4,), callers=(1,), seconds=0.05, turn_s=0.01, warmup_s=0.02, min_rounds=2, threads=1
)
only_builds = pytest.mark.skipif(
    has_gpu(), reason="TensorRT runs here, and these tests are about machines where it doesn't"
)


class Tiny(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        self.steps = 0

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        self.steps += 1
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def loader() -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(32, 4), torch.randint(0, 3, (32,))), 16)


def callbacks(folder, engines, precision, **export) -> list[L.Callback]:
    target = engines[0] if len(engines) == 1 and engines != ["pytorch"] else "portable"
    quantize = {
        "int8 by QAT": [la.QuantizationAwareTraining(target, start=0, calibration_batches=1)],
        "int8 by PTQ": [la.PostTrainingQuantization(target)],
    }
    kept = {"keep_samples": 8, **export}
    name = precision.partition(" ")[0]
    return [*quantize.get(precision, []), la.ModelExport(folder, engines=engines, precision=name, **kept)]


def contradiction(engines, precision) -> str:
    """What is said before training, from what each engine can't do by its nature; empty where all of it ships."""
    if precision == "bf16" and engines != ["tensorrt"]:
        others = [engine for engine in engines if engine != "tensorrt"]
        return f'Argument `engines` must be ["tensorrt"] for precision "bf16", but got {others}'
    if precision == "fp16" and "pytorch" in engines:
        return 'Argument `engines` must not hold "pytorch" for precision "fp16"'
    return ""


CASES = [(engines, precision) for precision in PRECISIONS for engines in SUBSETS]
REFUSED = [case for case in CASES if contradiction(*case)]
SHIPPED = [case for case in CASES if not contradiction(*case)]


def named(value) -> str:
    return "+".join(value) if isinstance(value, list) else value.replace(" ", "-")


@pytest.mark.parametrize(("engines", "precision"), REFUSED, ids=named)
def test_a_contradiction_is_refused_before_training(trainer, tmp_path, engines, precision):
    module = Tiny()
    with pytest.raises(ValueError) as error:  # noqa: PT011  # the message is compared as a whole below
        trainer(*callbacks(tmp_path / "bundle", engines, precision)).fit(module, loader(), loader())
    assert contradiction(engines, precision) in str(error.value)
    assert module.steps == 0
    assert not (tmp_path / "bundle").exists()


@pytest.mark.parametrize(("engines", "precision"), SHIPPED, ids=named)
def test_everything_else_ships(trainer, tmp_path, capsys, engines, precision):
    folder, module = tmp_path / "bundle", Tiny()
    *_, export = made = callbacks(folder, engines, precision)
    trainer(*made, max_epochs=1).fit(module, loader(), loader())
    runs = [engine for engine in engines if engine != "tensorrt" or has_gpu()]
    manifest, report = read_manifest(folder), json.loads((folder / "report.json").read_text())
    assert list(manifest["engines"]) == engines
    assert {name for name, line in manifest["engines"].items() if line["runs_here"]} == set(runs)
    ships = ships_by_the_rule(report, engines, runs)
    assert report["ships"] == ships["name"]
    assert manifest["default"]["engine"] == ships["engine"]
    check_report(folder, report, engines, runs, precision.partition(" ")[0])
    assert export.report["ships"] == report["ships"]
    feeds = {manifest["inputs"][0]: loader().dataset.tensors[0].numpy()}
    if runs:
        with la.load_runner(folder, runs[0]) as runner, torch.no_grad():  # the default may be float32
            want = module.eval()(torch.from_numpy(next(iter(feeds.values())))).numpy()
            got = next(iter(runner.run(feeds).values()))
        assert np.abs(got - want).max() < (0.05 if "int8" in precision else 0.01) * np.ptp(want)
    else:
        with pytest.raises(RuntimeError, match="needs an NVIDIA GPU and its driver to run, and this machine has none"):
            la.load_runner(folder)
    capsys.readouterr()
    assert main(["verify", str(folder)]) == (0 if runs == engines else 3)
    assert ("not run here" in capsys.readouterr().out) is (runs != engines)


def ships_by_the_rule(report, engines, runs) -> dict:
    """The fastest row that is clearly faster than float32 and not refused for its accuracy; float32 if there is none."""
    rows = {row["name"]: row for row in report["rows"]}
    if not runs:
        return next(row for row in rows.values() if row["engine"] == engines[0] and row["note"])
    first = next(iter(rows.values()))
    refused = report["verdict"]["refused"]
    noise = max(1.0, report["benchmark"]["null_ratio"][1])
    able = [row for name, row in rows.items() if row["p50_ms"] and "worse than float32" not in refused.get(name, "")]
    fast = [
        row
        for row in able
        if row is not first and row["speedup_low"] > noise and "cost" not in refused.get(row["name"], "")
    ]
    return max(fast, key=lambda row: row["speedup_low"], default=first)


def check_report(folder, report, engines, runs, precision) -> None:
    rows = {row["name"]: row for row in report["rows"]}
    shown = [row["engine"] for row in report["rows"]]
    first = next(iter(rows.values()))
    # The first row is what speed-ups refer to: it was measured, whatever runs here.
    assert first["p50_ms"] > 0
    assert first["speedup"] == 1
    assert first["name"] == "network fp32"
    own = [row for name, row in rows.items() if name.startswith(f"network {precision}")]
    if precision != "fp32" or not runs:
        assert first["engine"] == "onnxruntime"
    extra = 1 if precision == "fp32" and not runs else 0  # the float32 file in ONNX Runtime
    assert sorted(row["engine"] for row in own[extra:]) == sorted(engines)
    assert len(shown) == len(engines) + (1 if precision != "fp32" else extra)
    for row in rows.values():
        measured = row["engine"] != "tensorrt" or has_gpu()
        assert (row["p50_ms"] is not None) is measured
        assert (row["correct"] is not None) is measured
        assert (row["note"] == "built here, not run") is not measured
    text, page = (folder / "report.md").read_text(), (folder / "report.html").read_text()
    assert f"- Ships {report['ships']}" in text
    assert ("neither its accuracy nor its speed was measured" in text) is (not runs)
    assert ("not run on this machine: tensorrt" in text) is (runs != engines)
    assert ("built here, not run" in text) is ("built here, not run" in page) is (runs != engines)
    assert (folder / "report.png").read_bytes().startswith(b"\x89PNG")
    assert all(check["passed"] for check in report["verification"])
    assert any("as written" in check["engine"] for check in report["verification"])
    metrics = scalars(Report.from_dict(report))
    assert ("shipped/latency_ms" in metrics) is bool(runs)
    assert metrics["shipped/bytes"] == rows[report["ships"]]["file_bytes"]


@only_builds
@pytest.mark.parametrize("precision", ["fp32", "int8 by PTQ"])
def test_nothing_is_decided_for_an_engine_that_only_builds_here(trainer, tmp_path, capsys, precision):
    """A CPU's fastest variant says nothing about TensorRT, so that the engine asked for stays the default."""
    folder = tmp_path / "bundle"
    made = callbacks(folder, ["tensorrt"], precision, budgets=la.Budgets(max_drop=100), benchmark=QUICK)
    trainer(*made, max_epochs=1).fit(Tiny(), loader(), loader())
    manifest, report = read_manifest(folder), json.loads((folder / "report.json").read_text())
    assert manifest["default"] == {"engine": "tensorrt", "file": "engines/model.engine"}
    assert "decision" not in manifest
    comparison = json.loads((folder / "comparison.json").read_text())
    assert comparison["decision"] is None
    assert {variant["name"] for variant in comparison["variants"] if variant["status"] == "ran"} >= {
        "onnxruntime fp32",
        "openvino fp32",
    }
    says = "Nothing was decided: tensorrt, which this bundle is for, can't run on this machine, and stays the default."
    assert sum(note["text"].startswith(says) for note in report["notes"]) == 1
    assert says in (folder / "report.md").read_text()
    assert says in (folder / "report.html").read_text().replace("&#39;", "'").replace("&#x27;", "'")
    assert "Decision:" not in capsys.readouterr().out
    # Asked for on this machine, it is decided for this machine.
    arguments = ["benchmark", str(folder), "--batch", "4", "--callers", "1", "--seconds", "0.05", "--max-drop", "100"]
    assert main([*arguments, "--no-record"]) == 0
    out = capsys.readouterr().out
    assert "excluded because it can't run on this machine" in out
    assert read_manifest(folder) == manifest
    assert main(arguments) == 0
    assert read_manifest(folder)["default"]["engine"] in ("onnxruntime", "openvino")
    la.load_runner(folder).close()
    capsys.readouterr()
    assert main(["verify", str(folder)]) == 3


@only_builds
def test_bundles_that_only_build_here_are_compared_as_far_as_it_goes(trainer, tmp_path, capsys):
    for name, engines in {"a": ["tensorrt"], "b": ["onnxruntime"]}.items():
        trainer(*callbacks(tmp_path / name, engines, "fp32"), max_epochs=1).fit(Tiny(), loader(), loader())
    quick = ["--batch", "4", "--seconds", "0.05"]
    for first, second in (("a", "b"), ("b", "a"), ("a", "a")):
        capsys.readouterr()
        assert main(["compare", str(tmp_path / first), str(tmp_path / second), *quick]) == 1  # one can't run here
        out = capsys.readouterr().out
        assert "this machine has none" in out
        assert "tensorrt fp32" in out
    assert main(["benchmark", f"{tmp_path / 'a'}:tensorrt", *quick]) == 1
    assert "needs an NVIDIA GPU and its driver" in capsys.readouterr().err


@only_builds
@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:wandb")
def test_loggers_get_what_there_is(trainer, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    loggers = [
        CSVLogger(tmp_path, name="csv"),
        TensorBoardLogger(tmp_path, name="board"),
        WandbLogger(save_dir=tmp_path, offline=True, project="tests"),
    ]
    made = callbacks(tmp_path / "bundle", ["tensorrt"], "fp32")
    trainer(*made, max_epochs=1, logger=loggers, log_every_n_steps=1).fit(Tiny(), loader(), loader())
    summary = dict(loggers[2].experiment.summary)
    loggers[2].experiment.finish()
    assert summary["shipped/bytes"] > 0
    assert summary["export/network_fp32/p50_ms"] > 0
    assert "shipped/latency_ms" not in summary
    assert (tmp_path / "csv" / "version_0" / "report.html").is_file()


@only_builds
def test_a_student_is_measured_beside_its_teacher(trainer, tmp_path):
    """Not the teacher alone, where the student's only engine can't run here."""
    made = callbacks(tmp_path / "bundle", ["tensorrt"], "fp32")
    module = la.DistillationModule(Tiny(), nn.Linear(4, 3))
    trainer(*made, max_epochs=1).fit(module, loader(), loader())
    report = json.loads((tmp_path / "bundle" / "report.json").read_text())
    rows = [(row["name"], row["engine"], row["p50_ms"] is not None) for row in report["rows"]]
    assert rows == [
        ("teacher", "onnxruntime", True),
        ("student fp32", "onnxruntime", True),
        ("student fp32, tensorrt", "tensorrt", False),
    ]
    assert report["ships"] == "student fp32, tensorrt"
    assert report["rows"][1]["correct"] is not None
