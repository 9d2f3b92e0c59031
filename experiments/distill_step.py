"""How much longer a distilled training step takes than a plain one, with the live teacher and with a TeacherCache.

A step is all that `Trainer.fit` does for a batch of 64 images: fetching it, training_step, backward, SGD, logging. A ResNet-8 w8
learns from a ResNet-20 w16. Trainings run in one process and take turns step by step, in an order shuffled anew each round, so that the
machine's moods hit all alike; the teacher's own forward on a batch is one more.

Where a training's memory happens to lie makes it up to 5 % faster or slower than one of the same kind for as long as it lives, which no
number of rounds averages out. So all trainings begin anew for each generation of a few rounds, and plain cross-entropy is trained
twice: what tells the two apart is the machine. Ratios are of medians over a generation's rounds; their means and 95 % intervals
(Student's t, of logarithms) are over generations. With a cache the live teacher is asked once an epoch; those steps are left out.

    python -m experiments.distill_step [--quick]
"""

import argparse
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from examples.models import ImageClassifier, ResNet
from experiments import print_environment, verdict
from experiments.trials import interval
from lightning_accel import DistillationModule, TeacherCache
from lightning_accel.benchmarking.measure import Ratio, benchmark

THREADS, BATCH, IMAGES = 2, 64, 6400
CACHED, ONLINE, OVERHEAD = 1.02, 1.5, 1.03  # targets


class Over(Exception):  # noqa: N818 - no error: it leaves a training
    """The measurement is over."""


class Turns(L.Callback):
    """A training that waits after each batch until it is its turn again."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.over = False
        self.failed: BaseException | None = None

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        """Hand over."""
        self.done.release()
        self.go.acquire()
        if self.over:
            raise Over

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        """Hand over for good."""
        self.failed = exception
        self.done.release()  # whoever waits sees it

    def step(self) -> None:
        """Let it take one step."""
        self.go.release()
        self.done.acquire()
        if self.failed is not None:
            raise self.failed


def training(make: Callable[[], L.LightningModule], images: int, folder: Path) -> tuple[Turns, threading.Thread]:
    """Begin a training in a thread; it has taken its first step when this returns."""
    turns = Turns()

    def run() -> None:
        torch.set_num_threads(THREADS)  # OpenMP counts threads for each thread that computes
        same = torch.Generator().manual_seed(0)
        data = TensorDataset(
            torch.randn(images, 1, 28, 28, generator=same), torch.randint(0, 10, (images,), generator=same)
        )
        trainer = L.Trainer(
            max_epochs=1000,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            limit_val_batches=0,
            callbacks=[turns],
            default_root_dir=folder,
        )
        with suppress(Over):
            trainer.fit(make(), DataLoader(data, BATCH, shuffle=True, drop_last=True))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    turns.done.acquire()
    if turns.failed is not None:
        raise turns.failed
    return turns, thread


def generation(
    students: Mapping[str, Callable[[], L.LightningModule]],
    alone: Callable[[], None],
    images: int,
    folder: Path,
    rounds: int,
    seed: int,
) -> dict[str, np.ndarray]:
    """Times in ms of the steps of trainings that begin and end here, and of the teacher alone; each ``(rounds,)``."""
    runs = {name: training(make, images, folder) for name, make in students.items()}
    try:
        variants = {**{name: turns.step for name, (turns, _) in runs.items()}, "teacher": alone}
        found = benchmark(variants, rounds=rounds, min_rounds=rounds, warmup_s=0.2, seed=seed)
    finally:
        for turns, thread in runs.values():
            turns.over = True
            turns.go.release()
            thread.join()
    return {variant.name: np.asarray(variant.samples) for variant in found.measurements}


def mean_ratio(ratios: list[float]) -> Ratio:
    """Geometric mean of the generations' ratios, and its interval."""
    mean, half = interval(np.log(ratios).tolist())
    return Ratio(*np.exp([mean, mean - half, mean + half]).tolist())


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two generations: shows that it runs, not what it costs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*no `val_dataloader`")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print_environment()
    images, rounds, generations = (512, 3, 2) if quick else (IMAGES, 12, 60)
    teacher = ResNet(20, 16).eval().requires_grad_(False)
    batch = torch.randn(BATCH, 1, 28, 28)

    def alone() -> None:
        with torch.no_grad():
            teacher(batch)

    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        students = {
            "cross-entropy": lambda: ImageClassifier(8, 8),
            "cross-entropy again": lambda: ImageClassifier(8, 8),
            "online": lambda: DistillationModule(ImageClassifier(8, 8), teacher),
            "cached": lambda: DistillationModule(ImageClassifier(8, 8), teacher, cache=TeacherCache(folder / "cache")),
        }
        for number in range(generations):
            times = generation(students, alone, images, folder, rounds, number)
            medians = {name: float(np.median(samples)) for name, samples in times.items()}
            plain = (medians["cross-entropy"] + medians["cross-entropy again"]) / 2
            for name, value in {
                "plain, ms": plain,
                "null": medians["cross-entropy again"] / medians["cross-entropy"],
                "speed": medians["online"] / medians["cached"],
                "overhead": medians["online"] / (plain + medians["teacher"]),
                "cached": medians["cached"] / plain,
            }.items():
                found.setdefault(name, []).append(value)
    spread = np.std(np.log(found["null"]), ddof=1)
    print(f"{generations} generations of {rounds} rounds; a plain step: {np.median(found['plain, ms']):.1f} ms")
    null = mean_ratio(found["null"])
    print(
        f"null run (one plain training / another): {null.value:.4f} [{null.low:.4f}, {null.high:.4f}]; of single generations the "
        f"standard deviation is {spread:.1%}"
    )
    speed = mean_ratio(found["speed"])
    word = "reached" if speed.value >= ONLINE else "missed"
    print(
        f"online step / cached step: {speed.value:.4f} [{speed.low:.4f}, {speed.high:.4f}] (target: at least {ONLINE}, {word})"
    )
    overhead = mean_ratio(found["overhead"])
    print(verdict("online step / (cross-entropy step + the teacher's forward)", [overhead], OVERHEAD))
    print(verdict("cached step / cross-entropy step", [mean_ratio(found["cached"])], CACHED))


if __name__ == "__main__":
    main()
