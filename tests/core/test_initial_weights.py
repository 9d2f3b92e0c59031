"""A training that begins with a checkpoint's weights, and not with its run."""

import pytest
import torch

import lightning_accel as la
from lightning_accel.core import structure
from tests.support.models import Classifier, loader


def saved(trainer, tmp_path, *callbacks, **kwargs):
    module = Classifier()
    run = trainer(*callbacks, max_epochs=2, **kwargs)
    run.fit(module, loader())
    run.save_checkpoint(tmp_path / "trained.ckpt")
    return module, tmp_path / "trained.ckpt"


class Stop(la.ExactResume.__mro__[1]):
    """Keeps the weights at the first step."""

    def on_train_start(self, trainer, pl_module):
        self.step, self.weights = trainer.global_step, {n: p.detach().clone() for n, p in pl_module.named_parameters()}


def test_a_run_begins_with_the_weights_at_step_zero(trainer, tmp_path):
    before, path = saved(trainer, tmp_path)
    seen = Stop()
    trainer(la.InitialWeights(path), seen, max_epochs=1).fit(Classifier(), loader())
    assert seen.step == 0
    assert all(torch.equal(tensor, seen.weights[name]) for name, tensor in before.named_parameters())


def test_a_structure_comes_with_the_weights(trainer, tmp_path):
    before, path = saved(trainer, tmp_path, la.ChannelPruning(pruning_ratio=0.5, start=0, end=0))
    module = Classifier()
    trainer(la.InitialWeights(path), max_epochs=1).fit(module, loader())
    assert module.net.conv1.weight.shape == before.net.conv1.weight.shape != Classifier().net.conv1.weight.shape
    assert structure.record_of(module)


def test_a_resumed_run_keeps_its_own(trainer, tmp_path):
    _, path = saved(trainer, tmp_path)
    first = trainer(la.InitialWeights(path), max_epochs=1)
    module = Classifier()
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    seen = Stop()
    again = trainer(la.InitialWeights(path), seen, max_epochs=2)
    again.fit(Classifier(), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert seen.step == 8
    assert all(torch.equal(tensor, seen.weights[name]) for name, tensor in module.named_parameters())


def test_the_position_and_the_file_are_checked(trainer, tmp_path):
    _, path = saved(trainer, tmp_path)
    late = trainer(la.WeightPruning(0.5), la.InitialWeights(path), max_epochs=1)
    with pytest.raises(la.LightningAccelError, match="must hold InitialWeights before WeightPruning"):
        late.fit(Classifier(), loader())
    with pytest.raises(la.LightningAccelError, match=r"nothing\.ckpt"):
        trainer(la.InitialWeights("nothing.ckpt"), max_epochs=1).fit(Classifier(), loader())
