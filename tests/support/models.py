"""Tiny modules that the tests train."""

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset


class Residual(nn.Module):
    """Convolutions with batch norm, a residual sum, a linear head: (N, 3, 8, 8) to (N, 4)."""

    def __init__(self, width: int = 8):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.norm2 = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width, eps=1e-3, momentum=0.03)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = torch.relu(self.norm1(self.conv1(x)))
        x = torch.relu(x + self.norm2(self.conv2(x)))
        return self.head(x.mean((2, 3)))


class Classifier(L.LightningModule):
    """An ordinary LightningModule."""

    def __init__(self, width: int = 8, lr: float = 0.05, dropout: float = 0.0):
        super().__init__()
        self.save_hyperparameters()
        self.net = Residual(width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x):
        return self.net(self.drop(x))

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = cross_entropy(self(x), y)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean())

    def test_step(self, batch, batch_idx):
        x, y = batch
        self.log("test_accuracy", (self(x).argmax(1) == y).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), self.hparams.lr, momentum=0.9)


def images(count: int = 64, seed: int = 0) -> TensorDataset:
    """Learnable images (count, 3, 8, 8): the class is the brightest quarter."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(count, 3, 8, 8, generator=generator), torch.randint(0, 4, (count,), generator=generator)
    for i, c in enumerate(y.tolist()):
        x[i, :, 4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 1.0
    return TensorDataset(x, y)


def loader(count: int = 64, batch_size: int = 8, seed: int = 0, shuffle: bool = False) -> DataLoader:
    return DataLoader(images(count, seed), batch_size, shuffle=shuffle)
