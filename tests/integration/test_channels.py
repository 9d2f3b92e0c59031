"""Channels, weights, quantization and distillation in one fit: exported, resumed bit for bit, and under DDP."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint

import lightning_accel as la
from lightning_accel.core import structure
from tests.integration.ending import assert_same, everything
from tests.support.models import Classifier, Residual, loader

ROOT = Path(__file__).parents[2]
EPOCHS, STEPS = 5, 4  # of 8 images


def callbacks(criterion="group_norm", start=0):
    return [
        la.ExactResume(),
        la.QuantizationAwareTraining("portable", start=3, calibration_batches=2),
        la.WeightPruning(0.5, start=0, end=4, every=1),
        la.ChannelPruning(0.5, criterion=criterion, start=start, end=3),
    ]


def module():
    torch.manual_seed(4)
    return la.DistillationModule(Classifier(dropout=0.2), Residual(12), alpha=0.5)


def data():
    return loader(8 * STEPS, 8, shuffle=True), loader(16, 8, seed=3)


@pytest.fixture(params=[("group_norm", 0), ("taylor", 1)], ids=["group_norm", "taylor"])
def full(request, trainer, tmp_path):
    """A run that isn't interrupted, and a checkpoint after every step and every epoch of it."""
    calls, net = callbacks(*request.param), module()
    steps = ModelCheckpoint(tmp_path / "steps", "{step}", every_n_train_steps=1, save_top_k=-1)
    epochs = ModelCheckpoint(tmp_path / "epochs", "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
    t = trainer(*calls, steps, epochs, max_epochs=EPOCHS, enable_checkpointing=True)
    torch.manual_seed(11)
    t.fit(net, *data())
    assert net.net.conv1.out_channels == 4
    assert len([c for c in structure.record_of(net) if c.kind == "remove_channels"]) == 4 - request.param[1]
    return everything(t, net, calls), tmp_path, request.param


# before and between removals, at the ends of epochs (a removal comes next), with fake-quant
def test_resumed_is_bit_identical(full, trainer):
    want, folder, settings = full
    early = ("step=1", "step=4", "step=6", "step=11", "step=14", "epoch=0", "epoch=2")
    for where in early if settings[1] == 0 else ("step=2", "step=8", "epoch=1"):
        calls, net = callbacks(*settings), module()
        t = trainer(*calls, max_epochs=EPOCHS)
        torch.manual_seed(99)  # another process has another random state
        t.fit(net, *data(), ckpt_path=folder / ("steps" if where.startswith("step") else "epochs") / f"{where}.ckpt")
        assert_same(everything(t, net, calls), want)


def test_the_small_structure_is_rebuilt_everywhere(full, trainer):
    """``Trainer.test`` on an untrained module, ``load_from_checkpoint``, and a fresh process that resumes."""
    want, folder, settings = full
    held_out = data()[1]
    x = held_out.dataset.tensors[0]
    for epoch, width in ((1, 6), (3, 4)):
        path = folder / "epochs" / f"epoch={epoch}.ckpt"
        net = module()
        trainer(*callbacks(*settings)).test(net, held_out, ckpt_path=path, verbose=False)
        loaded = la.load_from_checkpoint(Classifier, path)
        assert loaded.net.conv1.weight.shape[0] == net.net.conv1.weight.shape[0] <= width
        with torch.no_grad():
            assert torch.equal(loaded(x), net.eval()(x))
    with pytest.raises(
        ValueError, match="must be freshly built to get the structure of a checkpoint with other channels"
    ):
        trainer(*callbacks(*settings)).test(net, held_out, ckpt_path=folder / "epochs" / "epoch=1.ckpt", verbose=False)
    script = f"""
import sys; sys.path.insert(0, {str(ROOT)!r})
import torch, lightning as L
from tests.integration.ending import everything
from tests.integration.test_channels import callbacks, module, data, EPOCHS
calls, net = callbacks{settings!r}, module()
t = L.Trainer(max_epochs=EPOCHS, accelerator="cpu", logger=False, enable_progress_bar=False, enable_checkpointing=False, callbacks=calls)
t.fit(net, *data(), ckpt_path={str(folder / "steps" / "step=9.ckpt")!r})
assert "torch_pruning" in sys.modules
torch.save(everything(t, net, calls), {str(folder / "end.pt")!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert_same(torch.load(folder / "end.pt", weights_only=True), want)


def test_a_loaded_module_goes_on_where_it_was(full, trainer):
    """``load_from_checkpoint`` and then ``fit`` with the same checkpoint: what left already is not removed again."""
    want, folder, settings = full
    path = folder / "epochs" / "epoch=1.ckpt"
    calls, net = callbacks(*settings), la.load_from_checkpoint(Classifier, path, dropout=0.2).train()
    torch.manual_seed(4)
    whole = la.DistillationModule(net, module().teacher, alpha=0.5)
    t = trainer(*calls, max_epochs=EPOCHS)
    t.fit(whole, *data(), ckpt_path=path)
    assert_same(everything(t, whole, calls), want)


def test_the_average_resumes_too(trainer, tmp_path):
    def run(ckpt_path=None):
        calls, net, ema = callbacks(), module(), EMAWeightAveraging(decay=0.9)
        steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        t = trainer(*calls, ema, *([] if ckpt_path else [steps]), max_epochs=EPOCHS, enable_checkpointing=not ckpt_path)
        torch.manual_seed(11 if ckpt_path is None else 12)
        t.fit(net, *data(), ckpt_path=ckpt_path)
        return everything(t, net, calls)

    want = run()
    assert_same(run(tmp_path / "step=2.ckpt"), want)
    assert_same(run(tmp_path / "step=10.ckpt"), want)


def test_pruned_quantized_distilled_and_exported(trainer, tmp_path):
    export = la.ModelExport(tmp_path / "bundle")
    net = module()
    trainer(export, *callbacks()[1:], max_epochs=EPOCHS).fit(net, loader(64), loader(32, 32, seed=3))
    assert net.net.conv1.out_channels == 4
    assert all(check["passed"] for check in export.report["verification"])
    for file in (tmp_path / "bundle").glob("*.onnx"):  # the student is 4 wide, its teacher 12
        assert all(12 not in tensor.dims for tensor in onnx.load(file).graph.initializer)
    x = loader(32, 32, seed=3).dataset.tensors[0]
    with la.load_runner(tmp_path / "bundle" / "model.onnx", emulate=True) as runner, torch.no_grad():
        logits, wanted = torch.from_numpy(runner(x.numpy())), net.eval()(x)
    assert (logits - wanted).abs().median() <= 1e-6 * (wanted.max() - wanted.min())


def test_best_from_before_the_removal_is_refused(trainer, tmp_path):
    class First(Classifier):
        def validation_step(self, batch, batch_idx):
            super().validation_step(batch, batch_idx)
            self.log("score", float(self.current_epoch == 0))

    class Stop(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.should_stop = trainer.current_epoch == 1

    def fit(*more):
        best = ModelCheckpoint(tmp_path / "best", monitor="score", mode="max")
        calls = [la.ChannelPruning(0.5, start=2, end=2), la.ModelExport(tmp_path / "b", ckpt_path="best"), best, *more]
        # Every other epoch is validated: the only time comes before the removal.
        trainer(*calls, max_epochs=3, enable_checkpointing=True, check_val_every_n_epoch=2).fit(First(), *data())

    with pytest.raises(
        RuntimeError, match=r"must have reached its targets .*has gone 0% of the way to pruning ratio 0.5"
    ):
        fit(Stop())
    with pytest.raises(ValueError, match="no ModelCheckpoint kept a best one"):
        fit()


DDP = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, lightning as L, lightning_accel as la
from lightning.pytorch.callbacks import EMAWeightAveraging
from lightning_accel.core import structure
from tests.support.models import Classifier, Residual, loader

folder = Path(sys.argv[2])
torch.set_num_threads(1)
torch.manual_seed(0)
gradients = []


class Gradients(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients.append([p.grad.clone() for p in pl_module.parameters()])


trainer = L.Trainer(
    max_epochs=4, accelerator="cpu", devices=2, strategy="ddp", logger=False, enable_progress_bar=False,
    enable_model_summary=False, enable_checkpointing=False, default_root_dir=folder, accumulate_grad_batches=2,
    callbacks=[
        la.ExactResume(), la.ChannelPruning(0.5, criterion="taylor", start=1, end=2),
        la.QuantizationAwareTraining("portable", start=3, calibration_batches=2), EMAWeightAveraging(decay=0.9), Gradients(),
    ],
)
module = la.DistillationModule(Classifier(), Residual(12))
trainer.fit(module, loader(64, 8, shuffle=True))
torch.save(
    {
        "weights": dict(module.named_parameters()), "gradients": gradients,
        "kept": [c.args["parameters"] for c in structure.record_of(module) if c.kind == "remove_channels"],
    },
    folder / f"rank{trainer.global_rank}.pt",
)
"""


@pytest.mark.timeout(240)
def test_two_processes_remove_the_same_and_go_on_together(tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DDP)
    done = subprocess.run(
        [sys.executable, str(script), str(ROOT), str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "self.log('macs" not in done.stderr  # Lightning's advice on values that each rank has its own of
    assert "self.log('parameters" not in done.stderr
    first, second = (torch.load(tmp_path / f"rank{r}.pt", weights_only=False) for r in (0, 1))
    assert len(first["kept"]) == 2
    assert first["kept"] == second["kept"]
    assert first["weights"]["net.conv1.weight"].shape[0] == 4
    assert all(torch.equal(p, second["weights"][name]) for name, p in first["weights"].items())
    assert len(first["gradients"]) == 8
    for a, b in zip(first["gradients"], second["gradients"], strict=True):  # reduced over both, before and after
        assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
        assert any(p.abs().max() > 0 for p in a)
