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
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.models import Classifier, Residual, loader

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
    assert "self.log('sparsity" not in done.stderr  # Lightning's advice on values that each rank has its own of
    first, second = (dict(flat(torch.load(tmp_path / f"rank{r}.pt", weights_only=True))) for r in (0, 1))
    assert first.keys() == second.keys()
    different = [k for k in first if not torch.equal(first[k], second[k]) and "running" not in k]
    assert not different  # batch norm statistics are each rank's own, as in plain DDP
    assert (first["low"] < 0).any()
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["complete"]
    assert not list(tmp_path.glob(".bundle*"))


SYNCED = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, lightning as L, lightning_accel as la
from torch import nn
from torch.distributed.nn.functional import all_reduce
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from lightning_accel.quantization.graph.prepare import quantized_forwards

folder, ranks = Path(sys.argv[2]), int(sys.argv[3])
torch.set_num_threads(1)

class Net(L.LightningModule):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        parts = [nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU()]
        self.net = nn.Sequential(*parts, nn.Flatten(), nn.Linear(64, 3))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch[0]).argmax(1) == batch[1]).float().mean())

    def train_dataloader(self):  # ranks together see what one process sees, in the same order
        sampler = DistributedSampler(data, ranks, self.trainer.global_rank, shuffle=False)
        return DataLoader(data, 8 // ranks, sampler=sampler)

    def val_dataloader(self):
        return DataLoader(TensorDataset(*data[:16]), 8)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.02)

# torch's SyncBatchNorm needs GPUs: the same in plain torch, as a stand-in on CPUs.
def synchronized(self, x):
    if not self.training:
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps)
    count, shape = torch.tensor([x.numel() / x.shape[1] * ranks]), (1, -1, 1, 1)
    center = all_reduce(x.sum((0, 2, 3))) / count
    apart = x - center.view(shape)
    spread = all_reduce(apart.square().sum((0, 2, 3))) / count
    with torch.no_grad():
        self.num_batches_tracked.add_(1)
        self.running_mean.lerp_(center, self.momentum)
        self.running_var.lerp_(spread * count / (count - 1), self.momentum)
    return apart * torch.rsqrt(spread + self.eps).view(shape) * self.weight.view(shape) + self.bias.view(shape)

nn.SyncBatchNorm.forward = synchronized
nn.parallel.DistributedDataParallel._passing_sync_batchnorm_handle = lambda self, module: None
torch.manual_seed(1)
data = TensorDataset(torch.randn(48, 1, 8, 8) + torch.arange(48).view(-1, 1, 1, 1) / 24, torch.randint(0, 3, (48,)))
several = {"devices": ranks, "strategy": "ddp", "sync_batchnorm": True} if ranks > 1 else {"devices": 1}
trainer = L.Trainer(
    max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
    enable_checkpointing=False, default_root_dir=folder, num_sanity_val_steps=0, use_distributed_sampler=False,
    **several,
    callbacks=[
        la.QuantizationAwareTraining("portable", start=0, calibration_batches=1, freeze_batch_norm=0.8),
        la.ModelExport(folder / f"bundle{ranks}", engines=["onnxruntime"]),
    ],
)
module = Net()
trainer.fit(module)
bank = quantized_forwards(module)[""].bank
torch.save({"low": bank.low, "high": bank.high, **module.state_dict()}, folder / f"synced{ranks}_{trainer.global_rank}.pt")
"""


@pytest.mark.timeout(240)
def test_synchronized_batch_norm_trains_as_one_process_does(tmp_path):
    """The user's own forward synchronizes, with fake-quantization at its call sites."""
    script = tmp_path / "run.py"
    script.write_text(SYNCED)
    root = str(Path(__file__).parents[2])
    for ranks in ("1", "2"):
        done = subprocess.run(
            [sys.executable, str(script), root, str(tmp_path), ranks], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 0, done.stderr[-3000:]
    files = ("synced1_0.pt", "synced2_0.pt", "synced2_1.pt")
    one, first, second = (torch.load(tmp_path / name, weights_only=True) for name in files)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert one.keys() == first.keys()
    for key, value in one.items():
        torch.testing.assert_close(first[key], value, rtol=1e-4, atol=1e-5, msg=lambda m, key=key: f"{key}: {m}")
    assert json.loads((tmp_path / "bundle2" / "manifest.json").read_text())["complete"]
