"""Attributes on other objects come off again: after the block, at the run's end, and after any exception."""

import copy
from functools import partial
from types import FunctionType, MethodType

import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.core.patching import Patches, patches_of_run, removed, swapped, swapped_child


def test_a_swapped_attribute_hides_the_class_and_comes_off():
    module = nn.Linear(2, 2)
    with swapped(module, "forward", lambda x: x + 1):
        assert module(torch.zeros(1)).item() == 1
        with swapped(module, "forward", lambda x: x + 2):
            assert module(torch.zeros(1)).item() == 2
        assert module(torch.zeros(1)).item() == 1
    assert "forward" not in vars(module)


def test_what_lay_there_comes_back_after_an_exception():
    module = nn.Linear(2, 2)
    vars(module)["forward"] = mine = lambda x: x
    with pytest.raises(ZeroDivisionError), swapped(module, "forward", None):
        raise ZeroDivisionError
    assert vars(module)["forward"] is mine
    with removed(module, "forward") as taken:
        assert taken is mine
        assert "forward" not in vars(module)
    assert vars(module)["forward"] is mine


def test_a_child_keeps_its_place():
    network = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    names = list(network._modules)
    with swapped_child(network, "1", nn.Tanh()):
        assert isinstance(network[1], nn.Tanh)
        assert list(network._modules) == names
    assert isinstance(network[1], nn.ReLU)


def test_patches_come_off_last_first_and_each_once():
    module, patches, calls = nn.Linear(2, 2), Patches(), []
    patches.swap(module, "forward", 1)
    early = patches.swap(module, "forward", 2)
    patches.on_undo(lambda: calls.append("undone"))
    early()
    assert vars(module)["forward"] == 1
    patches.undo()
    patches.undo()
    assert "forward" not in vars(module)
    assert calls == ["undone"]


class Net(L.LightningModule):
    def __init__(self, fails=""):
        super().__init__()
        self.net, self.fails, self.saw = nn.Linear(4, 3), fails, ()

    def forward(self, x):
        return self.net(x)

    def setup(self, stage):
        self._fail("setup")

    def on_fit_start(self):
        self._fail("on_fit_start")

    def training_step(self, batch, batch_idx):
        self.saw = type(batch).__name__, len(batch)
        self._fail("training_step")
        return cross_entropy(self(batch[0]), batch[1])

    def on_train_end(self):
        self._fail("on_train_end")

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)

    def _fail(self, where):
        if self.fails == where:
            raise RuntimeError("the user's own bug")


def instance_attributes(trainer, *modules):
    owners = [
        trainer.fit_loop,
        trainer.fit_loop.epoch_loop,
        trainer.strategy,
        *(m for net in modules for m in net.modules()),
    ]
    return [
        {name for name, value in vars(owner).items() if isinstance(value, FunctionType | MethodType | partial)}
        for owner in owners
    ]


@pytest.fixture
def loader():
    return DataLoader(TensorDataset(torch.randn(16, 4), torch.randint(0, 3, (16,))), 8)


@pytest.mark.parametrize("fails", ["", "setup", "on_fit_start", "training_step", "on_train_end"])
def test_nothing_stays_on_the_trainer_or_the_modules_however_fit_ends(fails, loader, tmp_path):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    teacher, net = nn.Linear(4, 3), Net(fails)
    callbacks = [la.ExactResume(), la.QuantizationAwareTraining("portable", start=0, calibration_batches=1)]
    module = la.DistillationModule(net, teacher, cache=la.TeacherCache(tmp_path / "cache"))
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    before = instance_attributes(trainer, teacher)
    if fails:
        with pytest.raises(RuntimeError, match="the user's own bug"):
            trainer.fit(module, loader)
        assert "forward" not in vars(net) or fails in (
            "training_step",
            "on_train_end",
        )  # quantized by then, which is recorded
    else:
        trainer.fit(module, loader)
    assert instance_attributes(trainer, teacher) == before
    assert "on_load_checkpoint" not in vars(module)
    # The same Trainer's next run sees the user's own batches.
    trainer.callbacks[:] = []
    plain = Net()
    trainer.fit_loop.epoch_progress.reset()
    trainer.fit(plain, loader)
    assert plain.saw in ((), ("list", 2)) if not fails else plain.saw == ("list", 2)


def test_patches_of_a_run_are_gone_when_it_has_ended(loader, tmp_path):
    class Patching(L.Callback):
        def on_train_start(self, trainer, pl_module):
            patches_of_run(trainer).swap(pl_module.net, "forward", pl_module.net.forward)
            self.seen = "forward" in vars(pl_module.net)

    module, callback = Net(), Patching()
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    trainer = L.Trainer(max_epochs=1, accelerator="cpu", callbacks=[callback], **quiet)
    trainer.fit(module, loader)
    assert callback.seen
    assert "forward" not in vars(module.net)
    assert "teardown" not in vars(trainer.strategy)
    assert "forward" not in vars(copy.deepcopy(module.net))
