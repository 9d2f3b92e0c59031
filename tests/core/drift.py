"""Runs whose epochs have different lengths: data that grows or shrinks, streams, and gradient accumulation on a schedule."""

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch.utils.data import DataLoader, IterableDataset

from lightning_accel.pruning.weights.masks import measured_sparsity
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.models import images


class Growing(L.LightningDataModule):
    """Images whose number is that of the epoch; needs ``reload_dataloaders_every_n_epochs=1``."""

    def __init__(self, *counts: int):
        super().__init__()
        self.counts = counts

    def train_dataloader(self):
        return DataLoader(images(self.counts[min(self.trainer.current_epoch, len(self.counts) - 1)]), 8)


class Stream(IterableDataset):
    """Images without a length, ``count`` an epoch; endless if it is 0."""

    def __init__(self, count: int):
        self.count = count

    def __iter__(self):
        while True:
            yield from iter(images(self.count or 64))
            if self.count:
                return


def stream(count: int) -> DataLoader:
    return DataLoader(Stream(count), 8)


class Watch(Callback):
    """After each training step: epoch, share of zeros of the last convolution, and whether ``forward`` is the quantized one."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.at_start = (trainer.current_epoch, trainer.global_step, measured_sparsity([pl_module.net.conv2.weight]))

    def on_train_batch_end(self, trainer, pl_module, *_):
        forwards = quantized_forwards(pl_module)
        active = bool(forwards) and all(f.bank.active for f in forwards.values())
        self.seen.append((*self.at_start, pl_module.net.conv1.out_channels, bool(forwards), active))

    def first(self, what: int, than: float = 0) -> tuple[int, int] | None:
        """Epoch and step before the first step with a value above ``than``."""
        return next(((s[0], s[1]) for s in self.seen if s[what] > than), None)


ZEROS, CHANNELS, QUANTIZED, ACTIVE = 2, 3, 4, 5


def weights(module: L.LightningModule) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}
