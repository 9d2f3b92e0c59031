"""Every checkpoint of a run holds what its network is made of, also one of weights alone."""

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_accel as la
from tests.support.models import Classifier, images, loader

CALLBACKS = {
    "channels": lambda: [la.ChannelPruning(0.5, end=1)],
    "quantized": lambda: [la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)],
    "both": lambda: [
        la.ChannelPruning(0.5, end=1),
        la.QuantizationAwareTraining("portable", start=1, calibration_batches=2),
    ],
    "after training": lambda: [la.PostTrainingQuantization("portable", calibration_batches=2)],
}


@pytest.mark.parametrize(
    ("kind", "later"),
    [*((kind, True) for kind in CALLBACKS), ("channels", False), ("quantized", False), ("both", False)],
)
def test_a_checkpoint_of_weights_alone_is_the_network_that_was_trained(kind, later, trainer, tmp_path):
    torch.manual_seed(0)
    module, x = Classifier(), images(8).tensors[0]
    kept = ModelCheckpoint(tmp_path, save_weights_only=True, save_last=True)
    fit = trainer(*CALLBACKS[kind](), *([] if later else [kept]), max_epochs=2, enable_checkpointing=not later)
    fit.fit(module, loader())
    path = tmp_path / "last.ckpt"
    if later:
        fit.save_checkpoint(path, weights_only=True)
    assert "callbacks" not in torch.load(path, weights_only=True)
    with torch.no_grad():
        want = module.eval()(x)
        assert torch.equal(la.load_from_checkpoint(Classifier, path)(x), want)
        fresh = Classifier()
        trainer(*CALLBACKS[kind]()).test(fresh, loader(), ckpt_path=path)
        assert torch.equal(fresh.eval()(x), want)


def test_the_users_own_hook_still_writes(trainer, tmp_path):
    class Writes(Classifier):
        def on_save_checkpoint(self, checkpoint):
            checkpoint["mine"] = 7

    module = Writes()
    fit = trainer(la.QuantizationAwareTraining("portable", start=0, calibration_batches=2), max_epochs=1)
    fit.fit(module, loader())
    for weights_only in (False, True):
        fit.save_checkpoint(tmp_path / "x.ckpt", weights_only=weights_only)
        written = torch.load(tmp_path / "x.ckpt", weights_only=True)
        assert written["mine"] == 7
        assert [change["kind"] for change in written["lightning_accel"]["structure"]] == ["quantize"]
