"""Best checkpoints and early stopping beside compression; phases of runs whose epochs differ in length; runs that end unfinished."""

import logging

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, GradientAccumulationScheduler, ModelCheckpoint

import lightning_accel as la
from tests.core import drift
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


@pytest.mark.filterwarnings("ignore:.*has zeroed nearly all")
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


RUNS = {
    "accumulation": lambda: ([GradientAccumulationScheduler({0: 4, 1: 2, 2: 1})], {"train_dataloaders": loader(128)}),
    "grows": lambda: ([], {"datamodule": drift.Growing(16, 32, 64, 128)}),
    "shrinks": lambda: ([], {"datamodule": drift.Growing(128, 64, 32, 16)}),
    "stream": lambda: ([], {"train_dataloaders": drift.stream(64)}),
}


@pytest.mark.parametrize("kind", RUNS)
def test_epochs_are_epochs_whatever_their_length(trainer, kind):
    """Zeros from epoch 1 on, all of them before the first step of epoch 3; fake-quant from epoch 4 on."""
    extra, data = RUNS[kind]()
    watch, pruning = drift.Watch(), la.WeightPruning(0.5, schedule="linear", scope="layer", start=1, end=3, every=1)
    qat = la.QuantizationAwareTraining("portable", start=4, calibration_batches=1)
    fit = trainer(*extra, pruning, qat, watch, max_epochs=6, reload_dataloaders_every_n_epochs=1)
    fit.fit(Classifier(), **data)
    epochs = {epoch: [s for s in watch.seen if s[0] == epoch] for epoch in range(6)}
    assert all(s[drift.ZEROS] == 0 for s in epochs[0])
    assert epochs[1][0][drift.ZEROS] == 0
    assert epochs[2][0][drift.ZEROS] == pytest.approx(0.25, abs=1e-3)
    assert [s[drift.ZEROS] for s in epochs[3]] == [0.5] * len(epochs[3])
    assert watch.first(drift.QUANTIZED)[0] == 4
    assert epochs[4][0][drift.QUANTIZED]
    assert pruning.unfinished() == qat.unfinished() == ""
    shares = [s[drift.ZEROS] for s in watch.seen]
    assert shares == sorted(shares)
    begins = [epochs[epoch][0][1] for epoch in range(6)]  # in the report, too
    assert pruning.steps == (begins[1], begins[3])
    assert qat.steps[0] == begins[4]


@pytest.mark.parametrize("kind", RUNS)
def test_channels_leave_at_their_epochs(trainer, kind):
    extra, data = RUNS[kind]()
    watch, pruning = drift.Watch(), la.ChannelPruning(0.5, scope="layer", start=1, end=3)
    fit = trainer(*extra, pruning, watch, max_epochs=5, reload_dataloaders_every_n_epochs=1)
    fit.fit(Classifier(), **data)
    widths = [next(s[drift.CHANNELS] for s in watch.seen if s[0] == epoch) for epoch in range(5)]
    assert widths[0] == 8
    assert 8 > widths[1] > widths[3] == widths[4] == 4
    assert pruning.unfinished() == ""
    assert pruning.steps == tuple(next(s[1] for s in watch.seen if s[0] == epoch) for epoch in (1, 3))


@pytest.mark.parametrize("kind", RUNS)
def test_shares_follow_what_is_known_of_the_run(trainer, kind):
    """A half of 6 epochs: the last estimate before it begins is off by less than an epoch."""
    extra, data = RUNS[kind]()
    watch, pruning = drift.Watch(), la.WeightPruning(0.5, scope="layer", start=0.25, end=0.5)
    qat = la.QuantizationAwareTraining("portable", start=0.75, calibration_batches=1)
    fit = trainer(*extra, pruning, qat, watch, max_epochs=6, reload_dataloaders_every_n_epochs=1)
    fit.fit(Classifier(), **data)
    total, longest = fit.global_step, max(sum(s[0] == e for s in watch.seen) for e in range(6))
    assert abs(watch.first(drift.ZEROS)[1] - 0.25 * total) <= longest
    assert abs(watch.first(drift.ZEROS, 0.499)[1] - 0.5 * total) <= longest
    assert abs(watch.first(drift.QUANTIZED)[1] - 0.75 * total) <= longest
    assert pruning.unfinished() == qat.unfinished() == ""


def test_shares_of_an_endless_stream_are_steps(trainer):
    watch = drift.Watch()
    pruning = la.WeightPruning(0.5, scope="layer", schedule="linear", start=0.25, end=0.5, every=1)
    qat = la.QuantizationAwareTraining("portable", start=0.75, calibration_batches=1)
    trainer(pruning, qat, watch, max_epochs=-1, max_steps=20).fit(Classifier(), drift.stream(0))
    assert watch.first(drift.ZEROS) == (0, 6)  # the first mask update that isn't of share 0 follows step 5
    assert watch.first(drift.ZEROS, 0.499) == (0, 10)
    assert watch.first(drift.QUANTIZED) == (0, 15)
    assert pruning.unfinished() == qat.unfinished() == ""


def test_shares_of_a_stream_in_epochs_of_unknown_length(trainer):
    """40 steps in 5 epochs that nobody knows beforehand: channels leave at the first epochs that begin at step 10 and step 20."""
    watch, pruning = drift.Watch(), la.ChannelPruning(0.5, scope="layer", start=0.25, end=0.5)
    trainer(pruning, watch, max_epochs=-1, max_steps=40).fit(Classifier(), drift.stream(64))
    widths = [next(s[drift.CHANNELS] for s in watch.seen if s[0] == epoch) for epoch in range(5)]
    assert widths[:2] == [8, 8]
    assert widths[2] == 6
    assert widths[3:] == [4, 4]


@pytest.mark.filterwarnings("ignore:ExactResume. Stream is an iterable")  # exact from the ends of epochs
@pytest.mark.parametrize("kind", RUNS)
@pytest.mark.parametrize("positions", [(1, 3), (0.2, 0.5), (1, None)], ids=["epochs", "shares", "mixed"])
def test_drifting_runs_resume_bit_identically(trainer, tmp_path, kind, positions):
    def run(ckpt_path=None):
        torch.manual_seed(0)
        extra, data = RUNS[kind]()
        module, pruning = Classifier(), la.WeightPruning(0.5, start=positions[0], end=positions[1], every=1)
        keep = [
            ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1),
            ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1),
        ]
        settings = {"max_epochs": 5, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": not ckpt_path}
        fit = trainer(la.ExactResume(), *extra, pruning, *([] if ckpt_path else keep), **settings)
        fit.fit(module, **data, ckpt_path=ckpt_path)
        return drift.weights(module), fit.global_step

    want, steps = run()
    # GradientAccumulationScheduler itself resumes exactly from the ends of epochs alone.
    within = [] if kind in ("stream", "accumulation") else [steps // 3, steps // 2, steps - 3]
    for name in ("epoch=1", "epoch=2", *(f"step={step}" for step in within)):
        got, _ = run(tmp_path / f"{name}.ckpt")
        assert all(torch.equal(want[key], got[key]) for key in want), name


@pytest.mark.filterwarnings("ignore:.*waits beyond `start`")  # an epoch that grows past both positions
@pytest.mark.parametrize("kind", ["grows", "shrinks"])
def test_channels_and_fake_quant_of_drifting_runs_resume_bit_identically(trainer, tmp_path, kind):
    def run(ckpt_path=None):
        torch.manual_seed(0)
        _, data = RUNS[kind]()
        module, pruning = Classifier(), la.ChannelPruning(0.4, start=0.2, end=0.5)
        qat = la.QuantizationAwareTraining("portable", start=0.6, calibration_batches=1)
        keep = [] if ckpt_path else [ModelCheckpoint(tmp_path, "{epoch}", every_n_epochs=1, save_top_k=-1)]
        settings = {"max_epochs": 6, "reload_dataloaders_every_n_epochs": 1, "enable_checkpointing": not ckpt_path}
        fit = trainer(la.ExactResume(), pruning, qat, *keep, **settings)
        fit.fit(module, **data, ckpt_path=ckpt_path)
        return drift.weights(module)

    want = run()
    for epoch in (0, 3):
        got = run(tmp_path / f"epoch={epoch}.ckpt")
        assert all(torch.equal(want[key], got[key]) for key in want), epoch


def last_line(caplog) -> tuple[int, str]:
    return caplog.records[-1].levelno, caplog.records[-1].getMessage()


def test_a_run_that_ends_unfinished_says_so_last(trainer, caplog):
    """Whatever ended it, and however quiet the loggers are."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    try:
        trainer(la.WeightPruning(0.5, end=1.0), max_epochs=-1, max_steps=3).fit(Classifier(), drift.stream(0))
        trainer(la.WeightPruning(0.5, start=2, end=3), max_steps=3, max_epochs=-1).fit(Classifier(), drift.stream(0))
    finally:
        logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    level, line = last_line(caplog)
    assert level == logging.ERROR
    assert line == (
        "The run ended before its targets were reached: WeightPruning('weights') reached sparsity 0.000 of 0.5. Train longer, or let the "
        "phases end earlier."
    )


def test_fake_quant_that_never_starts_is_said(trainer, caplog):
    """The epochs shrink to a batch each, and calibration needs four."""
    qat = la.QuantizationAwareTraining("portable", start=2, calibration_batches=4)
    fit = trainer(qat, la.WeightPruning(0.5, end=1), max_epochs=4, reload_dataloaders_every_n_epochs=1)
    fit.fit(Classifier(), datamodule=drift.Growing(64, 64, 8))
    level, line = last_line(caplog)
    assert level == logging.ERROR
    assert (
        "QuantizationAwareTraining('qat') hasn't trained with fake-quant yet: it starts at 2 and has seen 2 of 4"
        in line
    )
    assert "WeightPruning" not in line


def test_an_endless_stream_never_reaches_epoch_one(trainer, caplog):
    trainer(la.ChannelPruning(0.5, start=1, end=1), max_epochs=3, max_steps=12).fit(Classifier(), drift.stream(0))
    assert "ChannelPruning('channels') has gone 0% of the way" in last_line(caplog)[1]


def test_a_finished_run_says_nothing(trainer, caplog):
    trainer(la.WeightPruning(0.5, end=1)).fit(Classifier(), loader())
    trainer(la.WeightPruning(0.5, end=1), fast_dev_run=True).fit(Classifier(), loader())
    la.plan(trainer(la.WeightPruning(0.5, end=1)), Classifier(), train_dataloaders=loader())
    assert "before its targets" not in caplog.text


def test_quantization_waits_for_the_final_shapes(trainer):
    """Planned: channels leave until step 20 of 40, at the beginning of epoch 3. Epochs become longer than expected."""
    watch, pruning = drift.Watch(), la.ChannelPruning(0.5, scope="layer", start=1, end=0.5)
    qat = la.QuantizationAwareTraining("portable", start=3, calibration_batches=1)
    fit = trainer(pruning, qat, watch, max_epochs=5, reload_dataloaders_every_n_epochs=1)
    with pytest.warns(UserWarning, match=r"waits beyond `start` \(3\) for the network's final shapes: ChannelPruning"):
        fit.fit(Classifier(), datamodule=drift.Growing(64, 64, 64, 512, 64))
    assert watch.first(drift.QUANTIZED)[0] == 4
    assert [s[drift.CHANNELS] for s in watch.seen][-1] == 4
