"""Change of a score between two networks on the same data."""

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.export.ptq_baseline import paired_difference
from lightning_accel.export.quality import Scores, _Part, change, lower_is_better, monitored


def test_accuracy_is_compared_sample_by_sample():
    rng = np.random.default_rng(0)
    before, after = rng.random(500) < 0.9, rng.random(500) < 0.8
    found = change(Scores(before, {"val_loss": 1.0}), Scores(after, {"val_loss": 0.0}), {})
    assert (found.score, found.value, found.low, found.high) == ("accuracy", *paired_difference(before, after))
    assert found.worse
    assert str(found).startswith(f"{100 * found.value:+.2f} points [")


def test_a_metric_over_parts_of_the_data_has_students_interval():
    one, two = [0.5, 0.6, 0.4, 0.55, 0.52], [0.52, 0.65, 0.43, 0.55, 0.56]
    blocks = lambda values: [{"val_mae": value} for value in values]  # noqa: E731
    found = change(
        Scores(metrics={"val_mae": 0.51}, blocks=blocks(one)), Scores(metrics={"val_mae": 0.55}, blocks=blocks(two)), {}
    )
    steps = np.subtract(one, two)  # an error: smaller is better
    half = stats.t.ppf(0.975, 4) * steps.std(ddof=1) / np.sqrt(5)
    assert (found.value, found.low, found.high) == pytest.approx((-0.04, -0.04 - half, -0.04 + half), abs=1e-4)
    assert not found.worse or half < 0.04


def test_too_few_parts_leave_a_hundredth():
    def of(value):
        return Scores(metrics={"val_map": value})

    assert not change(of(0.5), of(0.4951), {}).worse
    assert change(of(0.5), of(0.494), {}).worse
    assert not change(of(0.5), of(0.8), {}).worse


@pytest.mark.parametrize(
    ("name", "modes", "lower"),
    [
        ("val_loss", {}, True),
        ("valLoss", {}, True),
        ("test/mae", {}, True),
        ("val_map", {}, False),
        ("val_score", {"val_score": "min"}, True),
        ("val_mae", {"val_mae": "max"}, False),
    ],
)
def test_the_run_says_what_is_better_or_the_name_does(name, modes, lower):
    assert lower_is_better(name, modes) is lower


def test_the_monitored_metric_decides_before_the_first_that_is_no_loss():
    before = Scores(metrics={"val_loss": 1.0, "val_map": 0.5, "val_dist": 2.0})
    after = Scores(metrics={"val_loss": 1.0, "val_map": 0.5, "val_dist": 3.0})
    assert change(before, after, {}).score == "val_map"
    modes = monitored([ModelCheckpoint(monitor="val_dist", mode="min"), EarlyStopping("val_map", mode="max"), object()])
    assert modes == {"val_dist": "min", "val_map": "max"}
    found = change(before, after, modes)
    assert (found.score, found.worse) == ("val_dist", True)
    assert change(Scores(), after, {}) is None


def test_parts_hold_every_batch_once():
    parts = [_Part([1, 2, 3, 4, 5, 6, 7], place, 3) for place in range(3)]
    assert [list(part) for part in parts] == [[1, 4, 7], [2, 5], [3, 6]]
    assert [len(part) for part in parts] == [3, 2, 2]


class Regressor(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = torch.nn.Linear(8, 3)

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, index):
        return torch.nn.functional.mse_loss(self(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("val_mae", (self(batch[0]) - batch[1]).abs().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_a_run_without_labels_is_judged_by_the_users_metric(trainer, tmp_path):
    torch.manual_seed(0)
    x = torch.randn(256, 8)
    data = DataLoader(TensorDataset(x, x[:, :3] * 2), 16)
    export = la.ModelExport(tmp_path / "b", engines=["onnxruntime"], samples=32)
    trainer(la.PostTrainingQuantization("onnxruntime"), export, max_epochs=8).fit(Regressor(), data, data)
    verdict = export.report["verdict"]
    rows = {row["name"]: row["metrics"]["val_mae"] for row in export.report["rows"]}
    assert rows["network int8"] > rows["network fp32"]  # int8 of a network that is exact in float
    reason = verdict["refused"]["network int8"]
    assert reason.startswith("worse than float32 beyond its interval: `val_mae` worse by ")
    assert export.report["ships"] == "network fp32"
