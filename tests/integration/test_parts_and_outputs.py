"""What ships of a module: a part of it, some of its outputs, and no inputs that they don't depend on."""

import json

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.reports.model import UNUSED_INPUTS
from tests.support.models import Residual, images


class Dicts(Dataset):
    def __init__(self):
        self.images = images(24)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        x, y = self.images[index]
        return {"label": y, "pixels": x, "index": index}


class Whole(L.LightningModule):
    """Takes the whole batch; returns features beside the logits."""

    def __init__(self):
        super().__init__()
        self.net = Residual()

    def forward(self, batch):
        logits = self.net(batch["pixels"])
        loss = cross_entropy(logits, batch["label"])
        return {"logits": logits, "probabilities": logits.softmax(1), "loss": loss.expand(logits.shape[0])}

    def training_step(self, batch, batch_idx):
        return self(batch)["loss"].mean()

    def validation_step(self, batch, batch_idx):
        found = self(batch)["logits"].argmax(1) == batch["label"]
        self.log("val_accuracy", found.float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.01)


class Through(Whole):
    """Computes its own loss around the network, so that the network alone can ship."""

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.net(batch["pixels"]), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("val_accuracy", (self.net(batch["pixels"]).argmax(1) == batch["label"]).float().mean())


def fitted(trainer, module, export, *callbacks):
    data = DataLoader(Dicts(), 8)
    trainer(*callbacks, export).fit(module, data, data)
    return module.eval()


def test_chosen_outputs_need_fewer_inputs(trainer, tmp_path):
    folder = tmp_path / "bundle"
    export = la.ModelExport(str(folder), engines=["onnxruntime", "pytorch"], outputs={"logits": "scores"})
    qat = la.QuantizationAwareTraining("portable", start=0, calibration_batches=1)
    module = fitted(trainer, Whole(), export, qat)
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["inputs"], manifest["outputs"]) == (["pixels"], ["scores"])
    assert manifest["unused_inputs"] == ["label"]  # `index` is never read
    notes = [note["text"] for note in export.report["notes"] if note["kind"] == UNUSED_INPUTS]
    assert notes == ["The file has no inputs for `label`: no output depends on them."]
    engine = next(line for line in export.report["verification"] if "kernels" in line["engine"])
    assert "val_accuracy" in engine["metric"]  # through the engine, whose result has no other outputs
    x = np.stack([Dicts()[i]["pixels"].numpy() for i in range(5)])
    with la.load_runner(folder) as runner, la.load_runner(folder, "pytorch") as program:
        got, again = runner(x), program(x)
    batch = {"pixels": torch.from_numpy(x), "label": torch.zeros(5, dtype=torch.long), "index": torch.arange(5)}
    want = module(batch)["logits"].detach().numpy()
    assert np.abs(got - want).max() < 0.05 * np.ptp(want)
    assert np.abs(again - want).max() < 0.05 * np.ptp(want)


def test_a_submodule_ships_alone(trainer, tmp_path):
    folder = tmp_path / "bundle"
    export = la.ModelExport(str(folder), engines="onnxruntime", module="net")
    module = fitted(trainer, Through(), export)
    with la.load_runner(folder) as runner:
        assert runner.output_names == ("output",)
        x = torch.randn(3, 3, 8, 8)
        assert np.allclose(runner(x.numpy()), module.net(x).detach().numpy(), atol=1e-4)
    engine = next(line for line in export.report["verification"] if "kernels" in line["engine"])
    assert "val_accuracy" in engine["metric"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"module": "nothing"}, r"Argument `module` must be the path of a submodule, but got 'nothing'"),
        ({"outputs": ["nothing"]}, r"Argument `outputs` must hold names of outputs, each once, of \['logits'"),
    ],
)
def test_parts_that_are_not_there_are_named_before_training(trainer, tmp_path, settings, message):
    with pytest.raises(InvalidArgumentError, match=message):
        fitted(trainer, Whole(), la.ModelExport(str(tmp_path / "bundle"), **settings))
