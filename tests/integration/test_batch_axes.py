"""Networks whose batch is fixed, on another axis or missing in an input, from `fit` to a bundle that is verified again."""

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.serving.triton import write_triton

STATE = torch.Generator().manual_seed(0)


class Task(L.LightningModule):
    """A regression on whatever the batch holds."""

    def training_step(self, batch, batch_idx):
        *inputs, target = batch
        result = self(*self.turned(inputs))
        return nn.functional.mse_loss(self.first(result), target)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def turned(self, inputs):
        return inputs

    def first(self, result):
        return result

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-2)


class Stateful(Task):
    """A step of a recurrent network: features ``(B, T, 6)`` and the state ``(1, B, 5)`` of the last call; it returns the next state."""

    def __init__(self):
        super().__init__()
        self.embed, self.rnn, self.head = nn.Linear(6, 8), nn.GRU(8, 5, batch_first=True), nn.Linear(5, 3)

    def forward(self, x, state):
        hidden, state = self.rnn(torch.relu(self.embed(x)), state)
        return self.head(hidden[:, -1]), state

    def turned(self, inputs):
        return inputs[0], inputs[1].transpose(0, 1).contiguous()

    def first(self, result):
        return result[0]


class TimeFirst(Task):
    """A network for ``(T, B, 6)`` and a mask ``(T, T)`` that is the same in each call."""

    def __init__(self):
        super().__init__()
        self.embed, self.mix, self.head = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, frames, mask):
        hidden = torch.relu(self.embed(frames))
        mixed = torch.einsum("st,tbf->sbf", mask, self.mix(hidden))
        return self.head(mixed.mean(0))

    def turned(self, inputs):
        frames = inputs[0].transpose(0, 1).contiguous()
        return frames, torch.ones(len(frames), len(frames)).tril() / len(frames)


class Streaming(Task):
    """Blocks of audio ``(4, 1, 64)``; the batch is part of what it computes."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 8, 9, stride=4), nn.Linear(8, 3)

    def forward(self, block):
        hidden = torch.relu(self.conv(block.reshape(4, 1, 64)))
        return self.head(hidden.mean(-1) + hidden.mean(-1).flip(0).reshape(4, 8))


def loaders(shapes, batch=4, count=18):
    arrays = [torch.randn(count, *shape, generator=STATE) for shape in shapes]
    data = TensorDataset(*arrays, torch.randn(count, 3, generator=STATE))
    return DataLoader(data, batch, drop_last=True), DataLoader(data, batch, drop_last=batch == 4)


CASES = {
    "state": (Stateful, [(7, 6), (1, 5)], {"batch_axis": {"state": 1}}, 5, {"x": 0, "state": 1}),
    "time first": (TimeFirst, [(7, 6)], {"batch_axis": {"frames": 1, "mask": None}}, 5, {"frames": 1}),
    "fixed": (Streaming, [(1, 64)], {"batch": "fixed"}, 4, {}),
}


def ship(trainer, case, how, folder, engines=("onnxruntime", "openvino"), **options):
    make, shapes, named, batch, _ = CASES[case]
    torch.manual_seed(0)
    quantizing = {
        "fp32": None,
        "PTQ": lambda: la.PostTrainingQuantization("openvino", calibration_batches=2, **named),
        "QAT": lambda: la.QuantizationAwareTraining("openvino", start=0, calibration_batches=1, **named),
    }[how]
    settings = {} if quantizing else named  # what the quantizing callback says is enough
    export = la.ModelExport(folder, list(engines), keep_samples=3, **settings, **options)
    module = make()
    trainer(*([quantizing()] if quantizing else []), export, max_epochs=1).fit(module, *loaders(shapes, batch))
    return module, export


@pytest.mark.parametrize("how", ["fp32", "PTQ", "QAT"])
@pytest.mark.parametrize("case", CASES)
def test_it_ships_and_is_verified_again(trainer, case, how, tmp_path):
    module, export = ship(trainer, case, how, tmp_path / "bundle")
    manifest = read_manifest(tmp_path / "bundle")
    assert manifest["batch_axes"] == CASES[case][4]
    assert manifest["failed"] == {}
    assert {check["engine"] for check in export.report["verification"]} >= {"onnxruntime (its kernels)"}
    _, shapes, _, batch, _ = CASES[case]
    if case != "fixed":
        batch = 3  # another one than was trained with
    inputs = module.turned([torch.randn(batch, *shape, generator=STATE) for shape in shapes])
    with torch.no_grad():
        want = module.eval()(*inputs)
    with la.load_runner(tmp_path / "bundle", "onnxruntime") as runner:
        got = list(runner.run({n: t.numpy() for n, t in zip(runner.input_names, inputs, strict=True)}).values())
    for one, other in zip(want if isinstance(want, tuple) else (want,), got, strict=True):
        np.testing.assert_allclose(one.numpy(), other, atol=0.02 if how != "fp32" else 1e-6)
    assert main(["verify", str(tmp_path / "bundle")]) == 0


def test_channels_leave_a_network_whose_batch_is_another_axis(trainer, tmp_path):
    make, shapes, named, batch, _ = CASES["time first"]
    pruning = la.ChannelPruning(pruning_ratio=0.5, start=0, end=1)
    qat = la.QuantizationAwareTraining("onnxruntime", start=1, calibration_batches=1, **named)
    module = make()
    trainer(pruning, qat, la.ModelExport(tmp_path / "bundle", "onnxruntime"), max_epochs=2).fit(
        module, *loaders(shapes, batch)
    )
    assert module.embed.out_features < 8
    assert read_manifest(tmp_path / "bundle")["failed"] == {}


def test_a_wrong_file_is_found_where_the_batch_is_another_axis(trainer, tmp_path):
    """The kept samples are compared with what was trained along their own axis."""
    ship(trainer, "state", "fp32", tmp_path / "bundle", ["onnxruntime"])
    kept = dict(np.load(tmp_path / "bundle" / "samples.npz"))
    kept["state"] = kept["state"][::-1]
    proofs = la.verify_bundle(tmp_path / "bundle", kept)
    assert [proof.status for proof in proofs] == ["failed", "passed"]


def test_a_state_that_is_not_named_is_refused_before_training(trainer, tmp_path):
    make, shapes, *_ = CASES["state"]
    fit = trainer(la.ModelExport(tmp_path / "bundle", "onnxruntime"), max_epochs=1).fit
    with pytest.raises(la.errors.LightningAccelError, match=r"batch_axis=\{name: 1\}"):
        fit(make(), *loaders(shapes, 5))


class Weighted(TimeFirst):
    """Its mask depends on the batch."""

    def turned(self, inputs):
        frames, mask = super().turned(inputs)
        return frames, mask * frames.abs().mean()


def test_an_input_that_changes_has_a_batch(trainer, tmp_path):
    _, shapes, named, *_ = CASES["time first"]
    export = la.ModelExport(tmp_path / "bundle", "onnxruntime", **named)
    with pytest.raises(
        la.errors.InvalidArgumentError, match="must give an axis to inputs that change, but input `mask`"
    ):
        trainer(export, max_epochs=1).fit(Weighted(), *loaders(shapes, 5))


def test_what_needs_the_batch_in_front_says_so(trainer, tmp_path, capsys):
    ship(trainer, "time first", "fp32", tmp_path / "bundle", ["onnxruntime"])
    assert main(["benchmark", str(tmp_path / "bundle")]) == 1
    assert "must have its batch as the first dimension of every input for the benchmark" in capsys.readouterr().err
    with pytest.raises(la.errors.InvalidArgumentError, match="for Triton's batching"):
        write_triton(tmp_path / "bundle", tmp_path / "models", name="name")
    with pytest.raises(
        la.errors.InvalidArgumentError, match="Argument `budgets` must be None for a network whose batch"
    ):
        ship(trainer, "time first", "fp32", tmp_path / "other", budgets=la.Budgets(max_drop=1.0))
