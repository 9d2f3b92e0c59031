"""`effort="trained"`: integers learn from the float network; better on other data, never worse, the same again, and what ships."""

import copy

import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn

import lightning_accel as la
from lightning_accel.calls.copies import split_samples
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.refinement import training
from tests.support.models import Classifier, images, loader
from tests.support.zoo import network, samples


def decibels(module, quantized, x):
    with torch.no_grad():
        want = module(*x)
        return float(10 * torch.log10(want.square().sum() / (want - quantized(*x)).square().sum()))


class Separable(nn.Module):
    """Depthwise and pointwise convolutions: (N, 3, 8, 8) to (N, 4)."""

    def __init__(self, width=16):
        super().__init__()
        layers = [nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        for _ in range(4):
            layers += [
                nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False),
                nn.BatchNorm2d(width),
                nn.ReLU6(),
            ]
            layers += [nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU6()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(width, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


def calibration(count=256):
    return list(images(count, 1).tensors[0].split(32))


@pytest.fixture(scope="module")
def depthwise():
    torch.manual_seed(0)
    module = Separable()
    optimizer = torch.optim.Adam(module.parameters(), 1e-2)
    for _ in range(6):
        for x, y in loader(512, 64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
    return module.eval()


@pytest.fixture(scope="module")
def trained(depthwise):
    return la.quantize(depthwise, calibration(), target="onnxruntime", effort="trained")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(training, "STEPS", 10)
    monkeypatch.setattr(training, "TRIAL_STEPS", 2)
    monkeypatch.setattr(training, "RATES", (0.002,))


def test_other_data_is_nearer_to_the_float_network(depthwise, trained):
    fresh = images(512, 2).tensors[:1]
    standard = la.quantize(depthwise, calibration(), target="onnxruntime")
    assert decibels(depthwise, trained, fresh) > decibels(depthwise, standard, fresh) + 0.5


def test_parameters_stay_as_they_were(depthwise, trained):
    pairs = zip(depthwise.state_dict().values(), trained.state_dict().values(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert not any(p.grad is not None for p in trained.parameters())


def test_the_same_again(depthwise, trained):
    again = la.quantize(depthwise, calibration(), target="onnxruntime", effort="trained")
    x = images(8).tensors[0]
    with torch.no_grad():
        assert torch.equal(trained(x), again(x))


@pytest.mark.parametrize(("name", "target"), [("separable", "portable"), ("vit", "openvino"), ("unet", "tensorrt")])
def test_the_file_computes_what_was_trained(name, target, tmp_path, quick, depthwise):
    module, x = (depthwise, (images(64).tensors[0],)) if name == "separable" else (network(name), samples(name, 64))
    quantized = la.quantize(module, [x], target=target, effort="trained")
    refined = quantized_forwards(quantized)[""].bank.refined.values()
    assert any(one.integers is not None and one.integers.dtype is torch.int8 for one in refined)
    export = la.export_onnx(quantized, x, tmp_path / "m.onnx")
    feeds = dict(zip(export.input_names, (t.numpy() for t in x), strict=True))
    with la.load_runner(export.path, "onnxruntime", emulate=True) as runner, torch.no_grad():
        (got,), want = runner.run(feeds).values(), quantized(*x).numpy()
    assert np.median(np.abs(got - want)) <= 1e-6 * np.ptp(want)


def test_a_rate_that_harms_is_left_out(depthwise, quick, monkeypatch, caplog):
    monkeypatch.setattr(training, "RATES", (20.0,))
    standard = la.quantize(depthwise, calibration(64), target="portable")
    with caplog.at_level("INFO"):
        harmed = la.quantize(depthwise, calibration(64), target="portable", effort="trained")
    assert "it is left out" in caplog.text
    x = images(8).tensors[0]
    with torch.no_grad():
        assert torch.equal(standard(x), harmed(x))


def test_pruned_weights_stay_zero(depthwise, quick):
    module = copy.deepcopy(depthwise)
    with torch.no_grad():
        module.head.weight[:, ::2] = 0.0
    quantized = la.quantize(module, calibration(64), target="portable", effort="trained")
    integers = quantized_forwards(quantized)[""].bank.refined["head"].integers
    assert not integers[:, ::2].any()
    assert integers[:, 1::2].any()


def test_one_sample_is_left_alone(depthwise, caplog):
    with caplog.at_level("INFO"):
        la.quantize(depthwise, calibration(1), target="portable", effort="trained")
    assert "training is left out: it needs two batches" in caplog.text


def test_results_without_a_gradient_are_left_alone(quick, caplog):
    class Detached(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 2)

        def forward(self, x):
            return self.layer(x).detach()

    with caplog.at_level("INFO"):
        la.quantize(Detached(), [torch.randn(32, 4)], target="portable", effort="trained")
    assert "it is left out" in caplog.text


def test_inference_mode_is_refused_before_anything_runs(depthwise):
    with (
        torch.inference_mode(),
        pytest.raises(InvalidArgumentError, match='must not be "trained" inside of'),
    ):
        la.quantize(depthwise, calibration(32), target="portable", effort="trained")


def test_a_tied_weight_keeps_one_set_of_integers(quick):
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(torch.relu(self.layer(x)))

    quantized = la.quantize(Twice().eval(), [torch.randn(64, 8)], target="portable", effort="trained")
    found = list(quantized_forwards(quantized)[""].bank.refined.values())
    assert len(found) == 2
    assert torch.equal(found[0].integers, found[1].integers)


def test_in_a_run_and_after_a_resume(trainer, tmp_path, quick):
    x = torch.randn(4, 3, 8, 8)

    def outputs(**options):
        torch.manual_seed(1)
        keep = ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1, save_on_train_epoch_end=True)
        ptq = la.PostTrainingQuantization("portable", calibration_batches=4, effort="trained")
        run = trainer(ptq, la.ExactResume(), keep, max_epochs=2, enable_checkpointing=True)
        run.fit(module := Classifier(), loader(), **options)
        run.save_checkpoint(tmp_path / "end.ckpt")
        fresh = la.load_from_checkpoint(Classifier, tmp_path / "end.ckpt")
        assert any(one.integers is not None for one in quantized_forwards(module)[""].bank.refined.values())
        with torch.no_grad():
            found = module.eval()(x)
            assert torch.equal(found, fresh.eval()(x))
        return found

    whole = outputs()
    assert torch.equal(whole, outputs(ckpt_path=tmp_path / "epoch=0.ckpt"))


def test_every_rank_takes_the_same_steps(depthwise, quick):
    """Gradients are averaged over the ranks: with equal data on all of them, the result is that of one."""

    class Equal:
        calls = 0

        def mean(self, values):
            self.calls += 1
            return values.clone()

    found, ranks, x = [], Equal(), images(32, 1).tensors[0]
    for reduce in (None, ranks):
        quantized = la.quantize(depthwise, [x], target="portable", effort="low")
        with torch.no_grad():
            training.train_integers(list(quantized_forwards(quantized).values()), quantized, [((x,), {})], reduce)
            found.append(quantized(x))
    assert ranks.calls > training.STEPS
    assert torch.equal(*found)


def test_only_a_batch_in_front_is_split():
    class Cat(nn.Module):
        def forward(self, a, b):
            return torch.cat([a, b]).sum()

    x = torch.randn(10, 4)
    linear = nn.Linear(4, 2)
    assert [part[0][0].shape[0] for part in split_samples(((x,), {}), linear, 4)] == [4, 4, 2]
    assert len(split_samples(((x, x[:5]), {}), Cat(), 4)) == 1
    fixed = nn.Sequential(nn.Flatten(0), nn.Linear(40, 2))
    assert len(split_samples(((x,), {}), fixed, 4)) == 1
