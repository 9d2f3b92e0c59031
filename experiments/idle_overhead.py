"""What callbacks cost while they are attached but have nothing to do yet, and that they change nothing.

All callbacks of this library are attached to a Trainer; their phases begin in the last epoch, which is not reached.

Bit-identity: the weights after the same steps of a plain Trainer and of one with the callbacks are compared bit for bit,
with data in random order and dropout.

Time: one ``fit`` in which the callbacks are taken out of and put back into the Trainer's list every few steps, together
with the hook that they left on the optimizer. Two fits one after the other could not resolve 1 % on a machine whose speed
drifts by more; blocks of steps that alternate within one fit can. Which of the two comes first alternates too, and the
first step of each block, in which the switch is made, is not counted. The ratio is the median over pairs of neighbouring
blocks of (time with) / (time without); its 95 % interval comes from resampling the pairs. The null run does the same with
nothing to switch: its interval shows what this machine makes of a difference that isn't there.

    python -m experiments.idle_overhead [--quick]
"""

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, TensorDataset

import lightning_accel as la
from examples.models import ImageClassifier
from experiments import print_environment, verdict
from lightning_accel.benchmarking.measure import Ratio, median_ratio

TARGET = 1.01


class Dropping(ImageClassifier):
    """The classifier of the examples, with dropout: a shifted random state would show in the weights."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.net(nn.functional.dropout(images, 0.1, self.training))


class Done(Exception):  # noqa: N818 (not an error: the run ends here on purpose)
    """The last epoch, in which the callbacks would begin, is about to begin."""


class Alternate(L.Callback):
    """Takes ``idle`` callbacks out and puts them back in every ``block`` steps, and measures the blocks."""

    def __init__(self, idle: list[L.Callback], block: int) -> None:
        self.idle, self.block = idle, block
        self.times: dict[bool, list[float]] = {True: [], False: []}
        self._attached, self._step, self._since = True, 0, 0.0
        self._callbacks: list[L.Callback] = []
        self._hooks: dict[Any, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Remember what is to be switched."""
        self._callbacks = list(trainer.callbacks)
        self._hooks = dict(trainer.optimizers[0]._optimizer_step_post_hooks) if self.idle else {}

    def on_train_batch_start(self, trainer: L.Trainer, *_: Any) -> None:
        """End a block and begin the next one."""
        now = time.perf_counter()
        place = self._step % self.block
        if place == 0:
            if self._step:
                self.times[self._attached].append(now - self._since)
            block = self._step // self.block
            self._switch(trainer, attached=(block % 4) in (0, 3))  # with, without, without, with
        elif place == 1:
            self._since = now
        self._step += 1

    def _switch(self, trainer: L.Trainer, attached: bool) -> None:
        self._attached = attached
        hooks = trainer.optimizers[0]._optimizer_step_post_hooks
        for key, hook in self._hooks.items():
            hooks.pop(key, None)
            if attached:
                hooks[key] = hook
        trainer.callbacks = [c for c in self._callbacks if attached or c not in self.idle]

    def ratio(self, skip: int = 2) -> tuple[Ratio, int]:
        """(time with) / (time without) over pairs of neighbouring blocks, and the number of pairs."""
        pairs = list(zip(self.times[True], self.times[False], strict=False))[skip:]
        return median_ratio(*zip(*pairs, strict=True), np.random.default_rng(0)), len(pairs)


class Stop(L.Callback):
    """Keeps the weights and ends the run before the last epoch begins."""

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """End it."""
        if trainer.current_epoch == trainer.max_epochs - 1:
            self.weights = {name: value.clone() for name, value in pl_module.state_dict().items()}
            raise Done


def idle_callbacks(folder: str, start: int) -> list[L.Callback]:
    """All of this library's callbacks, none of which has begun before epoch ``start``."""
    return [
        la.WeightPruning(0.5, start=start, end=start + 1),
        la.QuantizationAwareTraining("portable", start=start),
        la.ExactResume(),
        la.ModelExport(str(Path(folder) / "bundle"), engines=["onnxruntime"]),
    ]


def run(folder: str, callbacks: list[L.Callback], batches: int, epochs: int) -> dict[str, torch.Tensor]:
    """Train until the last epoch; return the weights."""
    L.seed_everything(0, verbose=False)
    size = 64
    data = TensorDataset(torch.randn(50 * size, 1, 28, 28), torch.randint(0, 10, (50 * size,)))
    sampler = RandomSampler(data, replacement=True, num_samples=batches * size)
    held_out = TensorDataset(torch.randn(size, 1, 28, 28), torch.randint(0, 10, (size,)))
    stop = Stop()
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=epochs,
        default_root_dir=folder,
        callbacks=[*callbacks, stop],
    )
    try:
        trainer.fit(Dropping(depth=8, width=16), DataLoader(data, size, sampler=sampler), DataLoader(held_out, size))
    except Done:
        return stop.weights
    raise RuntimeError("The run must end before its last epoch.")


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few steps: shows that it runs, not what it costs")
    quick = parser.parse_args().quick
    warnings.filterwarnings("ignore", ".*does not have many workers")  # data lies in memory
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)
    torch.set_num_threads(1 if quick else 2)  # where other processes take the cores, threads wait for each other
    print_environment()
    batches, block = (16, 4) if quick else (3000, 4)
    with tempfile.TemporaryDirectory() as folder:
        few = min(batches, 100)
        plain = run(folder, [], few, 2)
        attached = run(folder, idle_callbacks(folder, 1), few, 2)
        same = plain.keys() == attached.keys() and all(torch.equal(plain[n], attached[n]) for n in plain)
        print(f"weights after {few} steps with idle callbacks and without: {'bit-identical' if same else 'DIFFERENT'}")
        if not same:
            raise SystemExit("Idle callbacks must leave the weights alone, but they differ.")
        null = Alternate([], block)
        run(folder, [null], batches, 2)
        idle = idle_callbacks(folder, 1)
        alternate = Alternate(idle, block)
        run(folder, [alternate, *idle], batches, 2)
    value, pairs = null.ratio(skip=0 if quick else 2)
    print(
        f"null run (nothing to switch): {value.value:.4f} [{value.low:.4f}, {value.high:.4f}], {pairs} pairs of blocks"
    )
    value, pairs = alternate.ratio(skip=0 if quick else 2)
    step = np.median(alternate.times[False]) / (block - 1) * 1e3
    print(f"step without callbacks: {step:.2f} ms (ResNet-8 w16, batch 64), {pairs} pairs of blocks of {block} steps")
    print(verdict("step with idle callbacks / step without", [value], TARGET))


if __name__ == "__main__":
    main()
