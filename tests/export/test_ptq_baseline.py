"""What quantization-aware training is worth, beside quantizing without it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.export.held_out import HeldOut
from lightning_accel.export.ptq_baseline import Predictions, paired_difference, predictions_of, verdict
from tests.support.models import Classifier, images, loader


@pytest.mark.parametrize("n", [5, 40, 1000])
def test_the_interval_is_that_of_the_score_with_half_a_sample_in_each_cell(n):
    """Independently: the variance of a difference of indicators over a table with 0.5 added to each of its four cells."""
    rng = np.random.default_rng(n)
    before, after = rng.random(n) < 0.7, rng.random(n) < 0.8
    difference, low, high = paired_difference(before, after)
    assert difference == pytest.approx(after.mean() - before.mean())
    cells = np.array([[(before == b) & (after == a) for a in (0, 1)] for b in (0, 1)]).sum(-1) + 0.5
    share = cells / cells.sum()
    gap = np.array([[0, 1], [-1, 0]])
    mean = (share * gap).sum()
    deviation = np.sqrt(((share * gap**2).sum() - mean**2) / cells.sum())
    assert (low, high) == pytest.approx((mean - 1.959964 * deviation, mean + 1.959964 * deviation), abs=1e-6)


def test_two_networks_that_agree_everywhere_leave_a_doubt():
    right = np.ones(50, bool)
    difference, low, high = paired_difference(right, right)
    assert difference == 0
    assert -0.05 < low < 0 < high < 0.05


@pytest.mark.parametrize(
    ("difference", "says"),
    [
        ((0.02, 0.01, 0.03), "Quantization-aware training earned its cost: +2.00 points [+1.00, +3.00]"),
        ((0.0, -0.01, 0.01), "Whether quantization-aware training earned its cost can't be told: +0.00 points"),
        ((-0.02, -0.03, -0.01), "Quantization-aware training cost accuracy: -2.00 points [-3.00, -1.00]"),
    ],
)
def test_the_verdict_follows_the_interval(difference, says):
    text = verdict(difference, 120, 2000)
    assert text.startswith(says)
    assert "at step 120, where fake-quant began, on the same 2,000 samples" in text
    assert ("PTQ) may do" in text) is (difference[1] <= 0)


def test_predictions_are_those_of_the_network_and_survive_a_checkpoint():
    module = Classifier(dropout=0.5).train()
    x, y = images(50).tensors
    found = predictions_of(module, HeldOut(loader(50, 16), "test"))
    assert module.training
    assert found is not None
    module.eval()
    np.testing.assert_array_equal(found.right, (module(x).argmax(1) == y).numpy())
    again = Predictions.from_dict(found.to_dict())
    np.testing.assert_array_equal(again.right, found.right)
    assert again.labels == found.labels
    other = predictions_of(module, HeldOut(DataLoader(TensorDataset(x, 3 - y), 16), "test"))
    assert other is not None
    assert other.labels != found.labels


def test_neither_the_loader_nor_the_random_state_moves():
    generator = torch.Generator().manual_seed(3)
    shuffled = DataLoader(images(32), 8, shuffle=True, generator=generator)
    network = Classifier()
    before, state = generator.get_state(), torch.get_rng_state()
    predictions_of(network, HeldOut(shuffled, "test"))
    assert torch.equal(generator.get_state(), before)
    assert torch.equal(torch.get_rng_state(), state)


def test_what_has_no_classes_has_no_predictions():
    class Regression(nn.Module):
        def forward(self, x):
            return x.mean((1, 2, 3))

    assert predictions_of(Regression(), HeldOut(loader(16), "test")) is None
    assert predictions_of(Classifier(), HeldOut(DataLoader(images(8).tensors[0], 4), "test")) is None


def test_a_run_is_the_same_with_and_without_the_comparison(trainer, tmp_path):
    """The look at the held-out data in the middle of the run changes nothing; a resume keeps what was found."""
    weights = []
    for extra in ([], [la.ModelExport(tmp_path / "b", engines="onnxruntime")]):
        torch.manual_seed(0)
        module = Classifier(dropout=0.2)
        qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)
        trainer(qat, *extra, max_epochs=2).fit(module, loader(64, shuffle=True), loader(32, 16))
        weights.append({name: tensor.clone() for name, tensor in module.state_dict().items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    checkpoint = torch.load(tmp_path / "b.ckpt", weights_only=True)
    state = checkpoint["callbacks"]["lightning_accel.ModelExport.export"]
    assert state["untrained"]["step"] == 10  # an epoch of 8 steps, then 2 calibration batches
    assert [point["epoch"] for point in state["curves"]] == [0, 1]
    assert state["run"]["settings"]["Classifier"]["dropout"] == 0.2
    export = la.ModelExport(tmp_path / "again", engines="onnxruntime")
    resumed = trainer(la.QuantizationAwareTraining("portable", start=1, calibration_batches=2), export, max_epochs=3)
    resumed.fit(Classifier(dropout=0.2), loader(64, shuffle=True), loader(32, 16), ckpt_path=tmp_path / "b.ckpt")
    assert export.report is not None
    assert [point["step"] for point in export.report["curves"]] == [8, 16, 24]
    assert "student" not in export.report["ships"]
    assert [row["name"] for row in export.report["rows"]][1] == "network int8, not trained (PTQ)"
