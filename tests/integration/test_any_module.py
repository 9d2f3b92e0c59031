"""Law 1: batches, inputs and outputs of all kinds, as users' modules have them; what can't be taken is refused early."""

from collections import OrderedDict, namedtuple
from enum import Enum

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.core.strategies import require
from lightning_accel.errors import CaptureError
from lightning_accel.export.evaluate import through_engine
from lightning_accel.export.preflight import warn_of_objects
from lightning_accel.onnx.export import export_onnx
from lightning_accel.verification.network import ModuleNetwork
from tests.support.models import Classifier, Residual, images, loader


class Bytes(L.LightningDataModule):
    """Images as bytes; the transfer hook makes them what the network takes."""

    classes = 4

    def __init__(self):
        super().__init__()
        x, y = images(96).tensors
        self.low, self.high = x.min(), x.max()
        self.parts = TensorDataset(((x - self.low) / (self.high - self.low) * 255).to(torch.uint8), y)

    def train_dataloader(self):
        return DataLoader(TensorDataset(*self.parts[:64]), 8)

    def val_dataloader(self):
        return [DataLoader(TensorDataset(*self.parts[64:]), 8), DataLoader(TensorDataset(*self.parts[64:72]), 8)]

    def on_after_batch_transfer(self, batch, dataloader_idx):
        x, y = batch
        noise = 10.0 if self.trainer.training else 0.0  # held-out images must not get it
        return x.float() / 255 * (self.high - self.low) + self.low + noise * torch.randn(x.shape), y


class Draws(Classifier):
    """A validation step that uses the logger, the datamodule, and two loaders."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        x, y = batch
        assert x.abs().max() < 20
        self.logger.experiment.add_scalar("drawn", 1.0, batch_idx)
        assert self.trainer.datamodule.classes == 4
        self.log("val_accuracy", (self(x).argmax(1) == y).float().mean())


def test_transfer_hooks_two_validation_loaders_the_logger_and_the_datamodule(trainer, tmp_path):
    export = la.ModelExport(str(tmp_path / "bundle"), engines="onnxruntime")
    qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)
    module, data = Draws(), Bytes()
    fit = trainer(qat, export, logger=L.pytorch.loggers.TensorBoardLogger(tmp_path))
    fit.fit(module, data)
    engine = next(line for line in export.report["verification"] if "kernels" in line["engine"])
    assert "note" not in engine
    assert set(engine["metric"]) == {"val_accuracy/dataloader_idx_0", "val_accuracy/dataloader_idx_1"}
    assert data.trainer is fit
    seen = qat._placed[""].bank
    assert float(seen.high.max()) > 20  # training ranges saw the noise, so the hook ran in its stage


class Sequences(Classifier):
    """Takes a dict, and a flag that isn't a tensor."""

    def __init__(self):
        super().__init__()
        self.net = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv1d(8, 4, 3))

    def forward(self, inputs, scale=1):
        return self.net(inputs["x"] * scale).mean(2)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch["inputs"], batch.get("scale", 1)), batch["y"])


def batches(lengths, scales=None, kind=dict):
    """One batch of a list for each length."""
    rows = [
        {
            "inputs": kind([("x", torch.randn(4, 3, length))]),
            "y": torch.randint(0, 4, (4,)),
            **({"scale": s} if s else {}),
        }
        for length, s in zip(lengths, scales or [None] * len(lengths), strict=True)
    ]
    return DataLoader(rows, batch_size=None)


class Lengths(Sequences):
    """Its batches have lengths of their own; validation tells accuracy."""

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self(batch["inputs"]).argmax(1) == batch["y"]).float().mean())


def test_lengths_that_vary_are_trained_on_shipped_and_proven(trainer, tmp_path):
    qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=2, dynamic={"x": {2: "length"}})
    export = la.ModelExport(tmp_path / "bundle", engines=["onnxruntime"])
    module, held_out = Lengths(), batches([12, 12])
    fit = trainer(qat, export, max_epochs=3)
    fit.fit(module, batches([12, 9, 12, 7]), held_out)
    assert any(line.get("lengths") == {"length": [12, 6]} for line in export.report["verification"])
    with la.load_runner(tmp_path / "bundle") as runner, torch.no_grad():
        module.eval()
        for length in (12, 5, 31):
            x = torch.randn(3, 3, length)
            np.testing.assert_allclose(runner(x.numpy()), module({"x": x}).numpy(), atol=2e-2)
    # The record in the checkpoint holds the axes: a fresh process evaluates any length.
    fit.save_checkpoint(tmp_path / "a.ckpt")
    loaded = la.load_from_checkpoint(Lengths, tmp_path / "a.ckpt").eval()
    x = torch.randn(2, 3, 8)
    assert torch.equal(loaded({"x": x}), module({"x": x}))


def test_a_length_that_torch_fixes_is_told_in_words():
    cells = torch.nn.LSTM(3, 4, batch_first=True)
    with pytest.raises(CaptureError, match=r"torch.export fixes axis 1 at 12 .*LSTM and GRU unroll time"):
        la.quantize(cells, [torch.randn(2, 12, 3)], target="portable", dynamic={"input": {1: "time"}})


def test_a_constant_of_training_may_change(trainer):
    """The user's own forward runs: another value of `scale` is another result, whenever it comes."""
    losses = []
    for callbacks in ([], [la.QuantizationAwareTraining("portable", start=0, calibration_batches=9)]):
        torch.manual_seed(0)
        module = Sequences()
        trainer(*callbacks, max_epochs=1).fit(module, batches([12, 12, 9], [1, 2, 3]))
        losses.append([p.detach().clone() for p in module.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*losses, strict=True))


def test_a_constant_that_is_no_plain_value_is_refused_in_setup(trainer):
    fit = trainer(la.QuantizationAwareTraining("portable", inputs=lambda b: (b["inputs"], np.ones(3))))
    with pytest.raises(ValueError, match=r"Argument `inputs` must hold tensors, plain values .* but got a ndarray"):
        fit.fit(Sequences(), batches([12]))


def test_ordered_dicts_are_dicts(trainer):
    module = Sequences()
    qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=1)
    trainer(qat).fit(module, batches([12] * 3, kind=OrderedDict))
    x = torch.randn(5, 3, 12)
    assert torch.equal(module.eval()(OrderedDict(x=x)), module({"x": x}))
    with pytest.warns(UserWarning, match="must have the structure they were captured with"), pytest.raises(KeyError):
        module({"y": x})


Pair = namedtuple("Pair", ["a", "b"])


class TakesAPair(Classifier):
    def forward(self, pair):
        return self.net(pair[0] + pair[1])

    def training_step(self, batch, batch_idx):
        x, y = batch
        return cross_entropy(self(Pair(x, x)), y)


def test_named_tuples_are_tuples(trainer):
    module = TakesAPair()
    inputs = lambda batch: (Pair(batch[0], batch[0]),)  # noqa: E731
    trainer(la.QuantizationAwareTraining("portable", start=1, calibration_batches=1, inputs=inputs)).fit(
        module, loader(16)
    )
    x = torch.randn(5, 3, 8, 8)
    assert torch.equal(module.eval()(Pair(x, x)), module((x, x)))


class Nested(Classifier):
    """Logits with a loss that isn't there in evaluation, and a constant."""

    def forward(self, x):
        logits = self.net(x)
        return {"loss": logits.mean() if self.training else None, "logits": logits, "deep": (logits * 2, 3, "a")}

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0])["logits"], batch[1])

    def validation_step(self, batch, batch_idx):
        out = self(batch[0])
        assert out["loss"] is None
        assert out["deep"][1:] == (3, "a")
        self.log("val_accuracy", (out["logits"].argmax(1) == batch[1]).float().mean())


def test_none_and_constants_in_a_result(trainer, tmp_path):
    module = Nested().eval()
    x = torch.randn(4, 3, 8, 8)
    export = export_onnx(module, x, tmp_path / "nested.onnx")
    assert export.output_names == ("logits", "deep_0")
    with la.load_runner(export.path) as runner, through_engine(module, export, runner.run):
        through = module(x)
    own = module(x)
    assert through["loss"] is None
    assert through["deep"][1:] == (3, "a")
    assert torch.allclose(through["deep"][0], own["deep"][0], atol=1e-5)
    arrays = ModuleNetwork(module, export)({"x": x.numpy()})
    assert np.array_equal(arrays["logits"], own["logits"].detach().numpy())


def test_none_and_constants_through_quantization_and_export(trainer, tmp_path):
    module = Nested()
    export = la.ModelExport(str(tmp_path / "bundle"), engines="onnxruntime")
    qat = la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)
    trainer(qat, export).fit(module, loader(), loader(32, seed=1))
    engine = next(line for line in export.report["verification"] if "kernels" in line["engine"])
    assert "note" not in engine
    assert set(engine["metric"]) == {"val_accuracy"}


class ReturnsASize(Residual):
    def forward(self, x):
        return super().forward(x), x.shape[0]


class ReturnsNothing(Residual):
    def forward(self, x):
        super().forward(x)


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (ReturnsASize, "must return tensors and plain values, but got a SymInt"),
        (ReturnsNothing, "at least one tensor, but got None"),
    ],
)
def test_results_that_no_file_can_hold(module, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        export_onnx(module(), torch.randn(4, 3, 8, 8), tmp_path / "x.onnx")
    assert not list(tmp_path.iterdir())


class Decoder(L.LightningModule):
    """A decoder of Hugging Face as it comes: it returns logits, and a cache for generating text."""

    def __init__(self):
        super().__init__()
        from transformers import GPT2Config, GPT2LMHeadModel

        sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 16, "vocab_size": 40}
        self.model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=1, eos_token_id=1))

    def forward(self, **batch):
        return self.model(**batch)

    def training_step(self, batch, batch_idx):
        return self.model(**batch).loss

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters())


@pytest.mark.parametrize("technique", ["trained", "post-training"])
def test_a_cache_is_no_output(technique, trainer, tmp_path, caplog):
    torch.manual_seed(0)
    ids = torch.randint(40, (16, 8))
    quantizing = (
        la.QuantizationAwareTraining("onnxruntime", start=1, calibration_batches=2)
        if technique == "trained"
        else la.PostTrainingQuantization(target="onnxruntime")
    )
    module, data = Decoder(), DataLoader([{"input_ids": row, "labels": row} for row in ids], 4)
    with caplog.at_level("INFO", "lightning.pytorch"):
        trainer(quantizing, la.ModelExport(tmp_path / "bundle", engines="onnxruntime")).fit(module, data, data)
    assert "a DynamicCache isn't an output" in caplog.text
    with torch.no_grad(), la.load_runner(tmp_path / "bundle") as runner:
        assert [spec.name for spec in runner.inputs] == ["input_ids"]
        want = module.eval()(input_ids=ids)
        assert want.past_key_values is not None  # the user's own call has it
        found = runner(ids.numpy())
    assert np.abs(found - want.logits.numpy()).max() < 0.05 * want.logits.abs().max()


class Colour(Enum):
    RED = 1


class Coloured(Classifier):
    def __init__(self, colour):
        super().__init__()
        self.save_hyperparameters()


def test_hyper_parameters_that_would_not_come_back(trainer, tmp_path):
    fit = trainer(la.ModelExport(str(tmp_path / "bundle")))
    with pytest.raises(UserWarning, match=r"of Coloured hold objects, `colour` \(Colour\), which are not unpickled"):
        fit.fit(Coloured(Colour.RED), loader(), loader())
    warn_of_objects(fit, Classifier())


def test_sharded_strategies_are_refused(trainer):
    fit = trainer()
    require(fit, "ModelExport")
    fit._accelerator_connector.strategy = FSDPStrategy()  # a Trainer makes one only where there are GPUs
    with pytest.raises(
        ValueError, match=r"one whose ranks hold whole tensors with ModelExport, but got FSDPStrategy \(FSDP1\)"
    ):
        require(fit, "ModelExport")


@pytest.mark.parametrize(("first", "second"), [(None, "net"), ("net", "net.conv1"), ("net", "net")])
def test_two_callbacks_for_one_part(first, second, trainer):
    one = la.QuantizationAwareTraining("portable", module=first, name="one")
    two = la.QuantizationAwareTraining("portable", module=second, name="two")
    with pytest.raises(ValueError, match="Argument `module` must name parts of the network that don't overlap"):
        trainer(one, two).fit(Classifier(), loader())
