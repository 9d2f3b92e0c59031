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
