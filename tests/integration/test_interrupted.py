"""Ctrl-C: exit code 130, a checkpoint, and how to go on."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import Callback

import lightning_accel as la
from lightning_accel.cli.errors import run_guarded
from tests.support.models import Classifier, loader


class CtrlC(Callback):
    def __init__(self, step):
        self.step = step

    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == self.step:
            raise KeyboardInterrupt

    def on_fit_end(self, *args):
        if self.step == "export":
            raise KeyboardInterrupt


@pytest.fixture(autouse=True)
def handler():
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)  # Lightning ignores it from the first one on


def fit(trainer, folder, *callbacks, **options):
    export = la.ModelExport(folder, engines=["onnxruntime"], samples=8)
    made = trainer(*callbacks, la.ExactResume(), la.WeightPruning(0.5, end=2), export, max_epochs=2)
    made.fit(Classifier(), loader(32), loader(16, seed=1), **options)
    return made


def test_training_goes_on_from_the_checkpoint_of_an_interrupted_run(trainer, tmp_path, caplog):
    caplog.set_level("INFO")
    steps = len(loader(32))
    with pytest.raises(SystemExit):
        fit(trainer, tmp_path / "b", CtrlC(steps + 1))
    path = f"{tmp_path}/b.interrupted.ckpt"
    assert torch.load(path, weights_only=True)["global_step"] == steps + 1
    assert not (tmp_path / "b").exists()
    ended = fit(trainer, tmp_path / "b", ckpt_path=path)
    assert ended.global_step == 2 * steps
    assert (tmp_path / "b" / "manifest.json").is_file()


def test_before_the_first_step_there_is_nothing_to_save(trainer, tmp_path, caplog):
    class AtStart(Callback):
        def on_train_start(self, *args):
            raise KeyboardInterrupt

    caplog.set_level("INFO")
    with pytest.raises(SystemExit):
        fit(trainer, tmp_path / "b", AtStart())
    assert "No step was trained, and there is nothing to save." in caplog.text
    assert not list(tmp_path.glob("*.ckpt"))


def test_in_the_export_the_checkpoint_is_there_already(trainer, tmp_path, caplog):
    caplog.set_level("INFO")
    with pytest.raises(SystemExit):
        fit(trainer, tmp_path / "b", CtrlC("export"))
    says = re.search(r"The checkpoint is safe: (.*)\. Write the bundle with: (.*)", caplog.text)
    assert Path(says[1]).is_file()
    assert says[2] == f"lightning_accel.export_bundle('{tmp_path}/b.ckpt', data, '{tmp_path}/b', cls=Classifier)"


def test_lightnings_exit_after_ctrl_c_is_130(capsys):
    def lightning():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt:
            sys.exit(1)

    def importing():
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as error:
            raise ImportError("numpy can't be imported") from error

    for run in (lightning, importing):
        assert run_guarded(run) == 130
        assert capsys.readouterr().err == "lightning-accel: interrupted\n"
    with pytest.raises(SystemExit):
        run_guarded(lambda: sys.exit(3))
    with pytest.raises(ImportError, match="a bug"):
        run_guarded(lambda: (_ for _ in ()).throw(ImportError("a bug")))


def test_ctrl_c_during_imports(tmp_path):
    command = [sys.executable, "-X", "importtime", "-m", "lightning_accel", "fit", "-c", "none.yaml"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, cwd=tmp_path, env={**os.environ, "COLUMNS": "80"}
    )
    with process:
        for line in process.stderr:
            if "| " in line and " torch._" in line:  # within the import of torch
                process.send_signal(signal.SIGINT)
                break
        rest = [line for line in process.stderr.read().splitlines() if not line.startswith("import time:")]
        assert process.wait(60) == 130
    assert rest[-1] == "lightning-accel: interrupted"
    assert not any("Traceback" in line for line in rest)
