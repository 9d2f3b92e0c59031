"""A residual network for small grey images (https://arxiv.org/abs/1512.03385, section 4.2)."""

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import nn
from torch.nn.functional import cross_entropy


class Block(nn.Module):
    """Two 3x3 convolutions and a skip connection: ``(N, C, H, W)`` to ``(N, D, H/s, W/s)``."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels_out)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.skip: nn.Module = nn.Identity()
        if channels_in != channels_out or stride != 1:
            projection = nn.Conv2d(channels_in, channels_out, 1, stride, bias=False)
            self.skip = nn.Sequential(projection, nn.BatchNorm2d(channels_out))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Residual sum, rectified."""
        y = torch.relu(self.norm1(self.conv1(x)))
        return torch.relu(self.norm2(self.conv2(y)) + self.skip(x))


class ResNet(nn.Module):
    """Stem, three stages, global average, linear: ``(N, 1, 28, 28)`` to ``(N, 10)``.

    Args:
        depth: 8, 14, 20, ...: six layers for each block in a stage, and two.
        width: channels of the first stage; doubled in each further one.
    """

    def __init__(self, depth: int = 8, width: int = 16) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        channels = width
        for stage in range(3):
            for i in range((depth - 2) // 6):
                out = width * 2**stage
                blocks.append(Block(channels, out, 2 if stage and i == 0 else 1))
                channels = out
        self.stem = nn.Sequential(nn.Conv2d(1, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU())
        self.body = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        result: torch.Tensor = self.head(self.body(self.stem(x)).mean((2, 3)))
        return result


class ImageClassifier(L.LightningModule):
    """An ordinary LightningModule; nothing in it refers to lightning-accel.

    Args:
        depth: of the ResNet.
        width: of the ResNet.
        lr: peak learning rate; falls to zero along a cosine.
    """

    def __init__(self, depth: int = 8, width: int = 8, lr: float = 0.05) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.lr = lr
        self.net = ResNet(depth, width)
        self.accuracy = torchmetrics.classification.MulticlassAccuracy(10, average="micro")

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits ``(N, 10)`` of images ``(N, 1, 28, 28)``."""
        result: torch.Tensor = self.net(images)
        return result

    def training_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> torch.Tensor:
        """Cross-entropy."""
        images, labels = batch
        loss = cross_entropy(self(images), labels)
        self.log("train_loss", loss)
        return loss

    def validation_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Accuracy on held-out images."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("val_accuracy", self.accuracy, prog_bar=True)

    def test_step(self, batch: tuple[torch.Tensor, torch.Tensor], batch_idx: int) -> None:
        """Accuracy on test images."""
        images, labels = batch
        self.accuracy(self(images), labels)
        self.log("test_accuracy", self.accuracy)

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """SGD with momentum under a cosine."""
        optimizer = torch.optim.SGD(self.parameters(), self.lr, momentum=0.9, weight_decay=5e-4, nesterov=True)
        steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.lr, total_steps=steps, pct_start=0.1)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
