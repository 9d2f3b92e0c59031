"""Best checkpoints and early stopping beside compression: a dense epoch's score is no rival."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_accel as la
from tests.models import Classifier, loader


class Scores(Classifier):
    """Logs a score that falls from epoch to epoch, so that the first, dense epoch is the best."""

    def validation_step(self, batch, batch_idx):
        self.log("score", torch.tensor(1.0 - 0.1 * self.current_epoch))


def test_only_epochs_with_every_target_reached_count_as_best(trainer, tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max")
    fit = trainer(best, la.WeightPruning(0.5, end=2), max_epochs=5, enable_checkpointing=True)
    fit.fit(Scores(), loader(), loader())
    assert best.best_model_path.endswith("epoch=1.ckpt")  # its last step moved the masks to the target
    assert float(best.best_model_score) == pytest.approx(0.9)


def test_the_best_of_before_a_resume_still_counts(trainer, tmp_path):
    best = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_last=True)
    fit = trainer(best, la.WeightPruning(0.5, end=2), max_epochs=3, enable_checkpointing=True)
    fit.fit(Scores(), loader(), loader())
    again = ModelCheckpoint(tmp_path, "{epoch}", monitor="score", mode="max", save_last=True)
    more = trainer(again, la.WeightPruning(0.5, end=2), max_epochs=5, enable_checkpointing=True)
    more.fit(Scores(), loader(), loader(), ckpt_path=tmp_path / "last.ckpt")
    assert again.best_model_path.endswith("epoch=1.ckpt")


def test_early_stopping_counts_from_there_too(trainer):
    stop = EarlyStopping("score", mode="max", patience=2)
    fit = trainer(stop, la.WeightPruning(0.5, end=2), max_epochs=8)
    fit.fit(Scores(), loader(), loader())
    assert stop.stopped_epoch == 3  # the best is epoch 1, then two without a better one


def test_stopping_before_is_an_error_that_names_the_epoch(trainer):
    stop = EarlyStopping("score", mode="max", patience=1)
    fit = trainer(stop, la.WeightPruning(0.5, end=6), max_epochs=8)
    with pytest.raises(
        RuntimeError, match=r"it stopped in epoch 1, and WeightPruning\('weights'\) reached sparsity 0.\d+ of 0.5"
    ):
        fit.fit(Scores(), loader(), loader())
