import json
import os
import signal
import stat
import subprocess
import sys

import pytest
from lightning.pytorch.callbacks import Callback

import lightning_accel as la
from lightning_accel.bundle import writer as bundle
from lightning_accel.bundle.writer import check_destination, staged, write_manifest
from lightning_accel.engines.manifest import resolve_bundle, sha256_of
from tests.support.models import Classifier, loader


def write(target, content, fail=False):
    with staged(target) as folder:
        (folder / "model.onnx").write_bytes(content)
        if fail:
            raise RuntimeError("half way")


def test_a_bundle_appears_whole_or_not_at_all(tmp_path):
    target = tmp_path / "deep" / "bundle"
    with pytest.raises(RuntimeError, match="half way"):
        write(target, b"half", fail=True)
    assert list((tmp_path / "deep").iterdir()) == []
    write(target, b"first")
    with pytest.raises(RuntimeError, match="half way"):
        write(target, b"half", fail=True)
    assert (target / "model.onnx").read_bytes() == b"first"
    write(target, b"second")
    assert (target / "model.onnx").read_bytes() == b"second"
    assert [p.name for p in target.parent.iterdir()] == ["bundle"]


def test_the_manifest_holds_the_checksum_of_each_file(tmp_path):
    (tmp_path / "engines").mkdir()
    (tmp_path / "model.onnx").write_bytes(b"abc")
    (tmp_path / "engines" / "e").write_bytes(b"")
    write_manifest(tmp_path, {"default": {"engine": "onnxruntime", "file": "model.onnx"}})
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["schema"] == 1
    assert manifest["files"]["model.onnx"] == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "bytes": 3,
    }
    assert manifest["files"]["engines/e"]["sha256"] == sha256_of(tmp_path / "engines" / "e")


def test_a_folder_with_other_files_is_not_replaced(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(
        ValueError, match=r"Argument `dirpath` must be a new folder or an earlier bundle, but got .* holds other files"
    ):
        check_destination(tmp_path)
    with pytest.raises(ValueError, match="must be a folder, but got the file"):
        check_destination(tmp_path / "thesis.tex")
    assert (tmp_path / "thesis.tex").exists()


def test_a_folder_that_cannot_be_written_to(tmp_path):
    (tmp_path / "ro").mkdir()
    os.chmod(tmp_path / "ro", stat.S_IRUSR | stat.S_IXUSR)
    path = tmp_path / "ro" / "bundle" if os.geteuid() else "/proc/bundle"  # root may write anywhere but here
    with pytest.raises(PermissionError, match="Argument `dirpath` must lie in a folder that can be written to"):
        check_destination(path)


KILLED = """
import os, signal, sys, threading
from lightning_accel.bundle.writer import staged, write_manifest
model = {"engine": "onnxruntime", "file": "model.onnx"}
for turn in range(100000):
    with staged(sys.argv[1]) as new:
        for name in ("model.onnx", "report.json", "more"):
            (new / name).write_bytes(os.urandom(2000))
        write_manifest(new, {"default": model, "engines": {"onnxruntime": model}})
    if turn == 0:
        threading.Timer(float(sys.argv[2]), os.kill, (os.getpid(), signal.SIGKILL)).start()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems can't exchange two folders in one step")
def test_a_killed_process_leaves_the_old_bundle_or_the_new_one(tmp_path):
    for turn in range(12):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, str(tmp_path / "bundle"), str(0.01 + 0.007 * turn)], check=False
        )
        assert done.returncode == -signal.SIGKILL
        resolve_bundle(tmp_path / "bundle", None)  # whole, and every checksum right
    left = [p.name for p in tmp_path.iterdir() if p.name != "bundle"]
    assert len(left) <= 1  # what one killed process leaves, the next one removes
    write(tmp_path / "bundle", b"at last")
    assert [p.name for p in tmp_path.iterdir()] == ["bundle"]


def test_without_an_exchange_in_one_step_the_bundle_is_replaced_all_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(bundle, "_exchange", lambda first, second: False)  # another system, not what is under test
    write(tmp_path / "b", b"first")
    write(tmp_path / "b", b"second")
    assert (tmp_path / "b" / "model.onnx").read_bytes() == b"second"
    assert [p.name for p in tmp_path.iterdir()] == ["b"]


def test_what_the_run_wrote_into_the_folder_is_not_replaced(trainer, tmp_path):
    """`setup` saw no folder there; in the run another callback put its checkpoints into it."""

    class Writes(Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            (tmp_path / "out").mkdir(exist_ok=True)
            (tmp_path / "out" / "best.ckpt").write_text("mine")

    with pytest.raises(ValueError, match="must be a new folder or an earlier bundle"):
        trainer(Writes(), la.ModelExport(tmp_path / "out"), max_epochs=1).fit(Classifier(), loader(), loader())
    assert (tmp_path / "out" / "best.ckpt").read_text() == "mine"
    assert (tmp_path / "out.ckpt").is_file()


def test_paths_that_cannot_be_a_bundle_are_refused_before_training(tmp_path, monkeypatch):
    (tmp_path / "q.ckpt").mkdir()
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere" / "x")
    monkeypatch.chdir(tmp_path)
    for path, says in {
        "q": r"must leave 'q.ckpt' for the checkpoint",
        "dangling": r"a link to '.*nowhere/x', where nothing is",
        ".": "holds other files",
        "y" * 250: "File name too long",  # with the names of temporary folders beside it
        "z" * 300: "File name too long",
    }.items():
        with pytest.raises(ValueError, match=says):
            check_destination(path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "q.ckpt"]  # nothing is left from looking
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    with pytest.raises(ValueError, match="must not hold the current folder"):
        check_destination(".")
    check_destination("a\nb")


def test_a_full_disk_is_refused_before_training(trainer, tmp_path):
    with pytest.raises(
        ValueError, match=r"at least 1,000,000,000,000.0 MB free for checkpoint and bundle, but got .* MB are free"
    ):
        check_destination(tmp_path / "b", needed=10**18)
    check_destination(tmp_path / "b", needed=10)


@pytest.mark.parametrize(
    ("arguments", "kind"),
    [
        ({"dirpath": ""}, ValueError),
        ({"dirpath": " "}, ValueError),
        ({"dirpath": None}, TypeError),
        ({"dirpath": 5}, TypeError),
        ({"dirpath": "a\0b"}, ValueError),
        ({"ckpt_path": "bset"}, ValueError),
        ({"ckpt_path": None}, TypeError),
        ({"metadata": {"a": object()}}, ValueError),
        ({"metadata": {"a": float("nan")}}, ValueError),
        ({"metadata": {"a": {"b": [1, b"x"]}}}, ValueError),
        ({"metadata": {"a": "\ud800"}}, ValueError),
        ({"metadata": {1: 2}}, TypeError),
        ({"metadata": [1]}, TypeError),
        ({"data": "train"}, ValueError),
        ({"data": 5}, ValueError),
        ({"keep_samples": True}, TypeError),
        ({"budgets": 0.5}, TypeError),
        ({"preprocess": len}, TypeError),
        ({"inputs": "x"}, TypeError),
        ({"dynamic": 5}, TypeError),
    ],
)
def test_what_would_fail_at_the_end_is_no_argument(arguments, kind):
    with pytest.raises(kind, match=f"Argument `{next(iter(arguments))}` must be"):
        la.ModelExport(**arguments)


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path):
    write(tmp_path / "v1", b"first")
    (tmp_path / "current").symlink_to("v1")
    write(tmp_path / "current", b"second")
    assert (tmp_path / "current").is_symlink()
    assert (tmp_path / "v1" / "model.onnx").read_bytes() == b"second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["current", "v1"]


def test_home_is_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    export = la.ModelExport("~/bundle")
    assert (export.dirpath, export.checkpoint_path) == (f"{tmp_path}/bundle", f"{tmp_path}/bundle.ckpt")


def test_the_manifest_names_the_run_and_the_checkpoint_that_the_bundle_was_made_from(trainer, tmp_path):
    ids = []
    for _ in range(2):
        export = la.ModelExport(tmp_path / "b", engines=["onnxruntime"], samples=8)
        trainer(export, max_epochs=1).fit(Classifier(), loader(16), loader(16, seed=1))
        run = json.loads((tmp_path / "b" / "manifest.json").read_text())["run"]
        assert run["checkpoint"] == {"file": "b.ckpt", "sha256": sha256_of(tmp_path / "b.ckpt")}
        assert export.report["run"]["id"] == run["id"]
        ids.append(run["id"])
    assert len(set(ids)) == 2
