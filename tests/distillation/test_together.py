"""Features, a cache and a schedule beside pruning, quantization, export and exact resume, in one fit."""

import json

import lightning as L
import numpy as np
import onnx
import pytest
import torch
from lightning.pytorch.callbacks import EMAWeightAveraging

import lightning_accel as la
from tests.support.models import Classifier, Residual, loader


def module(tmp_path, seed=0):
    torch.manual_seed(0)
    teacher = Residual(12).eval()
    torch.manual_seed(seed)
    return la.DistillationModule(
        Classifier(),
        teacher,
        losses={"kd": 0.5, "hint": la.Scheduled(1.0, 0.1)},
        student_layer="net.norm1",
        teacher_layer="norm1",
        alpha=la.Scheduled(0.9, 0.3),
        cache=la.TeacherCache(tmp_path / "cache"),
    )


def callbacks(tmp_path, name):
    return [
        la.WeightPruning(0.5, end=1),
        la.QuantizationAwareTraining("portable", start=1, calibration_batches=2),
        la.ExactResume(),
        la.ModelExport(tmp_path / name, engines=["onnxruntime"]),
    ]


@pytest.mark.timeout(240)
def test_all_of_it_and_resumed(tmp_path, trainer):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 4 and trainer.current_epoch in (0, 1):
                trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    held_out = loader(64, 32, seed=3)
    whole = module(tmp_path)
    trainer(*callbacks(tmp_path, "bundle"), Save(), max_epochs=3).fit(whole, loader(shuffle=True), held_out)
    assert json.loads((tmp_path / "bundle" / "manifest.json").read_text())["complete"]
    graph = onnx.load(tmp_path / "bundle" / "model.onnx").graph
    names = {node.name for node in graph.node} | {i.name for i in graph.initializer}
    assert not [name for name in names if "adapter" in name or "tap" in name]
    sizes = [int(np.prod(i.dims)) for i in graph.initializer]
    assert 12 * 8 not in sizes  # the adapter's weight
    (adapter,) = whole.adapters.values()
    for epoch in (0, 1):  # before and under quantization
        resumed = module(tmp_path, seed=1)
        runner = trainer(*callbacks(tmp_path, f"bundle{epoch}"), max_epochs=3)
        runner.fit(resumed, loader(shuffle=True), held_out, ckpt_path=tmp_path / f"{epoch}.ckpt")
        for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
            assert torch.equal(ours, theirs)
        (own,) = resumed.adapters.values()
        assert torch.equal(own.weight, adapter.weight)
    tested = trainer().test(whole, held_out, verbose=False)[0]
    assert tested.keys() == {"test_accuracy"}


def test_an_average_of_the_student_shares_the_adapter(tmp_path, trainer):
    distilled = module(tmp_path)
    averaging = EMAWeightAveraging(decay=0.5)
    trainer(averaging, max_epochs=1).fit(distilled, loader(), loader(seed=1))
    (adapter,) = distilled.adapters.values()
    assert set(distilled.state_dict()) == set(Classifier().state_dict())
    assert adapter.weight.requires_grad


def test_accumulated_and_mixed_precision_steps(tmp_path, trainer):
    distilled = module(tmp_path)
    trainer(max_epochs=1, accumulate_grad_batches=2, precision="bf16-mixed").fit(distilled, loader())
    (adapter,) = distilled.adapters.values()
    assert adapter.weight.dtype == torch.float32
    assert adapter.weight.isfinite().all()
    other = module(tmp_path / "double")
    trainer(max_epochs=1, precision="64-true").fit(other, loader())
    (adapter,) = other.adapters.values()
    assert adapter.weight.dtype == torch.float64
