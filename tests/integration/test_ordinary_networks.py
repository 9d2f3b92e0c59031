"""Networks of ordinary depth ship: deep ones carry a difference in the last place through many layers, and must not be refused for it.

They are narrow and see small images for a few steps; `make zoo` takes them at full size.
"""

from copy import deepcopy
from functools import partial

import lightning as L
import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Dataset, TensorDataset

import lightning_accel as la
from lightning_accel import VerificationError
from tests.support.networks import (
    Bottleneck,
    ConvNeXt,
    Detector,
    RegNetY,
    ResNet,
    ShuffleNetV2,
    Swin,
    UNet,
    VisionTransformer,
    efficientnet_b0,
    mobilenet_v2,
    with_statistics,
)

pytestmark = [
    pytest.mark.timeout(900),  # usual depth: minutes where other processes share the cores
    pytest.mark.filterwarnings("ignore:Quantization for .* is coarse"),  # the weights are random
]

# network, pixels, technique and target, least number of operators in integers
IMAGES = {
    "resnet18": (partial(ResNet, width=8), 32, "qat onnxruntime", 20),
    "resnet50": (partial(ResNet, Bottleneck, (3, 4, 6, 3), 4), 32, "qat portable", 50),
    "mobilenet_v2": (partial(mobilenet_v2, 0.25), 32, "ptq openvino", 50),
    "efficientnet_b0": (partial(efficientnet_b0, 0.25), 32, "qat openvino", 50),
    "convnext_tiny": (partial(ConvNeXt, width=8), 32, "ptq onnxruntime", 50),
    "regnet_y": (partial(RegNetY, widths=(8, 16, 24, 32)), 32, "qat onnxruntime", 50),
    "shufflenet_v2": (partial(ShuffleNetV2, widths=(8, 16, 32, 64, 64)), 32, "qat openvino", 50),
    "deit_tiny": (partial(VisionTransformer, width=48), 32, "qat onnxruntime", 49),
    "swin_tiny": (partial(Swin, 32, width=16), 32, "ptq openvino", 50),
    "unet": (partial(UNet, 8), 32, "qat openvino", 20),
    "detector": (partial(Detector, 4, decode=False), 32, "qat openvino", 50),
}


class Task(L.LightningModule):
    """Ordinary, but that its loss takes results of any shape."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)

    def loss(self, result, y):
        leaves = pytree.tree_leaves(result)
        if leaves[0].ndim == 2:
            return cross_entropy(leaves[0], y)
        return torch.stack([leaf.square().mean() for leaf in leaves]).sum()

    def training_step(self, batch, batch_idx):
        x, y = batch
        return self.loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_loss", self.loss(self(x), y))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1e-3)


class Text(Task):
    """Around a network of transformers; batches are dicts."""

    def forward(self, input_ids, attention_mask):
        return self.network(input_ids=input_ids, attention_mask=attention_mask).logits

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch["input_ids"], batch["attention_mask"]), batch["labels"])

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.loss(self(batch["input_ids"], batch["attention_mask"]), batch["labels"]))


class Sentences(Dataset):
    """Random tokens, padded."""

    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        mask = torch.arange(16) < torch.randint(4, 17, (1,), generator=generator)
        tokens = torch.randint(1, 100, (16,), generator=generator) * mask
        return {"input_ids": tokens, "attention_mask": mask.long(), "labels": index % 10}


def ship(trainer, folder, build, data, how):
    """Fit a few steps with a technique for a target, and export; an engine that this machine's preflight refuses is left out."""
    technique, target = how.split()
    loader = DataLoader(data, 8)

    def fit(engines):
        quantization = (
            la.PostTrainingQuantization(target, calibration_batches=2)
            if technique == "ptq"
            else la.QuantizationAwareTraining(target, start=0, calibration_batches=1)
        )
        export = la.ModelExport(str(folder), engines=engines, samples=16)
        fitted, module = trainer(quantization, export, max_epochs=1, num_sanity_val_steps=0), build()
        try:
            fitted.fit(module, loader, loader)
        except (ValueError, VerificationError) as error:
            # What OpenVINO computes depends on its version and on the CPU; it is known before the first step.
            if "openvino" not in str(error) or "openvino" not in engines or fitted.global_step:
                raise
            return fit(["onnxruntime"])
        return module, export.report, engines

    # OpenVINO's kernels are made for its own target and for `portable`; what `onnxruntime` quantizes beyond that it fuses otherwise.
    return fit(["onnxruntime"] if target == "onnxruntime" else ["onnxruntime", "openvino"])


def check(folder, report, engines, module, inputs, least):
    """The file says what the module computes, the engines run it, and so many operators are integers."""
    assert all(line["passed"] for line in report["verification"])
    assert sum(kept == "int8" for kept in report["quantization"].values()) >= least
    module.eval()
    with torch.no_grad():
        wanted = [tensor.numpy() for tensor in pytree.tree_leaves(module(**inputs))]
    feeds = {name: tensor.numpy() for name, tensor in inputs.items()}
    for engine, options in (("onnxruntime", {"emulate": True}), *((engine, {}) for engine in engines)):
        with la.load_runner(folder, engine=engine, **options) as runner:
            outputs = list(runner.run(feeds).values())
        for got, want in zip(outputs, wanted, strict=True):
            assert got.shape == want.shape
            assert np.isfinite(got).all()
            if options:  # kernels also round biases; what of that is right is the library's own proof
                assert np.median(np.abs(got - want)) <= 0.02 * np.ptp(want)


@pytest.mark.parametrize("name", IMAGES)
def test_image_network(trainer, tmp_path, name):
    build, pixels, how, least = IMAGES[name]
    x, y = torch.randn(16, 3, pixels, pixels), torch.randint(0, 10, (16,))
    network = with_statistics(build(), x)
    module, report, engines = ship(
        trainer, tmp_path / "bundle", lambda: Task(deepcopy(network)), TensorDataset(x, y), how
    )
    check(tmp_path / "bundle", report, engines, module, {"x": x[:4]}, least)


def test_bert_of_six_layers(trainer, tmp_path):
    hf = pytest.importorskip("transformers", reason="transformers is an optional package")
    sizes = {
        "vocab_size": 100,
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "num_labels": 10,
    }
    network, data = hf.BertForSequenceClassification(hf.BertConfig(**sizes)), Sentences()
    module, report, engines = ship(
        trainer, tmp_path / "bundle", lambda: Text(deepcopy(network)), data, "qat onnxruntime"
    )
    batch = next(iter(DataLoader(data, 4)))
    check(tmp_path / "bundle", report, engines, module, {n: batch[n] for n in ("input_ids", "attention_mask")}, 36)
