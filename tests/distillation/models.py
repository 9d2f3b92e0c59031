"""Small students, teachers and data; importable by path, for YAML and for processes without this library."""

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset


class Net(nn.Module):
    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x):
        return self.linear(x)


class Student(L.LightningModule):
    """Calls itself; counts its hooks."""

    def __init__(self, width: int = 8, lr: float = 0.1, net: nn.Module | None = None) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = net if net is not None else nn.Sequential(nn.Linear(4, width), nn.ReLU(), nn.Linear(width, 3))
        self.lr = lr
        self.events: list[str] = []
        self.example_input_array = torch.zeros(1, 4)

    def forward(self, x):
        return self.net(x)

    def setup(self, stage):
        self.events.append("setup " + stage)

    def on_fit_start(self):
        self.events.append("on_fit_start")

    def training_step(self, batch, batch_idx):
        x, y = batch
        loss = F.cross_entropy(self(x), y)
        self.log("train_loss", loss)
        self.lr_schedulers().step()
        return {"loss": loss, "extra": batch_idx}

    def on_train_batch_end(self, outputs, batch, batch_idx):
        self.events.append(f"extra {outputs['extra']}")

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", F.cross_entropy(self(x), y))

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 100)]

    def on_save_checkpoint(self, checkpoint):
        checkpoint["mine"] = 42


class Reads(Student):
    """Reads its hyper-parameters while it is built."""

    def __init__(self, width: int = 8) -> None:
        super().__init__(width=width)
        self.save_hyperparameters("width")
        self.scale = nn.Parameter(torch.ones(self.hparams.width))


class Plain(Student):
    """Without a scheduler, so that a step can be taken outside of a Trainer."""

    def training_step(self, batch, batch_idx):
        return F.cross_entropy(self(batch[0]), batch[1])

    def on_train_batch_end(self, outputs, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def loader(samples: int = 16, batch_size: int = 4) -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, 4, generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 3, (samples,), generator=generator)), batch_size=batch_size)


class Data(L.LightningDataModule):
    def train_dataloader(self):
        return loader()
