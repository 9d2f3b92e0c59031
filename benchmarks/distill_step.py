"""How much longer a distilled training step takes than a plain one, with the live teacher and with a TeacherCache.

A step is all that `Trainer.fit` does for a batch of 64 images: fetching it, training_step, backward, SGD, logging. A ResNet-8 w8
learns from a ResNet-20 w16. Three trainings run in one process and take turns step by step, in an order shuffled anew each
round, so that the machine's moods hit all alike; the teacher's own forward on a batch is a fourth. Ratios are medians over
rounds; their 95 % intervals come from resampling them. With a cache the live teacher is asked once an epoch; those steps are in
the rounds as they come, one in 312.

    python -m benchmarks.distill_step [--quick]
"""

import argparse
import logging
import tempfile
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import print_environment, verdict
from examples.models import ImageClassifier, ResNet
from lightning_accel import DistillationModule, TeacherCache
from lightning_accel.benchmarking.measure import benchmark, median_ratio

THREADS, BATCH, IMAGES = 2, 64, 20_000
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
        data = TensorDataset(torch.randn(images, 1, 28, 28), torch.randint(0, 10, (images,)))
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


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rounds: shows that it runs, not what it costs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", ".*does not have many workers")  # the images lie in memory
    warnings.filterwarnings("ignore", ".*no `val_dataloader`")
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", ".*LeafSpec", FutureWarning)  # Lightning uses what torch has just deprecated
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    print_environment()
    images = 512 if quick else IMAGES
    teacher = ResNet(20, 16).eval().requires_grad_(False)
    batch = torch.randn(BATCH, 1, 28, 28)

    def alone() -> None:
        with torch.no_grad():
            teacher(batch)

    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        students = {
            "cross-entropy": lambda: ImageClassifier(8, 8),
            "online": lambda: DistillationModule(ImageClassifier(8, 8), teacher),
            "cached": lambda: DistillationModule(ImageClassifier(8, 8), teacher, cache=TeacherCache(folder / "cache")),
        }
        runs = {name: training(make, images, folder) for name, make in students.items()}
        ways: dict[str, Callable[[], None]] = {name: turns.step for name, (turns, _) in runs.items()}
        rounds, seconds = (3, 1.0) if quick else (600, 180.0)
        result = benchmark(
            {**ways, "teacher": alone},
            rounds=rounds,
            min_rounds=min(20, rounds),
            max_seconds=seconds,
            warmup_s=seconds / 40,
        )
        for turns, thread in runs.values():
            turns.over = True
            turns.go.release()
            thread.join()
    for way in result.measurements:
        print(f"{way.name}: p50 {way.p50_ms:.2f} ms, p90 {way.p90_ms:.2f} ms, {result.rounds} rounds")
    print(f"null run (cross-entropy twice): {result.null.value:.4f} [{result.null.low:.4f}, {result.null.high:.4f}]")
    plain, online, cached, forward = (result[name].samples for name in ("cross-entropy", "online", "cached", "teacher"))
    rng = np.random.default_rng(0)
    speed = median_ratio(online, cached, rng)
    word = "reached" if speed.value >= ONLINE else "missed"
    print(
        f"online step / cached step: {speed.value:.4f} [{speed.low:.4f}, {speed.high:.4f}] (target: at least {ONLINE}, {word})"
    )
    both = [a + b for a, b in zip(plain, forward, strict=True)]
    print(
        verdict(
            "online step / (cross-entropy step + the teacher's forward)", [median_ratio(online, both, rng)], OVERHEAD
        )
    )
    print(verdict("cached step / cross-entropy step", [median_ratio(cached, plain, rng)], CACHED))


if __name__ == "__main__":
    main()
