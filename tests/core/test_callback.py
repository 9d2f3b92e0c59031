"""Best checkpoints and early stopping beside compression: a dense epoch's score is no rival."""

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

import lightning_accel as la
from tests.support.models import Classifier, loader


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


@pytest.mark.parametrize("top", [1, 3])
def test_the_file_of_a_dense_best_gives_way(trainer, tmp_path, top):
    """A fixed name is that of the compressed network, and no more files are left than asked for."""
    best = ModelCheckpoint(
        tmp_path, "best", monitor="score", mode="max", save_top_k=top, enable_version_counter=top > 1
    )
    fit = trainer(best, la.WeightPruning(0.5, start=2, end=4), max_epochs=8, enable_checkpointing=True)
    fit.fit(Scores(), loader(), loader())
    files = sorted(tmp_path.glob("*.ckpt"))
    assert len(files) == top
    epochs = {torch.load(file, weights_only=True)["epoch"] for file in files}
    assert epochs == set(range(3, 3 + top))  # the last step of epoch 3 reaches the target
    assert torch.load(best.best_model_path, weights_only=True)["epoch"] == 3


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


class TrainingScores(Classifier):
    """The same without validation."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("score", torch.tensor(1.0 - 0.1 * self.current_epoch))
        return loss


@pytest.mark.parametrize(
    ("settings", "name"),
    [({}, "epoch=1-step=16"), ({"every_n_train_steps": 4}, "epoch=1-step=16")],
    ids=["epochs", "steps"],
)
def test_a_training_metric_counts_from_there_too(trainer, tmp_path, settings, name):
    best = ModelCheckpoint(tmp_path, "{epoch}-{step}", monitor="score", mode="max", **settings)
    fit = trainer(best, la.WeightPruning(0.5, end=2), max_epochs=5, enable_checkpointing=True)
    fit.fit(TrainingScores(), loader())
    assert best.best_model_path.endswith(f"{name}.ckpt")
    assert float(best.best_model_score) == pytest.approx(0.9)


@pytest.mark.parametrize("first", [True, False])
def test_stopping_by_a_training_metric_counts_from_there_too(trainer, first):
    stop, pruning = EarlyStopping("score", mode="max", patience=2), la.WeightPruning(0.5, end=3)
    fit = trainer(*((stop, pruning) if first else (pruning, stop)), max_epochs=8)
    fit.fit(TrainingScores(), loader())
    assert (
        stop.stopped_epoch == 4
    )  # the masks reach the target in epoch 2, its last step; then two without a better one


@pytest.mark.parametrize("settings", [{"stopping_threshold": 0.5}, {"divergence_threshold": 2.0}])
def test_stopping_in_the_first_epoch_is_noticed(trainer, settings):
    fit = trainer(EarlyStopping("score", mode="max", **settings), la.WeightPruning(0.5, end=6), max_epochs=8)
    with pytest.raises(RuntimeError, match="it stopped in epoch 0, and WeightPruning"):
        fit.fit(Scores(), loader(), loader())


def test_stopping_before_is_an_error_that_names_the_epoch(trainer):
    stop = EarlyStopping("score", mode="max", patience=1)
    fit = trainer(stop, la.WeightPruning(0.5, end=6), max_epochs=8)
    with pytest.raises(
        RuntimeError, match=r"it stopped in epoch 1, and WeightPruning\('weights'\) reached sparsity 0.\d+ of 0.5"
    ):
        fit.fit(Scores(), loader(), loader())


def test_a_stop_of_before_a_resume_ends_nothing(trainer, tmp_path):
    """The state of the callback still says that it stopped; this run ends by its last epoch, with a new target ahead."""

    def run(sparsity, **settings):
        stop = EarlyStopping("score", mode="max", patience=1, strict=False)
        last = ModelCheckpoint(tmp_path, save_last=True)
        fit = trainer(stop, last, la.WeightPruning(sparsity, end=1.0), enable_checkpointing=True, **settings)
        path = tmp_path / "last.ckpt"
        fit.fit(Scores(), loader(), loader(16), ckpt_path=path if path.exists() else None)
        return stop

    with pytest.raises(RuntimeError, match="it stopped in epoch 1"):
        run(0.5, max_epochs=8)
    stop = run(0.9, max_epochs=8, max_steps=20)  # in the middle of epoch 2
    assert stop.stopped_epoch == 1
