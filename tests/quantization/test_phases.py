"""Calibrate, fake-quant, frozen batch norm, frozen ranges: each at its time; and what else goes on beside it."""

import itertools

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from torch import nn

import lightning_accel as la
from lightning_accel import QuantizationAwareTraining
from lightning_accel.engines.onnxruntime import OnnxRuntimeRunner
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.models import Classifier, images, loader


class Watch(Callback):
    """State after each training step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        forwards = quantized_forwards(pl_module)
        bank = forwards[""].bank if forwards else None
        self.steps.append(
            {
                "active": bool(bank and bank.active),
                "high": bank.high.clone() if bank else None,
                "mean": pl_module.net.norm1.running_mean.clone(),
                "count": pl_module.net.norm1.num_batches_tracked.item(),
                "weight": pl_module.net.conv1.weight.detach().clone(),
                "rate": trainer.optimizers[0].param_groups[0]["lr"],
            }
        )


def fit(folder, module, *callbacks, epochs=4, ckpt_path=None, **options):
    trainer = L.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        callbacks=list(callbacks),
        **options,
    )
    trainer.fit(module, loader(64, 8, shuffle=True), ckpt_path=ckpt_path)
    return trainer


def moved(steps, what):
    return [not torch.equal(a[what], b[what]) for a, b in itertools.pairwise(steps)]


def test_each_phase_at_its_time(tmp_path):
    watch = Watch()
    qat = QuantizationAwareTraining("portable", start=1, calibration_batches=2, freeze_batch_norm=2, freeze_ranges=3)
    module = Classifier()
    fit(tmp_path, module, qat, watch)
    steps = watch.steps  # 4 epochs of 8
    assert [s["high"] is None for s in steps] == [True] * 8 + [False] * 24
    assert [s["active"] for s in steps] == [False] * 9 + [True] * 23
    assert moved(steps[8:], "high") == [True] * 15 + [False] * 8
    assert moved(steps, "mean") == [True] * 15 + [False] * 16
    assert steps[-1]["count"] == 16
    assert all(moved(steps, "weight"))
    x = images(16, 3).tensors[0]
    with torch.no_grad():  # with statistics frozen, training computes what ships
        assert torch.allclose(module.train()(x), module.eval()(x), atol=1e-5)


@pytest.mark.parametrize("decays", [True, False])
def test_batch_norm_is_frozen_by_default_once_the_rate_is_low(tmp_path, decays):
    class Decaying(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 0.05)
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.1)] if decays else []

    watch = Watch()
    fit(tmp_path, Decaying(), QuantizationAwareTraining("portable", start=1, calibration_batches=1), watch)
    still = [not m for m in moved(watch.steps, "mean")]
    assert still == ([False] * 23 + [True] * 8 if decays else [False] * 31)  # two thirds of the phase: step 24
    assert [not m for m in moved(watch.steps[8:], "high")] == [False] * 19 + [True] * 4  # five sixths: step 28


def test_lr_scale_scales_the_step_and_leaves_the_schedule_alone(tmp_path):
    used = []

    class Recording(torch.optim.SGD):
        def step(self, closure=None):
            loss = closure()
            used.append(self.param_groups[0]["lr"])
            super().step()
            return loss

    class Decaying(Classifier):
        def configure_optimizers(self):
            optimizer = Recording(self.parameters(), 0.1)
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    watch = Watch()
    fit(tmp_path, Decaying(), QuantizationAwareTraining("portable", start=1, lr_scale=0.25), watch, epochs=2)
    schedule = [0.1 * 0.9**i for i in range(17)]
    assert [s["rate"] for s in watch.steps] == pytest.approx(schedule[1:])
    assert used == pytest.approx(schedule[:8] + [0.25 * r for r in schedule[8:16]])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"lr_scale": 0}, "Argument `lr_scale` must be above 0, but got 0"),
        ({"ranges": "kl"}, "Argument `ranges` must be one of"),
        ({"start": 2, "freeze_ranges": 1}, r"Argument `freeze_ranges` must be at or after `start` \(2\), but got 1"),
        ({"freeze_batch_norm": 1.5}, "Argument `freeze_batch_norm` must be a share of the run"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**arguments)


@pytest.mark.filterwarnings("ignore:The dirpath has changed")  # the resumed run keeps its own checkpoints
@pytest.mark.parametrize("ranges", ["lsq", "percentile", "min_max"])
def test_a_resumed_run_is_bit_identical_whatever_learns_the_ranges(tmp_path, ranges):
    def run(folder, ckpt_path=None):
        torch.manual_seed(4)
        module = Classifier(dropout=0.2)
        keep = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        qat = QuantizationAwareTraining(
            "onnxruntime", start=1, calibration_batches=3, ranges=ranges, freeze_batch_norm=2
        )
        fit(folder, module, la.ExactResume(), qat, keep, epochs=3, ckpt_path=ckpt_path)
        bank = quantized_forwards(module)[""].bank
        return {**module.state_dict(), "low": bank.low, "scales": bank.scales}

    whole = run(tmp_path / "whole")
    for step in (9, 14, 20):  # in calibration, in fake-quant, with frozen statistics
        again = run(tmp_path / str(step), tmp_path / "whole" / f"step={step}.ckpt")
        assert [k for k in whole if not torch.equal(whole[k], again[k])] == [], step


class Detector(L.LightningModule):
    """Losses in training, boxes in eval; `training_step` calls backbone and neck itself."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 1, 1))
        self.neck = nn.Sequential(nn.Conv2d(8, 8, 1), nn.ReLU())
        self.head = nn.Conv2d(8, 5, 1)  # a score and a box for each cell
        self.aux = nn.Linear(8, 4)  # in training only

    def forward(self, images):
        found = self.head(self.neck(self.backbone(images))).flatten(2).transpose(1, 2)  # (N, cells, 5)
        scores, best = found[..., 0].sigmoid().topk(3)
        return {"scores": scores, "boxes": found[..., 1:].gather(1, best[..., None].expand(-1, -1, 4))}

    def training_step(self, batch, batch_idx):
        features = self.backbone(batch[0])
        found = self.head(self.neck(features))
        return found.square().mean() + nn.functional.cross_entropy(self.aux(features.mean((2, 3))), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05)


def test_submodules_of_a_detector_in_one_file(tmp_path):
    module = Detector()
    fit(tmp_path, module, QuantizationAwareTraining("portable", start=1, module=["backbone", "neck"]), epochs=2)
    assert set(quantized_forwards(module)) == {"backbone", "neck"}
    x = images(4).tensors[0]
    export = la.export_onnx(module, x, tmp_path / "detector.onnx")
    assert export.output_names == ("scores", "boxes")
    assert set(export.trained) == {"backbone", "neck"}
    with torch.no_grad():
        want = module.eval()(x)
    got = OnnxRuntimeRunner(export.path, emulate=True)(x.numpy())
    for name in want:
        assert np.abs(got[name] - want[name].numpy()).max() <= 1e-5


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile imports it
def test_a_compiled_module_is_trained_without_compile_and_says_so(tmp_path):
    module = torch.compile(Classifier())
    with pytest.warns(UserWarning, match="the module runs without torch.compile in this fit"):
        fit(tmp_path, module, QuantizationAwareTraining("portable", start=0), epochs=1)
    assert list(quantized_forwards(module._orig_mod)) == [""]


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime"])
def test_zeros_and_groups_of_two_in_four_survive(tmp_path, target):
    module = Classifier(width=16)
    pruning = la.WeightPruning(granularity="2:4", start=0, end=1)
    fit(tmp_path, module, pruning, QuantizationAwareTraining(target, start=2), epochs=3)
    export = la.export_onnx(module, images(4).tensors[0], tmp_path / "m.onnx")
    weights = export.trained[""].weights
    for name, mask in pruning.masks.items():
        integers = weights[name.removesuffix(".weight").replace(".", "_") + "_weight_int8"][0]
        assert (integers[mask.logical_not()] == 0).all()
        groups = integers.reshape(*integers.shape[:2], -1).transpose(1, 2).reshape(-1, 4)
        assert ((groups != 0).sum(1) <= 2).all()
    assert pruning.masks


def test_gradient_clipping_accumulation_and_bf16(tmp_path):
    module = Classifier()
    trainer = fit(
        tmp_path,
        module,
        QuantizationAwareTraining("onnxruntime", start=1, calibration_batches=2),
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        precision="bf16-mixed",
    )
    assert trainer.global_step == 16
    bank = quantized_forwards(module)[""].bank
    assert bank.active
    assert torch.isfinite(bank.scales).all()
    assert module.net.conv1.weight.dtype is torch.float32


def test_batch_norm_that_keeps_no_statistics_is_not_frozen(tmp_path):
    module = Classifier()
    module.net.norm1 = nn.BatchNorm2d(module.net.norm1.num_features, track_running_stats=False)
    qat = QuantizationAwareTraining("portable", start=1, calibration_batches=2, freeze_batch_norm=2)
    fit(tmp_path, module, qat)
    bank = quantized_forwards(module)[""].bank
    assert bank.norms_frozen
    assert torch.isfinite(module.eval()(images(8).tensors[0])).all()


def test_batch_norm_with_a_cumulative_average_keeps_averaging(tmp_path):
    modules = []
    for callbacks in ([], [QuantizationAwareTraining("portable", start=0, calibration_batches=100)]):
        torch.manual_seed(0)
        module = Classifier()
        module.net.norm1.momentum = None
        fit(tmp_path, module, *callbacks)
        modules.append(module)
    float_norm, norm = (module.net.norm1 for module in modules)
    assert torch.equal(norm.num_batches_tracked, float_norm.num_batches_tracked)
    assert torch.equal(norm.running_mean, float_norm.running_mean)  # fake-quant isn't active yet
