"""What a reviewer broke, one test each."""

import json
from collections import OrderedDict

import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.verification.integers import check_integers
from tests.quantization.graph.test_prepare import quantized
from tests.support.models import Classifier, Residual, loader

X = torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(3))


def fake_quant_error(module, x=X):
    """How far evaluation with fake-quant is from evaluation without, as a share of the range."""
    forward = quantized(module, x, learn=1)
    module.eval()
    with torch.no_grad():
        on = module(x)
        assert torch.equal(convert(forward)[0].forward(x), on)
        forward.bank.active = False
        off = module(x)
        forward.bank.active = True
        own = type(module).forward(module, x)
    assert torch.allclose(off, own, atol=1e-6)
    return float((on - off).abs().max() / (off.max() - off.min())), forward


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3)


class WritesIntoAView(Net):
    def forward(self, x):
        h = self.a(x)
        h[:, :4] = 0
        return self.b(h)


class ReadsBeforeAndAfter(Net):
    def forward(self, x):
        h = self.a(x)
        first = self.b(h)
        h[:, :4] = 5.0
        return first + self.b(h)


class NoiseInTraining(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 4, 3)

    def forward(self, x):
        if self.training:
            x = x + 0.001 * torch.randn_like(x)
        return self.b(x + self.a(x))


class NormOverTokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.n = nn.Linear(8, 8), nn.BatchNorm1d(8)

    def forward(self, x):
        return self.n(self.a(x[:, 0]))


class EqualNames(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(OrderedDict(c=nn.Conv2d(3, 3, 3, padding=2, dilation=2)))
        self.a_c = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x):
        return self.a_c(self.a(x))


@pytest.mark.parametrize("kind", [WritesIntoAView, ReadsBeforeAndAfter, NoiseInTraining, NormOverTokens, EqualNames])
def test_evaluation_is_that_of_the_module_but_for_rounding(kind):
    torch.manual_seed(0)
    error, forward = fake_quant_error(kind())
    assert error < 0.05
    if kind is NoiseInTraining:
        assert "a different number of times in training" in forward.kept_float["add1"]


def test_tied_weights_and_biases():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
            self.b.weight, self.b.bias = self.a.weight, self.a.bias

        def forward(self, x):
            return self.b(torch.relu(self.a(x[:, 0])))

    error, forward = fake_quant_error(Tied())
    assert error < 0.1
    assert forward.bank.keys == ["a:input", "b:input"]


def test_zero_initialized_residual_norms(tmp_path):
    module = Residual()
    nn.init.zeros_(module.norm1.weight)
    nn.init.zeros_(module.norm2.weight)
    quantized(module, X)
    export = la.export_onnx(module, X, tmp_path / "m.onnx")
    assert check_integers(export.path, export.trained)["weights"] == 3


@pytest.mark.filterwarnings("ignore:Found 1 module")  # Lightning asks whether that is meant: it is
def test_a_frozen_batch_norm_stays_frozen(trainer):
    class Frozen(Classifier):
        def train(self, mode=True):
            super().train(mode)
            self.net.norm1.eval()
            return self

    module = Frozen().train()
    trainer(la.QuantizationAwareTraining("portable", start=0)).fit(module, loader())
    assert module.net.norm1.running_var.tolist() == [1.0] * 8
    assert module.net.norm2.running_var.tolist() != [1.0] * 8


class Boom(Callback):
    def on_train_batch_end(self, *_):
        raise RuntimeError("boom")


def test_callbacks_used_for_another_module_start_anew(trainer):
    qat, pruning = la.QuantizationAwareTraining("portable", start=1), la.WeightPruning(0.5, schedule="constant")
    first, second = Classifier(), Classifier()
    with pytest.raises(RuntimeError, match="boom"):
        trainer(qat, pruning, Boom()).fit(first, loader())
    masks = dict(pruning.masks)
    trainer(qat, pruning).fit(second, loader())
    assert quantized_forwards(second)[""].module is second
    assert any(not torch.equal(masks[k], v) for k, v in pruning.masks.items())


def test_another_target_for_a_quantized_network_is_refused(trainer):
    module = Classifier()
    trainer(la.QuantizationAwareTraining("onnxruntime", start=0)).fit(module, loader())
    with pytest.raises(ValueError, match=r"must be those that the network was quantized with \('onnxruntime'"):
        trainer(la.QuantizationAwareTraining("tensorrt", start=0)).fit(module, loader())


def test_a_quantized_checkpoint_is_not_exported_as_float(trainer, tmp_path):
    t = trainer(la.QuantizationAwareTraining("portable", start=0))
    t.fit(Classifier(), loader())
    t.save_checkpoint(tmp_path / "q.ckpt", weights_only=False)
    with pytest.raises(ValueError, match=r"changed by QuantizationAwareTraining.qat.*Add the callbacks back"):
        trainer(la.ModelExport(tmp_path / "b"), max_epochs=3).fit(
            Classifier(), loader(), loader(), ckpt_path=tmp_path / "q.ckpt"
        )


class Late(Classifier):
    """Builds its layers in `setup`."""

    def __init__(self):
        super().__init__()
        self.net = None

    def setup(self, stage):
        self.net = Residual()


def test_layers_built_in_setup_survive_the_export(trainer, tmp_path):
    module = Late()
    callbacks = [
        la.WeightPruning(0.5, end=1),
        la.QuantizationAwareTraining("portable", start=1),
        la.ModelExport(tmp_path / "b"),
    ]
    trainer(*callbacks).fit(module, loader(), loader(seed=3))
    assert (module.net.conv2.weight == 0).any()


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_weights_that_are_not_float32_are_refused(trainer, precision):
    with pytest.raises(ValueError, match="Argument `precision` must keep float32 weights"):
        trainer(la.QuantizationAwareTraining("portable"), precision=precision).fit(Classifier(), loader())


def test_nothing_is_left_when_batches_are_skipped(trainer):
    class Skips(Classifier):
        def on_train_batch_start(self, batch, batch_idx):
            return -1

    module = Skips()
    trainer(la.QuantizationAwareTraining("portable", start=1)).fit(module, loader())
    assert "forward" not in vars(module)


def test_labels_are_those_behind_the_inputs(trainer, tmp_path):
    class Indexed(Classifier):
        def training_step(self, batch, batch_idx):
            return super().training_step(batch[:2], batch_idx)

        def validation_step(self, batch, batch_idx):
            return super().validation_step(batch[:2], batch_idx)

    data = DataLoader([(*sample, i) for i, sample in enumerate(loader().dataset)], 16)
    export = la.ModelExport(tmp_path / "b")
    trainer(export).fit(Indexed(), data, data)
    metric = export.report["verification"][-1]["metric"]["val_accuracy"][1]
    assert export.report["rows"][0]["accuracy"] == pytest.approx(metric, abs=1e-6)


class Undefined(Classifier):
    """A metric that the data leaves undefined, and a hyper-parameter without a bound."""

    def __init__(self, clip=float("inf")):
        super().__init__()
        self.save_hyperparameters()

    def validation_step(self, batch, batch_idx):
        super().validation_step(batch, batch_idx)
        self.log("val_recall", torch.tensor(float("nan")))


def test_a_metric_that_is_nan_by_both_ways_is_said_and_not_held_against_the_engine(trainer, tmp_path):
    trainer(la.ModelExport(tmp_path / "b"), max_epochs=1).fit(Undefined(), loader(), loader())
    report = json.loads((tmp_path / "b" / "report.json").read_text())
    kernels = next(line for line in report["verification"] if line["engine"] == "onnxruntime (its kernels)")
    assert set(kernels["metric"]) == {"val_accuracy"}
    assert (
        kernels["note"]
        == "the metric `val_recall` is nan by PyTorch and through the engine: there is nothing to compare"
    )
    assert report["run"]["settings"]["Undefined"]["clip"] == "inf"


@pytest.mark.parametrize(("one", "two"), [(float("inf"), 5.0), (1.0, float("nan")), (float("nan"), 1.0)])
def test_a_metric_that_is_no_number_by_one_way_alone_fails(trainer, tmp_path, one, two):
    class Other(Classifier):
        def validation_step(self, batch, batch_idx):
            self(batch[0])
            self.log("val_loss", torch.tensor(two if "forward" in vars(self) else one))  # the engine's takes its place

    with pytest.raises(la.VerificationError, match="the metric `val_loss` is"):
        trainer(la.ModelExport(tmp_path / "b"), max_epochs=1).fit(Other(), loader(), loader())


def test_a_lower_sparsity_than_the_one_reached_is_refused(trainer, tmp_path):
    t = trainer(la.WeightPruning(0.8, end=1))
    t.fit(Classifier(), loader())
    t.save_checkpoint(tmp_path / "p.ckpt", weights_only=False)
    with pytest.raises(
        ValueError, match=r"Argument `sparsity` must be at least the present share of zeros, 0.7998, but got 0.5"
    ):
        trainer(la.WeightPruning(0.5, end=1), max_epochs=3).fit(Classifier(), loader(), ckpt_path=tmp_path / "p.ckpt")
