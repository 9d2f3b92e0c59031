"""A rank that fails ends the others soon, and its own message is the one to read."""

import re
import sys

import pytest

from tests.support.ranks import ROOT, run_killed, torchrun

SCRIPT = """
import os, signal, sys, time
import torch, lightning as L, lightning_accel as la
from tests.support.sharded import Net, fit

which, kind, how = int(sys.argv[1]), sys.argv[2], sys.argv[3]

class Fails(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 2 and trainer.global_rank == which:
            print("FAILS", time.time(), flush=True)
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError(f"rank {which} found a broken sample")

torch.manual_seed(0)
fit(Net(), la.WeightPruning(0.5, end=1, every=1), Fails(), ranks=2, strategy="ddp" if kind == "ddp" else None)
"""


@pytest.mark.timeout(120)
@pytest.mark.parametrize(
    ("launch", "which", "kind", "how"),
    [("torchrun", 0, "ddp", "killed"), ("script", 1, "fsdp", "raised")],
)
def test_the_others_end_within_30_seconds(launch, which, kind, how, tmp_path):
    if launch == "torchrun":
        done = torchrun(SCRIPT, tmp_path, str(which), kind, how)
    else:  # Lightning starts the second process
        path = tmp_path / "script.py"
        path.write_text(f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{SCRIPT}")
        done = run_killed([sys.executable, str(path), str(which), kind, how], tmp_path, 90)
    assert done.code not in (None, 0), done.text[-2000:]
    assert "FAILS" in done.text, done.text[-2000:]
    (failed,) = re.findall(r"FAILS ([\d.]+)", done.text)
    assert done.ended - float(failed) < 30
    if how == "raised":
        assert f"ValueError: rank {which} found a broken sample" in done.text
