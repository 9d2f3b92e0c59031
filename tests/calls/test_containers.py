"""Dataclasses and namedtuples that a `forward` takes or returns whole: they train, quantize and ship like tuples and dicts."""

import json
from collections import namedtuple
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.calls import containers
from lightning_accel.calls.learned import LearnedInputs, learned_inputs
from lightning_accel.calls.shapes import describe_inputs, example_inputs
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.calls.test_learned import Base, Rows, collate, ship

pytestmark = pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")


@dataclass
class Batch:
    """Insists on matching sizes, as batches with checks do."""

    image: torch.Tensor
    label: torch.Tensor

    def __post_init__(self):
        if self.image.shape[0] != self.label.shape[0]:
            raise ValueError("sizes")


Pair = namedtuple("Pair", ["image", "label"])


class Whole(Base):
    """`forward` takes the batch and reads one of its fields."""

    def forward(self, batch):
        return self.model(batch.image)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch), batch.label)

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch).argmax(1) == batch.label).float().mean())


@dataclass
class Result:
    logits: torch.Tensor
    features: torch.Tensor
    name: str = "result"


class Returns(Base):
    def forward(self, image):
        features = self.model[1](self.model[0](image))
        return Result(self.model[2](features), features)

    def logits(self, batch):
        return self(batch["image"]).logits


@pytest.mark.parametrize("kind", [Batch, Pair])
@pytest.mark.parametrize("quantize", [False, True])
def test_a_batch_that_forward_takes_whole(trainer, tmp_path, kind, quantize):
    module = Whole()
    callbacks = [la.QuantizationAwareTraining("portable", start=0, calibration_batches=2)] if quantize else []
    inputs = ship(trainer, tmp_path, module, collate(kind), callbacks)
    assert "image" in inputs
    assert list(quantized_forwards(module)) == ([""] if quantize else [])
    batch = collate(kind)([Rows()[i] for i in range(20, 28)])
    with la.load_runner(tmp_path / "b", "onnxruntime") as runner, torch.no_grad():
        feeds = {name: getattr(batch, name).numpy() for name in inputs}
        (output,) = runner.run(feeds).values()
        assert torch.allclose(torch.from_numpy(output), module.eval()(batch), atol=1e-4)


@pytest.mark.parametrize("quantize", [False, True])
def test_a_result_ships_under_the_names_of_its_fields(trainer, tmp_path, quantize):
    module = Returns()
    callbacks = [la.QuantizationAwareTraining("onnxruntime", start=0, calibration_batches=2)] if quantize else []
    assert ship(trainer, tmp_path, module, callbacks=callbacks) == ["image"]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["outputs"] == ["logits", "features"]
    assert isinstance(module(torch.randn(2, 8)), Result)


def test_each_batch_gives_its_own_tensors():
    first, second = (collate(Batch)([Rows()[i] for i in rows]) for rows in (range(8), range(8, 16)))
    inputs = learned_inputs(None, module := Whole(), module, first)
    assert isinstance(inputs, LearnedInputs)
    (got,), _ = inputs(second)
    assert isinstance(got, Batch)
    assert torch.equal(got.image, second.image)
    assert torch.equal(got.label, second.label)


def test_a_checkpoint_is_tested_as_it_was_trained(trainer, tmp_path):
    loader = DataLoader(Rows(), 8, collate_fn=collate(Batch))
    run = trainer(la.QuantizationAwareTraining("portable", start=0, calibration_batches=2))
    run.fit(module := Whole(), loader, loader)
    run.save_checkpoint(tmp_path / "a.ckpt")
    (before,) = run.validate(module, loader, verbose=False)
    fresh = trainer(la.QuantizationAwareTraining("portable", start=0, calibration_batches=2))
    assert fresh.validate(Whole(), loader, ckpt_path=str(tmp_path / "a.ckpt"), verbose=False) == [before]


def test_a_class_is_never_imported_by_a_name_in_a_description(monkeypatch):
    monkeypatch.setattr(containers, "_SEEN", {})
    described = describe_inputs((Pair(torch.zeros(4, 2), torch.zeros(4)),), {})
    assert json.loads(json.dumps(described)) == described
    assert isinstance(example_inputs(described, torch.device("cpu"))[0][0], Pair)
    monkeypatch.setattr(containers, "_SEEN", {})
    with pytest.raises(InvalidArgumentError, match=r"must show a call with a `tests.calls.test_containers.Pair`"):
        example_inputs(described, torch.device("cpu"))
    plain = example_inputs(described, torch.device("cpu"), plain=True)[0][0]
    assert type(plain) is tuple


class PassesOn(Base):
    """`forward` passes whatever it gets to the network that the steps call, with other arguments than the batch has."""

    def __init__(self):
        super().__init__()
        self.model = Two()

    def forward(self, *args, **kwargs):
        return self.model(*args, **kwargs)

    def logits(self, batch):
        return self.model(past=batch["image"], scale=batch["image"].abs())


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, past, scale):
        return self.b(torch.relu(self.a(past / (1 + scale))))


def test_a_forward_that_passes_its_arguments_on(trainer, tmp_path):
    module = PassesOn()
    assert ship(trainer, tmp_path, module) == ["past", "scale"]
    x = torch.randn(4, 8)
    with la.load_runner(tmp_path / "b", "onnxruntime") as runner, torch.no_grad():
        (output,) = runner.run({"past": x.numpy(), "scale": x.abs().numpy()}).values()
        assert torch.allclose(torch.from_numpy(output), module.model.eval()(x, x.abs()), atol=1e-5)
