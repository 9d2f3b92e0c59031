import ast
import csv
import json
import math
import random
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EarlyStopping, EMAWeightAveraging, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.pruning.weights.masks import measured_sparsity
from lightning_accel.pruning.weights.targets import prunable_parameters
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.quantization.test_qat import Text, sentences
from tests.support.models import Classifier, Residual, images, loader

VAL = {"batch_size": 32}
ROOT = Path(__file__).parents[2]


def val(count=96, seed=77):
    return DataLoader(images(count, seed), **VAL)


def test_distilled_pruned_quantized_exported_verified_and_built_in_one_run(trainer, tmp_path):
    module = la.DistillationModule(student=Classifier(), teacher=Residual(16), alpha=0.5)
    logger = CSVLogger(tmp_path / "logs")
    t = trainer(
        la.WeightPruning(0.5, end=2),
        la.QuantizationAwareTraining("portable", start=2),
        la.ModelExport(tmp_path / "bundle", engines=["onnxruntime", "tensorrt"]),
        max_epochs=4,
        logger=logger,
    )
    t.fit(module, loader(128), val())
    bundle = tmp_path / "bundle"
    report, manifest = (json.loads((bundle / f).read_text()) for f in ("report.json", "manifest.json"))
    assert [row["name"] for row in report["rows"]] == [
        "teacher",
        "student fp32",
        "student int8, not trained (PTQ)",
        "student int8",
        "student int8, tensorrt",
    ]
    teacher, floating, untrained, int8, engine = report["rows"]
    assert all(row["total"] == 96 and row["p50_ms"] > 0 for row in (teacher, floating, int8))
    assert engine["p50_ms"] is None
    assert (untrained["total"], untrained["p50_ms"]) == (96, None)
    assert report["ships"] in (
        "student fp32",
        "student int8",
    )  # by what was measured; tests/export/test_default_rule.py has the rule
    (earned,) = (note["text"] for note in report["notes"] if note["kind"] == "qat benefit")
    points = float(re.search(r"([+-][\d.]+) points", earned)[1])
    assert points == pytest.approx(100 * (int8["accuracy"] - untrained["accuracy"]), abs=100 / 96 + 0.01)  # a flip
    assert "at step 40," in earned  # 32 steps in two epochs, then 8 calibration batches
    assert report["quantization"] == {"net.conv1": "int8", "net.conv2": "int8", "net.head": "int8", "net.add1": "int8"}
    assert [point["step"] for point in report["curves"]] == [16, 32, 48, 64]
    logged = [point["metrics"] for point in report["curves"]]
    with next((tmp_path / "logs").rglob("metrics.csv")).open() as file:
        written = [float(line["val_accuracy"]) for line in csv.DictReader(file) if line["val_accuracy"]]
    assert [metrics["val_accuracy"] for metrics in logged] == pytest.approx(written)
    assert logged[-1]["sparsity"] == pytest.approx(0.5, abs=0.003)
    assert not any(name.startswith("sparsity/") for name in logged[-1])
    assert report["timeline"] == [
        {"phase": "WeightPruning.weights", "start": 0, "end": 32},
        {"phase": "QuantizationAwareTraining.qat", "start": 32, "end": None},
    ]
    assert report["schema"] == 2
    told = re.findall(
        r"`(\w+)`", "".join(re.findall(r"^\| (`[^|]*) \|", (ROOT / "docs" / "report.md").read_text(), re.M))
    )
    assert set(report) <= set(told)
    page = (bundle / "report.html").read_text()
    assert "student int8, not trained (PTQ)" in page
    assert earned in unescape(page)
    assert report["engines"][1]["status"] == "built here, not run" or torch.cuda.is_available()
    assert next(table for table in report["layers"] if table["kind"] == "sparsity")["total"] == pytest.approx(
        0.5, abs=0.003
    )
    assert report["proofs"]["integers"]["weights"] == 3
    assert all(check["passed"] and check["samples"] == 96 for check in report["verification"])
    kernels = next(c for c in report["verification"] if "kernels" in c["engine"])
    reference, engine = kernels["metric"]["val_accuracy"]
    assert abs(reference - engine) <= 0.01
    assert set(kernels["batch_sizes"]) == {"1", "7", "32"}
    assert set(manifest["files"]) >= {
        "model.onnx",
        "reference.onnx",
        "report.json",
        "report.html",
        "report.md",
        "report.png",
        "engines/model.engine",
    }
    assert manifest["complete"]
    assert "TensorRT: built here, not run" in (bundle / "report.md").read_text()
    assert (bundle / "report.png").read_bytes().startswith(b"\x89PNG")

    # What the module computes after fit is what the int8 file computes, and what Trainer.test measures.
    (tested,) = t.test(module, val(), verbose=False)
    x, y = val().dataset.tensors
    with la.load_runner(bundle / "model.onnx", emulate=True) as runner:
        logits = runner(x.numpy())
    assert tested["test_accuracy"] == pytest.approx((logits.argmax(1) == y.numpy()).mean(), abs=0.011)
    module.eval()
    with torch.no_grad():
        wanted = module(x).numpy()
    assert np.median(np.abs(wanted - logits)) / np.ptp(wanted) < 1e-6
    # Pruned zeros are zeros in the stored integers.
    assert measured_sparsity(prunable_parameters(module).values()) == pytest.approx(0.5, abs=0.003)
    logged = (tmp_path / "logs" / "lightning_logs" / "version_0" / "metrics.csv").read_text()
    for name in ("distillation_loss", "task_loss", "sparsity", "export/student_int8/accuracy"):
        assert name in logged


def test_plain_fp32_export_without_any_compression(trainer, tmp_path):
    export = la.ModelExport(tmp_path / "b")
    trainer(export, max_epochs=1).fit(Classifier(), loader(), val())
    assert [row["name"] for row in export.report["rows"]] == ["network fp32"]
    assert not (tmp_path / "b" / "reference.onnx").exists()
    assert la.load_runner(tmp_path / "b")(np.zeros((2, 3, 8, 8), np.float32)).shape == (2, 4)


def test_best_checkpoint_only_if_it_was_compressed(trainer, tmp_path):
    class Score(Callback):
        """A monitor that calls a chosen epoch the best."""

        def __init__(self, best):
            self.best = best

        def on_validation_epoch_end(self, trainer, pl_module):
            pl_module.log("score", float(trainer.current_epoch == self.best))

    class Ends(Callback):
        """Ends the run at a step, which nobody saw coming."""

        def __init__(self, step):
            self.step = step

        def on_train_batch_end(self, trainer, *_):
            trainer.should_stop = trainer.global_step >= self.step

    def run(best, folder, start=1, ends=1000, **kwargs):
        checkpoint = ModelCheckpoint(tmp_path / folder, monitor="score", mode="max")
        export = la.ModelExport(tmp_path / folder / "bundle", ckpt_path="best")
        callbacks = [
            la.WeightPruning(0.5, end=1),
            la.QuantizationAwareTraining("portable", start=start, calibration_batches=4),
            export,
            checkpoint,
            Score(best),
            Ends(ends),
        ]
        module = Classifier()
        trainer(*callbacks, enable_checkpointing=True, **{"max_epochs": 4, **kwargs}).fit(module, loader(), val())
        return module, checkpoint.best_model_path

    with pytest.raises(
        RuntimeError,
        match=r"must have reached its targets .* \(epoch 1\) .*hasn't trained with fake-quant",
    ):
        run(1, "dense", start=2, ends=18, max_epochs=3, check_val_every_n_epoch=2)  # it ends before they are reached
    assert not (tmp_path / "dense" / "bundle").exists()
    with pytest.raises(ValueError, match="no ModelCheckpoint kept a best one"):
        run(1, "none", start=2, max_epochs=3, check_val_every_n_epoch=2)  # no validation after the targets are reached
    assert not (tmp_path / "none" / "bundle").exists()
    module, best = run(0, "late")  # the dense epoch 0 scores best, and is no rival
    assert "epoch=0" not in best
    saved = torch.load(best, weights_only=True)["state_dict"]
    assert all(torch.equal(v, saved[k]) for k, v in module.state_dict().items())
    assert (tmp_path / "late" / "bundle" / "manifest.json").exists()


class Stop(Callback):
    """Ends the run early, in one of the ways a run ends."""

    def __init__(self, how):
        self.how = how

    def on_train_epoch_end(self, trainer, pl_module):
        if self.how == "interrupt":
            raise KeyboardInterrupt
        trainer.should_stop = True


def test_a_run_that_stops_early_is_refused_or_marked(trainer, tmp_path):
    def run(**kwargs):
        callbacks = [la.WeightPruning(0.5, end=3), la.ModelExport(tmp_path / "b", **kwargs), Stop("stop")]
        trainer(*callbacks, max_epochs=4).fit(Classifier(), loader(), val())

    with pytest.raises(
        RuntimeError,
        match=r"WeightPruning\('weights'\) reached sparsity 0.\d+ of 0.5. The checkpoint is safe: .*b.ckpt",
    ):
        run()
    assert not (tmp_path / "b").exists()
    assert (tmp_path / "b.ckpt").exists()
    run(incomplete="mark")
    manifest = json.loads((tmp_path / "b" / "manifest.json").read_text())
    assert manifest["complete"] is False
    assert "INCOMPLETE: WeightPruning" in (tmp_path / "b" / "report.md").read_text()


def test_early_stopping_before_the_target_is_refused(trainer, tmp_path):
    stop = EarlyStopping("val_accuracy", patience=1, mode="max", min_delta=2.0)
    callbacks = [la.QuantizationAwareTraining("portable", start=3), la.ModelExport(tmp_path / "b"), stop]
    with pytest.raises(RuntimeError, match="hasn't trained with fake-quant yet: it starts at 3"):
        trainer(*callbacks, max_epochs=4).fit(Classifier(), loader(), val())


def test_an_interrupt_leaves_no_bundle(trainer, tmp_path):
    callbacks = [la.WeightPruning(0.5, end=1), la.ModelExport(tmp_path / "b"), Stop("interrupt")]
    with pytest.raises(SystemExit):
        trainer(*callbacks).fit(Classifier(), loader(), val())
    assert [path.name for path in tmp_path.glob("*b*")] == ["b.interrupted.ckpt"]


class Noisy(Classifier):
    """Its forward isn't a function of its input: no file can be what was trained."""

    def __init__(self, level):
        super().__init__()
        self.register_buffer("level", torch.tensor(level))

    def forward(self, x):
        return super().forward(x) + self.level * random.random()  # Python's: a graph holds one draw

    def on_train_end(self):
        self.level.fill_(10.0)


def test_a_network_that_no_file_can_equal_fails_in_preflight(trainer, tmp_path):
    watch = Stop("stop")
    with pytest.raises(la.VerificationError, match="must give the same outputs for the same inputs"):
        trainer(la.ModelExport(tmp_path / "b"), watch).fit(Noisy(10.0), loader(), val())
    assert not list(tmp_path.glob("*b*"))


def test_what_is_not_what_was_trained_fails_the_run_after_the_checkpoint_is_safe(trainer, tmp_path):
    module = Noisy(0.0)
    with pytest.raises(
        la.VerificationError,
        match=r"the median error is .* Repeat .*: lightning_accel.export_bundle\('.*b.ckpt', data, '.*b', cls=\w+\)",
    ):
        trainer(la.ModelExport(tmp_path / "b")).fit(module, loader(), val())
    assert not (tmp_path / "b").exists()
    assert not list(tmp_path.glob(".b*"))
    saved = torch.load(tmp_path / "b.ckpt", weights_only=True)
    assert saved["state_dict"].keys() == module.state_dict().keys()


def test_an_earlier_bundle_stays_when_a_new_one_fails(trainer, tmp_path):
    trainer(la.ModelExport(tmp_path / "b"), max_epochs=1).fit(Classifier(), loader(), val())
    before = (tmp_path / "b" / "model.onnx").read_bytes()
    with pytest.raises(la.VerificationError):
        trainer(la.ModelExport(tmp_path / "b")).fit(Noisy(0.0), loader(), val())
    assert (tmp_path / "b" / "model.onnx").read_bytes() == before


def test_averaged_weights_ship_if_the_trainer_ends_on_them(trainer, tmp_path):
    module, ema = Classifier(), EMAWeightAveraging(decay=0.8)
    export = la.ModelExport(tmp_path / "b")
    trainer(
        la.WeightPruning(0.5, end=1), la.QuantizationAwareTraining("portable", start=1), ema, export, max_epochs=3
    ).fit(module, loader(), val())
    average = ema._average_model.module.state_dict()
    assert all(torch.equal(v, average[k]) for k, v in module.state_dict().items())
    assert measured_sparsity(prunable_parameters(module).values()) == pytest.approx(0.5, abs=0.003)
    assert export.report["proofs"]["integers"]["weights"] == 3


@pytest.mark.parametrize(
    "settings", [{"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}]
)
def test_precision_accumulation_and_clipping(trainer, tmp_path, settings):
    module = Classifier()
    export = la.ModelExport(tmp_path / "b")
    trainer(
        la.WeightPruning(0.5, end=1),
        la.QuantizationAwareTraining("portable", start=1),
        export,
        max_epochs=3,
        **settings,
    ).fit(module, loader(), val())
    assert all(math.isfinite(c["max_error"]) and c["passed"] for c in export.report["verification"])
    assert measured_sparsity(prunable_parameters(module).values()) == pytest.approx(0.5, abs=0.003)


class TwoInputs(Classifier):
    def forward(self, x, scale):
        return super().forward(x * scale[:, None, None, None])

    def training_step(self, batch, batch_idx):
        (x, scale), y = batch
        return nn.functional.cross_entropy(self(x, scale=scale), y)

    def validation_step(self, batch, batch_idx):
        (x, scale), y = batch
        self.log("val_accuracy", (self(x, scale).argmax(1) == y).float().mean())


def pairs(count=64):
    x, y = images(count).tensors
    return DataLoader([((a, torch.tensor(1.5)), b) for a, b in zip(x, y, strict=True)], 16)


def test_two_inputs(trainer, tmp_path):
    export = la.ModelExport(tmp_path / "b")
    trainer(la.QuantizationAwareTraining("portable", start=0), export, max_epochs=2).fit(TwoInputs(), pairs(), pairs())
    assert la.load_runner(tmp_path / "b").input_names == ("x", "scale")
    assert export.report["verification"][-1]["metric"]["val_accuracy"]


def test_integer_and_boolean_inputs_from_a_dict_batch(trainer, tmp_path):
    for row in (data := sentences(64)):
        row["attention_mask"][0] = True
    export = la.ModelExport(tmp_path / "b", data=DataLoader(data, 8))
    trainer(la.QuantizationAwareTraining("portable", start=0), export, max_epochs=2).fit(Text(), DataLoader(data, 8))
    runner = la.load_runner(tmp_path / "b")
    assert [(s.name, s.dtype.name) for s in runner.inputs] == [("input_ids", "int64"), ("attention_mask", "bool")]
    assert runner.output_names == ("logits",)


class Direct(Classifier):
    """Calls a submodule instead of itself, in training and in validation."""

    def training_step(self, batch, batch_idx):
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())


def test_a_training_step_that_calls_a_submodule(trainer, tmp_path):
    export = la.ModelExport(tmp_path / "b")
    module = la.DistillationModule(Direct(), Residual(16), outputs="net")
    trainer(la.QuantizationAwareTraining("portable", start=0, module="net"), export, max_epochs=2).fit(
        module, loader(), val()
    )
    assert export.report["proofs"]["integers"]["weights"] == 3
    assert "can't go through the engine" in export.report["verification"][-1]["note"]


def test_hugging_face_bert(trainer, tmp_path):
    from transformers import BertConfig, BertForSequenceClassification

    class Bert(Text):
        def __init__(self):
            super().__init__()
            config = BertConfig(
                vocab_size=20,
                hidden_size=16,
                num_hidden_layers=1,
                num_attention_heads=2,
                intermediate_size=32,
                max_position_embeddings=8,
                num_labels=2,
            )
            del self.embed, self.layer, self.head
            self.bert = BertForSequenceClassification(config)

        def forward(self, input_ids, attention_mask):
            return self.bert(input_ids=input_ids, attention_mask=attention_mask)

        def validation_step(self, batch, batch_idx):
            out = self(batch["input_ids"], batch["attention_mask"])
            self.log("val_accuracy", (out.logits.argmax(1) == batch["labels"]).float().mean())

    data = [{**row, "attention_mask": torch.ones(6, dtype=torch.long)} for row in sentences(64)]
    export = la.ModelExport(tmp_path / "b")
    module = la.DistillationModule(Bert(), Bert())
    trainer(la.QuantizationAwareTraining("portable", start=0), export, max_epochs=2).fit(
        module, DataLoader(data, 8), DataLoader(data, 8)
    )
    assert la.load_runner(tmp_path / "b").output_names == ("logits",)
    assert "val_accuracy" in export.report["verification"][-1]["metric"]
    assert len(quantized_forwards(module)[""].bank.keys) >= 5


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda d: [la.ModelExport(d / "b", precision="int8")], 'Argument `precision` must be "fp32" or None without'),
        (
            lambda d: [la.QuantizationAwareTraining("onnxruntime"), la.ModelExport(d / "b", engines=["tensorrt"])],
            r"Argument `engines` must suit target 'onnxruntime', but got 'tensorrt': its parser refuses uint8",
        ),
        (
            lambda d: [la.QuantizationAwareTraining("portable"), la.ModelExport(d / "b", precision="fp32")],
            "Argument `precision` must be",
        ),
        (lambda d: [la.ModelExport("/proc/b")], "Argument `dirpath` must lie in a folder that can be written to"),
        (
            lambda d: [la.ModelExport(Path(__file__).parent)],
            "Argument `dirpath` must be a new folder or an earlier bundle",
        ),
    ],
)
def test_contradictions_fail_in_setup(trainer, tmp_path, make, message):
    with pytest.raises((ValueError, PermissionError), match=message):
        trainer(*make(tmp_path)).fit(Classifier(), loader(), val())
    assert not list(tmp_path.glob("*b*"))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"engines": ["tpu"]}, "Argument `engines` must be among"),
        ({"engines": []}, "must name at least one engine"),
        ({"precision": "fp4"}, "Argument `precision` must be"),
        ({"incomplete": "ignore"}, "Argument `incomplete` must be"),
        ({"samples": 0}, "Argument `samples` must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        la.ModelExport(**arguments)


def test_no_held_out_data_fails_in_setup(trainer, tmp_path):
    with pytest.raises(ValueError, match="Argument `data` must be held-out data, but got None"):
        trainer(la.ModelExport(tmp_path / "b")).fit(Classifier(), loader())
    trainer(la.ModelExport(tmp_path / "b", data=val()), max_epochs=1).fit(Classifier(), loader())
    assert (tmp_path / "b" / "manifest.json").exists()


def test_fast_dev_run_tries_the_path_and_writes_nothing(trainer, tmp_path):
    t = trainer(
        la.WeightPruning(0.5), la.QuantizationAwareTraining(), la.ModelExport(tmp_path / "b"), fast_dev_run=True
    )
    t.fit(Classifier(), loader(), val())
    assert not list(tmp_path.glob("*b*"))


def test_predict_after_fit_computes_what_the_int8_file_does(trainer, tmp_path):
    module = Classifier()
    t = trainer(la.QuantizationAwareTraining("portable", start=0), la.ModelExport(tmp_path / "b"))
    t.fit(module, loader(), val())
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    (name, ratio), *_ = report["proofs"]["signal_to_noise_db"].items()
    assert 5 < ratio < 60
    assert any(
        f"Rounding to int8 leaves `{name}` a signal-to-noise ratio of {ratio:.1f} dB" in n["text"]
        for n in report["notes"]
    )
    x = images(8, 3).tensors[0]
    predicted = torch.cat(t.predict(module, DataLoader(x, 4)))
    with la.load_runner(tmp_path / "b", "onnxruntime", emulate=True) as runner:  # whichever is the default
        assert np.median(np.abs(runner(x.numpy()) - predicted.numpy())) < 1e-6


def test_a_missing_tensorrt_is_told_in_setup(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
sys.modules["tensorrt"] = sys.modules["tensorrt_rtx"] = None  # what the import system takes for "not installed"
import lightning as L, lightning_accel as la
from tests.integration.test_export import Classifier, loader, val
export = la.ModelExport({str(tmp_path / "b")!r}, engines=["tensorrt"])
trainer = L.Trainer(max_epochs=1, logger=False, accelerator="cpu", callbacks=[export])
trainer.fit(Classifier(), loader(), val())
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode != 0
    assert 'pip install "lightning-accel[' in done.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*b*"))


def test_wandb_offline(trainer, tmp_path, monkeypatch):
    """The real library, writing its log without a network."""
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "w"))
    monkeypatch.setenv("WANDB_SILENT", "true")
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[2])!r})
import lightning as L, lightning_accel as la
from lightning.pytorch.loggers import WandbLogger
from tests.integration.test_export import Classifier, Residual, loader, val
logger = WandbLogger(project="p", offline=True, save_dir={str(tmp_path)!r})
callbacks = [
    la.WeightPruning(0.5, end=1), la.QuantizationAwareTraining("portable", start=1), la.ModelExport({str(tmp_path / "b")!r})
]
quiet = dict(enable_progress_bar=False, enable_checkpointing=False)
t = L.Trainer(max_epochs=2, accelerator="cpu", logger=logger, log_every_n_steps=1, callbacks=callbacks, **quiet)
t.fit(la.DistillationModule(Classifier(), Residual(16)), loader(), val())
summary = dict(logger.experiment.summary)
print("KEYS", sorted(summary), logger.experiment.dir)
print("SHIPPED", {{k: v for k, v in summary.items() if k.startswith("shipped/")}})
import wandb; wandb.finish()
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    keys = next(line for line in done.stdout.splitlines() if line.startswith("KEYS"))
    for name in (
        "comparison",
        "report",
        "accuracy_latency_table",
        "accuracy_size_table",
        "page",
        "sparsity",
        "sparsity/net.conv1.weight",
        "layers/weights",
        "distillation_loss",
        "export/student_int8/accuracy",
    ):
        assert f"'{name}'" in keys
    shipped = ast.literal_eval(next(line for line in done.stdout.splitlines() if line.startswith("SHIPPED"))[8:])
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    (row,) = (row for row in report["rows"] if row["name"] == report["ships"])
    assert shipped == {
        "shipped/accuracy": row["accuracy"],
        "shipped/latency_ms": row["p50_ms"],
        "shipped/bytes": row["file_bytes"],
        "shipped/parameters": row["parameters"],
        "shipped/speedup": row["speedup"],
    }
    (run,) = (path for path in tmp_path.rglob("offline-run-*") if path.is_dir())
    media = {p.name.split("_")[0] for p in run.rglob("files/media/**/*") if p.is_file()}
    assert {"comparison", "report", "page"} <= media
    log = next(run.glob("*.wandb")).read_bytes()
    assert b"-bundle" in log
    assert b"model.onnx" in log
    # Where the bundle comes from: the checkpoint, which is referred to by its digest and not uploaded.
    assert b"-checkpoint" in log
    assert b"checkpoint_digest" in log
    assert (tmp_path / "b.ckpt").as_uri().encode() in log


def test_wandb_logger_is_the_only_one_that_needs_wandb():
    assert WandbLogger.__module__.startswith("lightning")  # importing our logging imports no wandb
    code = "import sys, lightning_accel.export.logging; assert 'wandb' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
