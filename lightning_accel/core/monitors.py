"""Restart ModelCheckpoint and EarlyStopping once every compression target is reached."""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.core.trainers import callbacks_of


def restart_monitors(trainer: L.Trainer) -> None:
    """Restart checkpointing and early stopping: scores of the dense network no longer count.

    Files kept as best so far get the worst possible score, so the next one replaces them on disk and takes
    their name: a ``best.ckpt`` is never that of the dense network.
    """
    checkpoints, stopping = callbacks_of(trainer, ModelCheckpoint), callbacks_of(trainer, EarlyStopping)
    for checkpoint in checkpoints:
        if checkpoint.monitor is not None:
            worst = torch.tensor(torch.inf if checkpoint.mode == "min" else -torch.inf)
            checkpoint.best_k_models = dict.fromkeys(checkpoint.best_k_models, worst)
            checkpoint.best_model_path, checkpoint.best_model_score, checkpoint.current_score = "", None, None
            checkpoint.kth_value = worst
    for stop in stopping:
        stop.wait_count = 0
        stop.best_score = torch.tensor(torch.inf if stop.mode == "min" else -torch.inf)
    monitoring: list[ModelCheckpoint | EarlyStopping] = [*checkpoints, *stopping]
    for callback in monitoring:
        if callback.monitor is not None:
            rank_zero_info(
                f"{type(callback).__name__}: every target is reached in epoch {trainer.current_epoch}; the best "
                f"`{callback.monitor}` is counted from here."
            )


def stopped_epochs(trainer: L.Trainer) -> list[int]:
    """Epochs in which an ``EarlyStopping`` stopped the run; none if that was before a resume."""
    if not trainer.should_stop:
        return []
    watching = callbacks_of(trainer, EarlyStopping)
    return [c.stopped_epoch for c in watching if _stopped(c)]


def _stopped(watching: EarlyStopping) -> bool:
    reason = getattr(watching, "stopping_reason", None)  # since Lightning 2.6; before, epoch 0 looks like no stop
    return watching.stopped_epoch > 0 if reason is None else reason.name != "NOT_STOPPED"
