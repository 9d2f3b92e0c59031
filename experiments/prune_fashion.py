"""What 80 % of zeros cost in accuracy: `WeightPruning` beside the pruning that torch and Lightning come with.

ResNet-8 w16 on Fashion-MNIST, 20,000 training images and all 10,000 test images, 8 epochs of SGD under OneCycleLR. All
rows prune the same weights (two or more dimensions), globally, by magnitude, to the same share of zeros, all but one by
epoch 6 (by epoch 10 with `--epochs 16`, which trains the first, second and fourth row):

    dense                    nothing is pruned
    WeightPruning            cubic from epoch 1 to 6, a mask update every few steps
    WeightPruning to epoch 4 the same, done earlier: more epochs are left in which the rest of the weights recover
    Lightning ModelPruning   the same cubic curve, at the ends of epochs 1 to 5 (amounts of what is left, so they don't compound)
    torch.nn.utils.prune     once, at the start of epoch 3, masks kept since

    OMP_NUM_THREADS=1 python -m experiments.prune_fashion [--epochs 16] [--quick]
"""

import argparse
import tempfile
from collections.abc import Mapping
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelPruning
from torch.nn.utils import prune

from examples.data import FASHION, Images
from examples.models import ImageClassifier
from experiments import print_environment
from experiments.trials import interval, paired, run_trials, table
from lightning_accel import WeightPruning
from lightning_accel.core.schedules import cubic
from lightning_accel.pruning.weights.masks import measured_sparsity

RESULTS = Path(__file__).parent / "results" / "prune_fashion.jsonl"
SEEDS = (11, 12, 13, 14, 15)
SPARSITY, BEGIN = 0.8, 1
END = {8: 6, 16: 10}  # of the pruning, by the epochs of the run
LONG_ROWS = ("dense", "WeightPruning", "Lightning ModelPruning")
TARGET = -0.3


def weights_of(module: L.LightningModule) -> list[tuple[torch.nn.Module, str]]:
    """All weights with two or more dimensions."""
    return [(m, "weight") for m in module.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]


def model_pruning(module: L.LightningModule, end: int) -> ModelPruning:
    """Lightning's callback along the cubic curve, at epoch ends."""
    share = {e: SPARSITY * cubic((e + 1 - BEGIN) / (end - BEGIN)) for e in range(BEGIN - 1, end)}
    return ModelPruning(
        "l1_unstructured",
        parameters_to_prune=weights_of(module),
        use_global_unstructured=True,
        use_lottery_ticket_hypothesis=False,
        apply_pruning=lambda epoch: BEGIN <= epoch < end,
        amount=lambda epoch: 1 - (1 - share[epoch]) / (1 - share[epoch - 1]) if BEGIN <= epoch < end else 0.0,
    )


class OneShot(L.Callback):
    """``torch.nn.utils.prune`` as its tutorial uses it: once, and the masks stay until the end."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Prune at the start of epoch 3."""
        if trainer.current_epoch == min(3, trainer.max_epochs - 1):
            prune.global_unstructured(weights_of(pl_module), prune.L1Unstructured, amount=SPARSITY)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Make it permanent."""
        for module, name in weights_of(pl_module):
            prune.remove(module, name)


def fit(module: L.LightningModule, data: Images, epochs: int, *callbacks: L.Callback) -> float:
    """Train; accuracy in percent on the test images."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = L.Trainer(
            max_epochs=epochs,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=list(callbacks),
            default_root_dir=folder,
        )
        trainer.fit(module, data)
        return round(100 * trainer.test(module, data, verbose=False)[0]["test_accuracy"], 3)


def train(seed: int, how: str, epochs: int, images: int, test: int) -> Mapping[str, float]:
    """One training; accuracy in percent on the test images, and the measured share of zeros."""
    L.seed_everything(seed, verbose=False)
    module = ImageClassifier(depth=8, width=16, lr=0.1)
    data = Images("fashion" if FASHION.is_dir() else "mnist", batch_size=128, train=images, held_out=test)
    end = END.get(epochs, epochs - 1)
    callbacks = {
        "dense": lambda: [],
        "WeightPruning": lambda: [WeightPruning(SPARSITY, start=min(BEGIN, end), end=end)],
        "WeightPruning to epoch 4": lambda: [WeightPruning(SPARSITY, start=min(BEGIN, end), end=min(4, end))],
        "Lightning ModelPruning": lambda: [model_pruning(module, END.get(epochs, END[8]))],
        "torch.nn.utils.prune": lambda: [OneShot()],
    }[how]()
    accuracy = fit(module, data, epochs, *callbacks)
    zeros = measured_sparsity(p for p in module.parameters() if p.ndim >= 2)
    return {"accuracy": accuracy, "sparsity": round(zeros, 5)}


def main() -> None:
    """Train what is missing and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two epochs on few images: shows that it runs")
    parser.add_argument("--epochs", type=int, choices=list(END), default=8, help="of the run")
    parser.add_argument("--minutes", type=float, default=38.0, help="stop before this; a re-run goes on")
    arguments = parser.parse_args()
    settings = {"epochs": arguments.epochs, "images": 20000, "test": 10000}
    if arguments.quick:
        settings = {"epochs": 2, "images": 256, "test": 200}
    print_environment()
    names = ["dense", "WeightPruning", "WeightPruning to epoch 4", "Lightning ModelPruning", "torch.nn.utils.prune"]
    if arguments.epochs == 16:
        names = list(LONG_ROWS)
    rows = {name: (lambda seed, name=name: train(seed, name, **settings)) for name in names}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch) / "quick.jsonl" if arguments.quick else RESULTS
        lines = run_trials(file, rows, SEEDS[:1] if arguments.quick else SEEDS, settings, arguments.minutes)
    print(table(lines, "dense", "accuracy", ["sparsity"]))
    mean, half = interval(paired(lines, "WeightPruning", "dense", "accuracy"))
    word = "reached" if mean >= TARGET else "missed"
    print(f"WeightPruning - dense: {mean:+.3f} ± {half:.3f} points (target: at least {TARGET}, {word})")


if __name__ == "__main__":
    main()
