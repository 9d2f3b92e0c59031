"""Monitors: what watches a score counts from where every target is reached, and says in which epoch it ended a run."""

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.callbacks.early_stopping import EarlyStoppingReason
from lightning.pytorch.utilities import rank_zero_info


def restart_monitors(trainer: L.Trainer) -> None:
    """Let checkpoints and early stopping count from now on: a score of the dense network is no rival.

    Files that were kept as best so far have the worst score from now on, so the next one takes their place on the disk and
    their name: a ``best.ckpt`` is never that of the dense network.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
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
    """Epochs in which an ``EarlyStopping`` has asked for the run's end; none if it was an earlier run's, before a resume."""
    if not trainer.should_stop:
        return []
    watching = [c for c in trainer.callbacks if isinstance(c, EarlyStopping)]  # type: ignore[attr-defined]
    return [c.stopped_epoch for c in watching if c.stopping_reason is not EarlyStoppingReason.NOT_STOPPED]
