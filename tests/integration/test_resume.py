"""Whole fits, interrupted and resumed: bit for bit the run that was not interrupted."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import lightning_accel as la
from lightning_accel.core import structure
from lightning_accel.pruning.weights.masks import measured_sparsity
from lightning_accel.pruning.weights.targets import prunable_parameters
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.integration.ending import assert_same, everything
from tests.support.models import Classifier, Residual, loader

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS = 4, 6  # of 8 images


def callbacks():
    return [
        la.ExactResume(),
        la.WeightPruning(0.6, start=0, end=2, every=1),
        la.QuantizationAwareTraining("portable", start=2, calibration_batches=2),
    ]


def module():
    torch.manual_seed(4)
    return la.DistillationModule(Classifier(dropout=0.2), Residual(12))


def data():
    return loader(8 * STEPS, 8, shuffle=True), loader(16, 8, seed=3)


@pytest.fixture
def full(trainer, tmp_path):
    """A run that isn't interrupted, and a checkpoint after every step and every epoch of it."""
    calls, net = callbacks(), module()
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    t = trainer(*calls, steps, epochs, max_epochs=EPOCHS, enable_checkpointing=True)
    torch.manual_seed(11)
    t.fit(net, *data())
    return everything(t, net, calls), tmp_path


# before anything, mid-pruning, at an epoch's last step, mid-calibration, first fake-quant step, mid-QAT, last but one
@pytest.mark.parametrize(
    "where",
    ["step=1", "step=8", "step=12", "step=13", "step=14", "step=17", "step=23", "epoch=0", "epoch=1", "epoch=2"],
)
def test_resumed_is_bit_identical(full, trainer, where):
    want, folder = full
    path = folder / ("steps" if where.startswith("step") else "epochs") / f"{where}.ckpt"
    calls, net = callbacks(), module()
    t = trainer(*calls, max_epochs=EPOCHS)
    torch.manual_seed(99)  # another process has another random state
    t.fit(net, *data(), ckpt_path=path)
    assert_same(everything(t, net, calls), want)


def test_in_a_fresh_process(full):
    want, folder = full
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, lightning as L
from tests.integration.ending import everything
from tests.integration.test_resume import callbacks, module, data, EPOCHS
calls, net = callbacks(), module()
t = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=calls)
t.fit(net, *data(), ckpt_path={str(folder / "steps" / "step=15.ckpt")!r})
torch.save(everything(t, net, calls), {str(folder / "end.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(torch.load(folder / "end.pt", weights_only=True), want)


def test_the_average_resumes_too(trainer, tmp_path):
    def run(ckpt_path=None):
        calls, net, ema = callbacks(), module(), EMAWeightAveraging(decay=0.9)
        steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        t = trainer(*calls, ema, *([] if ckpt_path else [steps]), max_epochs=EPOCHS, enable_checkpointing=not ckpt_path)
        torch.manual_seed(11 if ckpt_path is None else 12)
        t.fit(net, *data(), ckpt_path=ckpt_path)
        assert measured_sparsity(prunable_parameters(net).values()) == pytest.approx(0.6, abs=0.003)
        return everything(t, net, calls)

    want = run()
    assert_same(run(tmp_path / "step=7.ckpt"), want)
    assert_same(run(tmp_path / "step=20.ckpt"), want)


def test_test_measures_the_structure_of_the_checkpoint(full, trainer):
    """During, after and in a fresh process: a checkpoint from before QAT is float, one from after it is quantized."""
    _, folder = full
    net, calls = module(), callbacks()
    t = trainer(*calls)
    _, held_out = data()
    x = held_out.dataset.tensors[0]
    outputs = {}
    for epoch, placed in ((2, True), (0, False), (3, True), (2, True)):
        t.test(net, held_out, ckpt_path=folder / "epochs" / f"epoch={epoch}.ckpt", verbose=False)
        assert bool(quantized_forwards(net)) is placed
        with torch.no_grad():
            out = net.eval()(x)
        assert torch.equal(outputs.setdefault(epoch, out), out)
    net.load_state_dict(torch.load(folder / "epochs" / "epoch=2.ckpt", weights_only=True)["state_dict"])
    structure.replay(net, [])
    assert not torch.equal(net(x), outputs[2])  # fake-quant was at work


def test_the_users_class_loads_where_this_library_is_not_installed(full):
    want, folder = full
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
class Block:
    def find_spec(self, name, *args):
        if name.split(".")[0] == "lightning_accel": raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Block())
import torch
from tests.support.models import Classifier
net = Classifier.load_from_checkpoint({str(folder / "epochs" / "epoch=3.ckpt")!r}, map_location="cpu", weights_only=True)
assert net.hparams.dropout == 0.2 and type(net) is Classifier
torch.save(net.state_dict(), {str(folder / "loaded.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = torch.load(folder / "loaded.pt", weights_only=True)
    assert_same(
        {f"weight {k}": v for k, v in loaded.items()}, {k: v for k, v in want.items() if k.startswith("weight")}
    )


def test_load_from_checkpoint_rebuilds_what_computes_as_it_ships(full, trainer):
    _, folder = full
    x = data()[1].dataset.tensors[0]
    net = la.load_from_checkpoint(Classifier, folder / "epochs" / "epoch=3.ckpt")
    tested = module()
    trainer(*callbacks()).test(tested, data()[1], ckpt_path=folder / "epochs" / "epoch=3.ckpt", verbose=False)
    with torch.no_grad():
        assert torch.equal(net(x), tested.eval()(x))
        floating = Classifier.load_from_checkpoint(folder / "epochs" / "epoch=3.ckpt").eval()
        assert not torch.equal(net(x), floating(x))
    assert torch.equal(
        la.load_from_checkpoint(Classifier, folder / "epochs" / "epoch=0.ckpt", dropout=0.5)(x), net_at(folder, 0)(x)
    )


def net_at(folder, epoch):
    return Classifier.load_from_checkpoint(folder / "epochs" / f"epoch={epoch}.ckpt").eval()


def test_state_without_its_callback_is_an_error(full, trainer):
    _, folder = full
    keep = callbacks()
    with pytest.raises(ValueError, match=r"with state of WeightPruning.weights, for which the Trainer has no callback"):
        trainer(keep[0], keep[2], max_epochs=EPOCHS).fit(module(), *data(), ckpt_path=folder / "steps" / "step=8.ckpt")
    renamed = [la.ExactResume(), la.WeightPruning(0.6, end=2, name="other"), keep[2]]
    with pytest.raises(ValueError, match=r"state of WeightPruning.weights.*Add it back, with the same `name`"):
        trainer(*renamed, max_epochs=EPOCHS).fit(module(), *data(), ckpt_path=folder / "steps" / "step=8.ckpt")


@pytest.mark.parametrize("damage", ["truncate", "garbage", "missing", "no weights"])
def test_a_damaged_checkpoint_is_told_in_one_line(tmp_path, trainer, damage):
    path = tmp_path / "x.ckpt"
    t = trainer(la.WeightPruning(0.5, end=1), max_epochs=1)
    t.fit(Classifier(), data()[0])
    t.save_checkpoint(path)
    content = path.read_bytes()
    if damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        path.write_bytes(b"not a checkpoint")
    elif damage == "missing":
        path.unlink()
    else:
        torch.save({"epoch": 1}, path)
    with pytest.raises((ValueError, FileNotFoundError), match=r"Argument `ckpt_path` must be a .*x.ckpt") as error:
        la.load_from_checkpoint(Classifier, path)
    assert "\n" not in str(error.value)
