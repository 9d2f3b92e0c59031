"""Channels that only a step needs stay: a trial run of the user's steps tells before training."""

import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from tests.support.models import Classifier, loader


class Projected(Classifier):
    """`forward` gives logits; `training_step` runs a second head on the features, as supervised contrastive training does."""

    def __init__(self, width=8):
        super().__init__()
        del self.net
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.ReLU())
        self.head, self.projection = nn.Linear(12, 4), nn.Linear(12, width)
        self.steps = 0

    def features(self, x):
        return self.body(x).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))

    def training_step(self, batch, batch_idx):
        self.steps += 1
        contrast = self.projection(self.features(batch[0])).square().mean()
        return nn.functional.cross_entropy(self(batch[0]), batch[1]) + contrast


def test_channels_that_training_step_needs_stay(trainer):
    module = Projected()
    callback = la.ChannelPruning(0.3, end=1)
    trainer(callback).fit(module, loader())
    assert module.body[2].out_channels == 12
    assert module.body[0].out_channels < 8
    kept = {group.name: group.kept for group in callback._plan.groups if group.kept}
    assert "`training_step` needs all of its channels: RuntimeError: mat1 and mat2" in kept["body.2"]
    assert f"(at {__file__}:" in kept["body.2"]


def test_the_trial_leaves_the_module_as_it_was(trainer):
    module = Projected()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    la.plan(trainer(la.ChannelPruning(0.3, end=1)), module, loader())
    assert module.steps == 0
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_channels_that_validation_step_needs_stay(trainer):
    class Validated(Projected):
        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, batch_idx):
            self.log("spread", self.projection(self.features(batch[0])).std())

    module = Validated()
    trainer(la.ChannelPruning(0.3, end=1)).fit(module, loader(), loader(seed=1))
    assert module.body[2].out_channels == 12
    assert module.body[0].out_channels < 8


def test_a_target_out_of_reach_without_them_is_refused_before_training(trainer):
    module = Projected()
    with pytest.raises(InvalidArgumentError, match=r"`pruning_ratio` must be reachable .* at most 0.375"):
        trainer(la.ChannelPruning(0.6, limits={"body.0": 0.375}, end=1)).fit(module, loader())
    assert module.steps == 0


def test_a_step_that_fails_anyway_says_nothing(trainer):
    class Broken(Projected):
        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            raise KeyError("unrelated") if loss > 0 else loss

    callback = la.ChannelPruning(0.5, end=1)
    la.plan(trainer(callback), Broken(), loader())
    assert {group.name for group in callback._plan.groups if not group.kept} == {"body.0", "body.2"}


def test_the_student_of_a_distillation_is_tried(trainer):
    module = la.DistillationModule(student=Projected(), teacher=Classifier(), losses="kd")
    trainer(la.ChannelPruning(0.3, end=1)).fit(module, loader())
    assert module.student.body[2].out_channels == 12
