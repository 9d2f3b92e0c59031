"""The Trainers and copies that the stages of a search run with, and the clock that stops one in time."""

import copy
import os
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Checkpoint, EarlyStopping
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

from lightning_accel.core import structure
from lightning_accel.core.callback import CompressionCallback
from lightning_accel.core.exact_resume import ExactResume
from lightning_accel.core.initial_weights import InitialWeights
from lightning_accel.core.packages import TrainerCallback, both, counterpart
from lightning_accel.core.patching import removed
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.export.callback import ModelExport

_OF_THE_NETWORK = (  # arguments of ModelExport that describe the network, not the run
    "data",
    "inputs",
    "samples",
    "preprocess",
    "postprocess",
    "metadata",
    "dynamic",
    "module",
    "outputs",
    "keep_samples",
    "output_kind",
)


class OutOfTimeError(Exception):
    """A training would take longer than there is time."""

    def __init__(self, needed: float, left: float) -> None:
        super().__init__()
        self.needed, self.left = needed, left


def export_options(trainer: L.Trainer) -> dict[str, Any]:
    """Arguments of the Trainer's own ModelExport that describe the network, not the run; only those that differ from their defaults.

    Raises:
        InvalidArgumentError: the batch is fixed, or isn't the first dimension of every input.
    """
    own = [c for c in trainer.callbacks if isinstance(c, ModelExport)]  # type: ignore[attr-defined]
    if not own:
        return {}
    if own[0].names_batch:
        raise InvalidArgumentError(
            "Argument `trainer` must hold a ModelExport whose batch is the first dimension of every input, since networks are measured at "
            f"several batch sizes, but got batch={own[0].batch!r} and batch_axis={own[0].batch_axis!r}. Use `la.quantize`."
        )
    plain = ModelExport()
    return {name: getattr(own[0], name) for name in _OF_THE_NETWORK if getattr(own[0], name) != getattr(plain, name)}


def trainer_like(
    trainer: L.Trainer, epochs: int | None, callbacks: Sequence[L.Callback], keep: bool = True
) -> L.Trainer:
    """A copy of a Trainer that never ran, with other callbacks and without loggers.

    Args:
        trainer: not changed.
        epochs: length of the run; ``None``: the Trainer's own.
        callbacks: of the copy.
        keep: whether the user's other callbacks run, too: those that neither compress, export, save nor stop.
    """
    own, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    trainer.callbacks, trainer.loggers = [], []  # type: ignore[attr-defined]
    try:
        work = copy.deepcopy(trainer)
    finally:
        trainer.callbacks, trainer.loggers = own, loggers  # type: ignore[attr-defined]
    ours = both(
        CompressionCallback, ModelExport, ExactResume, InitialWeights, Checkpoint, EarlyStopping, SaveConfigCallback
    )
    kept = [copy.deepcopy(c) for c in own if not isinstance(c, ours)] if keep else []
    later = [c for c in callbacks if isinstance(c, ModelExport | Checkpoint)]
    work.callbacks = [*(c for c in callbacks if c not in later), *kept, *later]  # type: ignore[attr-defined]
    if epochs is not None:
        work.fit_loop.max_epochs = epochs
    return work


def copied(module: L.LightningModule) -> L.LightningModule:
    """A copy of a module without its run."""
    with removed(module, "_trainer"):  # a run isn't part of the network
        return copy.deepcopy(module).to("cpu")


def save_network(module: L.LightningModule, path: Path) -> None:
    """Write a module's weights, hyper-parameters and structure as a checkpoint, in one step."""
    checkpoint: dict[str, Any] = {
        "state_dict": module.state_dict(),
        "pytorch-lightning_version": L.__version__,
        "epoch": 0,
        "global_step": 0,
        "hyper_parameters": dict(module.hparams),
        "callbacks": {},
    }
    structure.save_record(module, checkpoint)
    module.on_save_checkpoint(checkpoint)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        torch.save(checkpoint, file)
    os.replace(file.name, path)


class Clock(TrainerCallback):
    """Stops a training whose first steps show that it takes longer than there is time."""

    _FEWEST = 10  # steps before a prediction

    def __init__(self, seconds: float) -> None:
        self.seconds, self.stopped = seconds, False
        self._begun, self._first, self.needed = 0.0, 0, 0.0

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begun, self._first = time.monotonic(), trainer.global_step

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        done = trainer.global_step - self._first
        passed = time.monotonic() - self._begun
        if done < self._FEWEST:
            return
        self.needed = passed / done * (float(trainer.estimated_stepping_batches) - self._first)
        if self.needed > self.seconds:
            self.stopped = True
            raise counterpart(_TunerExitException, trainer)

    def raise_if_stopped(self) -> None:
        """Raise if the training was stopped."""
        if self.stopped:
            raise OutOfTimeError(self.needed, self.seconds)
