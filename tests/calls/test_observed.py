"""A step is observed on a copy: nothing of the user's changes."""

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchmetrics import MeanMetric

import lightning_accel as la
from lightning_accel.calls.observed import TRAINING, VALIDATION, observe, shipped_call
from lightning_accel.errors import InvalidArgumentError


class Busy(L.LightningModule):
    """Its step changes everything that a step can change."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5))
        self.average = nn.Linear(4, 4)
        self.metric, self.outputs, self.steps = MeanMetric(), [], 0

    def training_step(self, batch, batch_idx):
        with torch.no_grad():
            self.average.weight.lerp_(self.net[0].weight, 0.5)
        loss = self.net.forward(batch[0]).square().mean()
        self.metric(loss)
        self.outputs.append(loss)
        self.steps += 1
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.net(batch[0])
        raise RuntimeError("not yet")

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.parameters(), 0.1)


def test_nothing_of_the_module_changes():
    module, batch = Busy(), [torch.randn(8, 4)]
    before, random = {k: v.clone() for k, v in module.state_dict().items()}, torch.get_rng_state()
    seen = observe(module, None, TRAINING, batch)
    assert [(call.path, call.outermost) for call in seen.calls] == [
        ("net", True),
        ("net.0", False),
        ("net.1", False),
        ("net.2", False),
        ("metric", True),
    ]
    assert not seen.error
    assert seen.first("net")[0][0] is batch[0]
    assert seen.first("net.0") is None  # of inner calls only what was asked for is kept
    assert all(torch.equal(before[k], v) for k, v in module.state_dict().items())
    assert torch.equal(torch.get_rng_state(), random)
    assert (module.outputs, module.steps, module.metric.update_count) == ([], 0, 0)
    assert "forward" not in vars(module.net)


def test_a_step_that_raises_has_called_what_it_called():
    seen = observe(Busy(), None, VALIDATION, [torch.randn(8, 4)], frozenset({"net.1"}))
    assert seen.outermost == ["net"]
    assert seen.first("net.1")[0][0].shape == (8, 4)
    assert seen.error.startswith("RuntimeError: not yet (at ")


def test_a_run_with_an_observed_step_is_bit_for_bit_the_plain_run(trainer, tmp_path):
    def run(*callbacks):
        torch.manual_seed(0)
        module = Busy()
        module.validation_step = None
        type(module).validation_step = L.LightningModule.validation_step
        x = torch.randn(32, 4, generator=torch.Generator().manual_seed(1))
        logger = CSVLogger(tmp_path, name=str(len(callbacks)))
        trainer(*callbacks, logger=logger).fit(module, DataLoader(TensorDataset(x), 8, shuffle=True))
        return module

    own = Busy.validation_step
    try:
        plain, watched = run(), run(la.PostTrainingQuantization("portable", calibration_batches=1))
    finally:
        Busy.validation_step = own
    assert all(torch.equal(watched.state_dict()[k], v) for k, v in plain.state_dict().items())
    assert (watched.steps, len(watched.outputs)) == (plain.steps, len(plain.outputs)) == (8, 8)


def test_the_error_of_the_trial_run_is_told(trainer):
    class Early(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return self.net(self.made_in_on_train_start(batch)).mean()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    data = DataLoader(TensorDataset(torch.randn(8, 4)), 4)
    with pytest.raises(
        InvalidArgumentError,
        match=r"trial run of `training_step` .* ended with AttributeError.*test_observed",
    ):
        trainer(la.QuantizationAwareTraining("portable")).fit(Early(), data)


class Reads(nn.Module):
    def forward(self, batch, scale=None, labels=None):
        x = batch["x"] * (1 if scale is None else scale)
        return x if labels is None else (x, labels)


def test_targets_and_unread_keys_are_left_out():
    x, scale = torch.ones(2), torch.ones(2)
    call = ({"x": x, "name": ["a", "b"], "y": x}, scale, x), {}
    assert shipped_call(Reads(), call) == (({"x": x}, scale, None), {})


def test_a_target_that_forward_needs_stays():
    class Needs(nn.Module):
        def forward(self, x, labels=None):
            return x + labels

    x = torch.ones(2)
    (args, kwargs) = shipped_call(Needs(), ((x,), {"labels": x}))
    assert args == (x, x)
    assert not kwargs
