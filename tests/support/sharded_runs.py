"""Runs that the ranks of FSDP2 and one process make alike; what they end with is compared."""

from pathlib import Path

import lightning as L
import torch
from torch import nn
from torch.nn.functional import dropout

import lightning_accel as la
from lightning_accel.core.shards import is_sharded, whole
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.sharded import Net, fit


def made(seed: int = 0, **kwargs):
    torch.manual_seed(seed)
    return Net(**kwargs)


def teacher() -> nn.Module:
    return made(5, width=12)


class SaveAfter(L.Callback):
    """Saves a checkpoint after an epoch."""

    def __init__(self, path, epoch):
        self.path, self.epoch = path, epoch

    def on_train_epoch_end(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch:
            trainer.save_checkpoint(self.path)


def all_of():
    """Pruning and QAT, distilled."""
    pruning = la.WeightPruning(0.6, end=1, every=1)
    qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)
    module = la.DistillationModule(made(), teacher(), ["kd", "mse"])
    return module, pruning, [pruning, qat]


def ended(module, result, pruning=None):
    """Losses, weights, masks and ranges."""
    _, losses, weights = result
    masks = {} if pruning is None else {name: whole(mask) for name, mask in pruning.masks.items()}
    banks = {path: (f.bank.low, f.bank.high, f.bank.scales) for path, f in quantized_forwards(module).items()}
    spread = any(is_sharded(p) for p in module.teacher.parameters()) if hasattr(module, "teacher") else False
    unfinished = "" if pruning is None else pruning.unfinished()
    return {
        "losses": losses,
        "weights": weights,
        "masks": masks,
        "ranges": banks,
        "unfinished": unfinished,
        "teacher_sharded": spread,
    }


def run(name: str, folder: Path, ranks: int):
    """One of the runs."""
    if name == "plain":
        module = made()
        return ended(module, fit(module, ranks=ranks))
    if name == "pruned":
        module, pruning = made(grid=16), la.WeightPruning(0.7, start=0, end=2, every=1)
        return ended(module, fit(module, pruning, ranks=ranks), pruning)
    if name == "taylor":
        module, pruning = made(), la.WeightPruning(0.5, criterion="taylor", scope="layer", start=1, end=2)
        return ended(module, fit(module, pruning, ranks=ranks), pruning)
    if name == "quantized":
        module = made()
        return ended(
            module, fit(module, la.QuantizationAwareTraining("portable", start=0, calibration_batches=2), ranks=ranks)
        )
    if name in ("distilled", "sharded teacher"):
        module = la.DistillationModule(
            made(shard_teacher=name == "sharded teacher" and ranks > 1), teacher(), ["kd", "mse"]
        )
        return ended(module, fit(module, ranks=ranks))
    if name == "shipped":
        module, pruning, callbacks = all_of()
        export = la.ModelExport(folder / f"bundle{ranks}", engines=["onnxruntime"], samples=16)
        return ended(module, fit(module, *callbacks, export, ranks=ranks), pruning)
    if name == "all":
        module, pruning, callbacks = all_of()
        saved = [SaveAfter(folder / f"{ranks}_{epoch}.ckpt", epoch) for epoch in (0, 1)]
        return ended(module, fit(module, *callbacks, *saved, ranks=ranks), pruning)
    raise KeyError(name)


class Noisy(Net):
    """Draws random numbers in each step."""

    def forward(self, x):
        return self.head(dropout(self.body(x).flatten(1), 0.3, self.training))


class SaveAt(L.Callback):
    """Saves a checkpoint after a batch, with the gradients that are being accumulated."""

    def __init__(self, folder, *batches):
        self.folder, self.batches, self.seen = folder, batches, 0

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.seen += 1
        if self.seen in self.batches:
            trainer.save_checkpoint(self.folder / f"exact_{self.seen}.ckpt")


def exact(folder: Path, ranks: int):
    """An uninterrupted run, and one that goes on from each of its checkpoints."""
    found = {}
    for after in (0, 3, 4, 6):
        torch.manual_seed(7)
        pruning = la.WeightPruning(0.6, end=1, every=1)
        path = folder / f"exact_{after}.ckpt" if after else None
        callbacks = [
            pruning,
            la.QuantizationAwareTraining("portable", start=1, calibration_batches=2),
            la.ExactResume(),
        ]
        saving = [] if after else [SaveAt(folder, 3, 4, 6)]
        module = Noisy()
        torch.manual_seed(after)
        found[after] = ended(
            module, fit(module, *callbacks, *saving, ranks=ranks, ckpt_path=path, accumulate=2), pruning
        )
    return found


def resumed(ranks: int, path: Path):
    """The run `all` from a checkpoint."""
    module, pruning, callbacks = all_of()
    return ended(module, fit(module, *callbacks, ranks=ranks, ckpt_path=path), pruning)
