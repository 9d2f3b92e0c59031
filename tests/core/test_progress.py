"""One line of progress with the time left."""

import io
import re
import time

import lightning as L
import pytest

import lightning_accel as la
from lightning_accel.core import progress as module
from lightning_accel.core.progress import Progress, progress_of
from tests.support.models import Classifier, loader


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_log_gets_a_line_for_each_step_with_the_time_left(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    log = io.StringIO()
    with Progress("ModelExport", {"export": 1, "verify": 2, "report": 1}, log) as progress:
        progress.step("export")
        now[0] += 10
        progress.step("verify")
        now[0] += 20
        progress.step("report")
        now[0] += 170
    assert log.getvalue().splitlines() == [
        "ModelExport: 1/3 export",
        "ModelExport: 2/3 verify, about 30 s left",
        "ModelExport: 3/3 report, about 10 s left",
        "ModelExport: done in 3 min",
    ]


def test_a_terminal_gets_one_line_that_moves_by_itself(monkeypatch):
    monkeypatch.setattr(module, "_EVERY_S", 0.01)
    screen = Terminal()
    with Progress("X", {"a": 1, "b": 1}, screen) as progress:
        progress.step("a")
        time.sleep(0.2)
        progress.step("b")
    assert screen.getvalue().count("\n") == 1
    assert screen.getvalue().count("\rX: 1/2 a") >= 3
    assert re.search(r"\rX: 2/2 b, about \d+ s left \(\d+ s\)", screen.getvalue())
    assert screen.getvalue().endswith("\rX: done in 0 s\n")


def test_an_error_leaves_the_line_to_its_message():
    log = io.StringIO()

    def fails():
        with Progress("X", {"a": 1}, log) as progress:
            progress.step("a")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fails()
    assert log.getvalue() == "X: 1/1 a\n"
    with pytest.raises(KeyError):
        Progress("X", {"a": 1}).step("b")


def test_a_run_is_never_silent_from_preflight_to_report_unless_asked_to_be(tmp_path, capsys):
    for shown in (True, False):
        export = la.ModelExport(tmp_path / "b", engines=["onnxruntime"], samples=8)
        ptq = la.PostTrainingQuantization("onnxruntime", calibration_batches=1, effort="low")
        quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False}
        trainer = L.Trainer(
            max_epochs=1, callbacks=[ptq, export], accelerator="cpu", enable_progress_bar=shown, **quiet
        )
        trainer.fit(Classifier(), loader(16), loader(16, seed=1))
        err = capsys.readouterr().err
        steps = re.findall(r"^(\w+): (\d/\d) ([\w ]+)", err, re.MULTILINE)
        if not shown:
            assert steps == []
            continue
        assert [who for who, place, _ in steps if place.startswith("1/")] == [
            "Preflight",
            "PostTrainingQuantization",
            "ModelExport",
        ]
        assert [name for who, _, name in steps if who == "ModelExport"][-1] == "write the report"
        assert len(re.findall(r"^\w+: done in ", err, re.MULTILINE)) == 3
    assert progress_of(None, "X", {"a": 1}).stream is None
