"""Restart ModelCheckpoint and EarlyStopping once every compression target is reached."""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.core.trainers import callbacks_of


def restart_monitors(trainer: L.Trainer) -> None:
    """Restart checkpointing and early stopping: scores of the dense network no longer count.

    Files kept as best so far get the worst possible score, so the next one replaces them on disk and takes
    their name: a ``best.ckpt`` is never that of the dense network.
    """
    for callback in callbacks_of(trainer, L.Callback):
        if isinstance(callback, ModelCheckpoint) and callback.monitor is not None:
            worst = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
            callback.best_k_models = dict.fromkeys(callback.best_k_models, worst)
            callback.best_model_path, callback.best_model_score, callback.current_score = "", None, None
            callback.kth_value = worst
        if isinstance(callback, EarlyStopping):
            callback.wait_count = 0
            callback.best_score = torch.tensor(torch.inf if callback.mode == "min" else -torch.inf)
        if isinstance(callback, ModelCheckpoint | EarlyStopping) and callback.monitor is not None:
            rank_zero_info(
                f"{type(callback).__name__}: every target is reached in epoch {trainer.current_epoch}; the best "
                f"`{callback.monitor}` is counted from here."
            )


def stopped_epochs(trainer: L.Trainer) -> list[int]:
    """Epochs in which an ``EarlyStopping`` stopped the run; none if that was before a resume."""
    if not trainer.should_stop:
        return []
    watching = callbacks_of(trainer, EarlyStopping)
    return [c.stopped_epoch for c in watching if c.stopping_reason is not EarlyStoppingReason.NOT_STOPPED]
