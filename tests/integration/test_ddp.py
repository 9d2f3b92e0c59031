"""Two gloo processes: identical masks, ranges and weights; one bundle."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, lightning as L, lightning_accel as la
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_accel.quantization.prepare import quantized_forwards
from tests.models import Classifier, Residual, loader

folder = Path(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
pruning = la.WeightPruning(0.5, end=1)
trainer = L.Trainer(
    max_epochs=3, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder,
    callbacks=[
        la.ExactResume(), pruning, la.QuantizationAwareTraining("portable", start=1, calibration_batches=2),
        EMAWeightAveraging(decay=0.9), la.ModelExport(folder / "bundle"),
    ],
)
module = la.DistillationModule(Classifier(), Residual(12))
trainer.fit(module, loader(64, 8, shuffle=True), loader(64, 32, seed=3))
bank = quantized_forwards(module)[""].bank
torch.save({"masks": pruning.masks, "low": bank.low, "high": bank.high, "weights": module.state_dict()},
           folder / f"rank{trainer.global_rank}.pt")
"""


def flat(state, prefix=""):
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.timeout(240)
def test_ranks_hold_the_same_and_rank_zero_writes(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(SCRIPT)
    root = str(Path(__file__).parents[2])
    done = subprocess.run(
        [sys.executable, str(script), root, str(tmp_path)], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (dict(flat(torch.load(tmp_path / f"rank{r}.pt", weights_only=True))) for r in (0, 1))
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k], second[k]) and "running" not in k]
    assert not different  # batch norm statistics are each rank's own, as in plain DDP
    assert (first["low"] < 0).any()
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["complete"]
    assert not list(tmp_path.glob(".bundle*"))
