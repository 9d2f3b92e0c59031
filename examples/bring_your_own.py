"""Distill, prune, quantize, export and run an ordinary LightningModule with two inputs.

    python -m examples.bring_your_own

``TwoViews`` below doesn't refer to this library. Its inputs are an image and the mean intensity of each row.
"""

import lightning as L
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from examples.data import Images
from examples.options import is_quick


class TwoViews(L.LightningModule):
    """Convolutions over the image, a linear layer over its rows: ``(N, 1, 28, 28)`` and ``(N, 28)`` to ``(N, 10)``."""

    def __init__(self, width: int, lr: float = 0.01):
        super().__init__()
        self.save_hyperparameters()
        self.image = nn.Sequential(
            *(nn.Conv2d(1, width, 5, stride=2), nn.BatchNorm2d(width), nn.ReLU()),
            *(nn.Conv2d(width, 2 * width, 5, stride=2), nn.BatchNorm2d(2 * width), nn.ReLU(), nn.Flatten()),
        )
        self.rows = nn.Linear(28, width)
        self.head = nn.Linear(2 * width * 16 + width, 10)

    def forward(self, image, rows):
        """Logits."""
        return self.head(torch.cat([self.image(image), torch.relu(self.rows(rows))], 1))

    def training_step(self, batch, batch_idx):
        """Cross-entropy."""
        image, rows, label = batch
        return cross_entropy(self(image, rows), label)

    def validation_step(self, batch, batch_idx):
        """Accuracy on held-out images."""
        image, rows, label = batch
        self.log("val_accuracy", (self(image, rows).argmax(1) == label).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), self.hparams.lr)


def main() -> None:
    """Train a teacher, then a smaller network that ships."""
    quick = is_quick(__doc__)
    L.seed_everything(1, verbose=False)
    images = Images("mnist", train=640 if quick else 4000, held_out=256 if quick else 1000)
    images.prepare_data()
    train, held_out = (TensorDataset(x, x.mean((1, 3)), y) for x, y in (part[:] for part in images.parts))
    loaders = DataLoader(train, 64, shuffle=True, drop_last=True), DataLoader(held_out, 256)
    settings = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_model_summary": False}

    teacher = TwoViews(width=16)
    L.Trainer(max_epochs=1 if quick else 2, **settings).fit(teacher, *loaders)

    student = TwoViews(width=6)
    callbacks = [
        la.WeightPruning(sparsity=0.5, end=2),  # half of the weights are zero at the first step of epoch 2
        la.QuantizationAwareTraining(target="portable", start=3),
        la.ExactResume(),
        la.ModelExport("artifacts/bring_your_own", engines=["onnxruntime"]),
    ]
    module = la.DistillationModule(student, teacher)
    L.Trainer(max_epochs=4, callbacks=callbacks, **settings).fit(module, *loaders)

    image, rows, label = held_out[:]
    with la.load_runner("artifacts/bring_your_own") as runner:  # needs neither torch nor lightning
        logits = runner(image.numpy(), rows.numpy())
    print(
        f"From the bundle: {(logits.argmax(1) == label.numpy()).mean():.1%} of {len(label)} held-out images are right."
    )


if __name__ == "__main__":
    main()
