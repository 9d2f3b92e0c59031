"""Curves and provenance: what the report tells of the run."""

import csv

import lightning
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger

import lightning_accel as la
from lightning_accel.bundle.provenance import run_of
from lightning_accel.reports.curves import Curves
from tests.support.models import Classifier, loader


class Logs(Classifier):
    """Logs by step and by epoch, in validation every second epoch, and a value that isn't finite."""

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        self.log("both", loss, on_step=True, on_epoch=True)
        self.log("infinite", torch.tensor(torch.inf))
        self.log("sparsity/net.conv1.weight", 0.5)
        return loss


class Record(la.ExactResume):
    def __init__(self):
        super().__init__()
        self.curves, self.run = Curves(), {}

    def on_train_start(self, trainer, pl_module):
        self.run = run_of(trainer, pl_module)

    def on_train_epoch_end(self, trainer, pl_module):
        self.curves.record(trainer)


def test_what_was_logged_is_kept_once_an_epoch(trainer, tmp_path):
    record, logger = Record(), CSVLogger(tmp_path)
    t = trainer(record, max_epochs=4, logger=logger, check_val_every_n_epoch=2, log_every_n_steps=1)
    t.fit(Logs(), loader(), loader(16))
    points = record.curves.points
    assert [(point["epoch"], point["step"]) for point in points] == [(0, 8), (1, 16), (2, 24), (3, 32)]
    # A validation every second epoch isn't repeated in between.
    assert ["val_accuracy" in point["metrics"] for point in points] == [False, True, False, True]
    assert all(set(p["metrics"]) - {"val_accuracy"} == {"train_loss", "both", "learning rate"} for p in points)
    with next(tmp_path.rglob("metrics.csv")).open() as file:
        lines = list(csv.DictReader(file))
    for name, column in (("both", "both_epoch"), ("val_accuracy", "val_accuracy")):
        written = [float(line[column]) for line in lines if line[column]]
        assert [p["metrics"][name] for p in points if name in p["metrics"]] == pytest.approx(written)
    assert points[0]["metrics"]["learning rate"] == 0.05


def test_an_epoch_that_is_run_again_takes_the_place_of_the_first(trainer):
    record = Record()
    record.curves.points = [{"epoch": e, "step": 0, "metrics": {}} for e in (0, 1, 5)]
    trainer(record, max_epochs=1).fit(Classifier(), loader())
    assert [(point["epoch"], point["step"]) for point in record.curves.points] == [(0, 8)]


def test_without_a_config_the_run_is_told_by_its_settings(trainer, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py", "--name", "two words"])
    record = Record()
    trainer(record, max_epochs=1).fit(Classifier(dropout=0.1), loader())
    assert record.run["command"] == "train.py --name 'two words'"
    assert record.run["config"] is None
    assert record.run["settings"]["Classifier"] == {"width": 8, "lr": 0.05, "dropout": 0.1}
    assert record.run["settings"]["Trainer"]["max_epochs"] == 1
    assert record.run["settings"]["callbacks"]["0 Record"] == ""  # no arguments


class Keeps(lightning.Callback):
    """Has arguments that have no single answer to whether they are equal."""

    def __init__(self, prototypes=None, weights=(1, 2), rate=0.1):
        self.prototypes, self.weights, self.rate = prototypes, weights, rate


def test_arguments_of_callbacks_may_be_tensors(trainer):
    record = Record()
    keeps = Keeps(torch.ones(3), weights=(torch.zeros(2), torch.ones(2)), rate=0.5)
    trainer(record, keeps, max_epochs=1).fit(Classifier(), loader())
    assert record.run["settings"]["callbacks"]["1 Keeps"] == "prototypes=Tensor, weights=[Tensor, Tensor], rate=0.5"
