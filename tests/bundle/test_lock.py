"""One bundle is written by one run at a time."""

import subprocess
import sys

import pytest

import lightning_accel as la
from lightning_accel.bundle.lock import lock, unlock
from lightning_accel.errors import InvalidArgumentError
from tests.support.models import Classifier, loader

HOLD = """
import sys
from lightning_accel.bundle.lock import lock
lock(sys.argv[1], 1)
print("held", flush=True)
sys.stdin.readline()
"""


def test_another_process_is_refused_until_the_first_one_ends(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "b")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with other:
        assert other.stdout.readline() == "held\n"
        with pytest.raises(
            InvalidArgumentError, match=rf"no other run writes, but got .*the run of process {other.pid} is"
        ):
            lock(tmp_path / "b", 1)
        lock(tmp_path / "c", 1)
        other.kill()  # as by the system: nothing is left behind that locks
    lock(tmp_path / "b", 1)
    unlock(tmp_path / "b", 1)
    unlock(tmp_path / "c", 1)


def test_within_a_process_the_owner_may_come_again_and_others_may_not(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "b")
    lock(tmp_path / "b", 1)
    lock(tmp_path / "b", 1)
    with pytest.raises(InvalidArgumentError, match="another ModelExport of this run"):
        lock(tmp_path / "link", 2)
    unlock(tmp_path / "b", 2)  # not its own
    with pytest.raises(InvalidArgumentError):
        lock(tmp_path / "b", 2)
    unlock(tmp_path / "b", 1)
    lock(tmp_path / "b", 2)
    unlock(tmp_path / "b", 2)


def test_two_exports_of_one_run_with_one_folder_are_refused_before_training(trainer, tmp_path):
    module = Classifier()
    exports = [la.ModelExport(tmp_path / "b", data="val"), la.ModelExport(f"{tmp_path}/b", data="val", name="other")]
    with pytest.raises(InvalidArgumentError, match="another ModelExport of this run is about to write"):
        trainer(*exports, max_epochs=1).fit(module, loader(16), loader(16, seed=1))
    lock(tmp_path / "b", 1)  # released by the run that failed
    unlock(tmp_path / "b", 1)
