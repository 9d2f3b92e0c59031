"""Images in ten classes, computed on the fly: nothing is downloaded."""

from typing import Any

import lightning as L
import torch
from torch.nn.functional import interpolate
from torch.utils.data import DataLoader, TensorDataset

CLASSES = 10


def patterns() -> torch.Tensor:
    """One smooth pattern for each class, ``(10, 1, 32, 32)``; always the same."""
    coarse = torch.randn(CLASSES, 1, 5, 5, generator=torch.Generator().manual_seed(0))
    return interpolate(coarse, size=(32, 32), mode="bicubic")


def images(number: int, seed: int) -> TensorDataset:
    """Images ``(number, 1, 28, 28)`` and labels ``(number,)``: the pattern of the class, shifted by up to 4 pixels, with noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(number) % CLASSES
    shifts = torch.randint(0, 5, (number, 2), generator=generator).tolist()
    noise = torch.randn(number, 1, 28, 28, generator=generator)
    every = patterns()
    shifted = [every[label, :, i : i + 28, j : j + 28] for label, (i, j) in zip(labels.tolist(), shifts, strict=True)]
    return TensorDataset(torch.stack(shifted) + 2.5 * noise, labels)


class Images(L.LightningDataModule):
    """Training and held-out images. Replace it with your own data.

    Args:
        batch_size: number of images in a batch.
        train: number of training images.
        held_out: number of held-out images, for validation and test; never trained on.
    """

    def __init__(self, batch_size: int = 64, train: int = 4000, held_out: int = 1000) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.parts = [images(train, seed=1), images(held_out, seed=2)]

    def train_dataloader(self) -> DataLoader[Any]:
        """Shuffled training images."""
        return DataLoader(self.parts[0], self.batch_size, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        """Held-out images."""
        return DataLoader(self.parts[1], 256)

    def test_dataloader(self) -> DataLoader[Any]:
        """The same held-out images."""
        return self.val_dataloader()
