"""What the user's own steps call, and with what, decides which network is quantized and how it is called when it ships."""

import json
from collections import namedtuple
from dataclasses import dataclass

import lightning as L
import pytest
import torch
from lightning.pytorch.utilities import CombinedLoader
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, Dataset

import lightning_accel as la
from lightning_accel.calls.batches import call_from_batch
from lightning_accel.calls.learned import LearnedInputs, ReplayedInputs, learned_inputs
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.prepare import quantized_forwards

pytestmark = pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`")


class Rows(Dataset):
    def __len__(self):
        return 32

    def __getitem__(self, i):
        x = torch.randn(8, generator=torch.Generator().manual_seed(i))
        return {"image": x, "label": int(x[:3].argmax()), "name": f"{i}.png"}


class Base(L.LightningModule):
    """Batches are dicts with keys of their own."""

    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3))

    def logits(self, batch):
        return self(batch["image"])

    def training_step(self, batch, batch_idx):
        return cross_entropy(self.logits(batch), batch["label"])

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self.logits(batch).argmax(1) == batch["label"]).float().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-2)


class OtherName(Base):
    def forward(self, x):
        return self.model(x)


class WholeDict(Base):
    def forward(self, batch):
        return self.model(batch["image"])

    def logits(self, batch):
        return self(batch)


class Popped(Base):
    def forward(self, image):
        return self.model(image)

    def training_step(self, batch, batch_idx):
        label, _ = batch.pop("label"), batch.pop("name")
        return cross_entropy(self(**batch), label)

    def validation_step(self, batch, batch_idx):
        label, _ = batch.pop("label"), batch.pop("name")
        self.log("accuracy", (self(**batch).argmax(1) == label).float().mean())


class TrainsModel(Base):
    """`forward` wraps what the steps call."""

    def forward(self, image):
        return self.model(image).softmax(-1)

    def logits(self, batch):
        return self.model.forward(batch["image"])


class NoForward(Base):
    def logits(self, batch):
        return self.model(batch["image"])


class Scaled(Base):
    """The step computes what it passes on."""

    def logits(self, batch):
        return self.model(batch["image"] * 2 + 1)


class Contrastive(Base):
    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        one, two = self(batch["image"]), self(batch["image"].flip(-1))
        return (one @ two.T).logsumexp(1).mean()


class Projection(Base):
    """A head that only training uses, behind the network."""

    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(3, 2)

    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return self.projection(self.model(batch["image"])).logsumexp(1).mean()


@dataclass
class Item:
    image: torch.Tensor
    label: torch.Tensor


Pair = namedtuple("Pair", ["image", "label"])


class Fields(Base):
    def forward(self, x):
        return self.model(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch.image), batch.label)

    def validation_step(self, batch, batch_idx):
        self.log("accuracy", (self(batch.image).argmax(1) == batch.label).float().mean())


def collate(kind):
    return lambda rows: kind(torch.stack([r["image"] for r in rows]), torch.tensor([r["label"] for r in rows]))


class TwoViews(Fields):
    """Batches ((view, view), index)."""

    def training_step(self, batch, batch_idx):
        (one, two), _ = batch
        return (self(one) - self(two)).square().mean() + self(one).logsumexp(1).mean()

    def validation_step(self, batch, batch_idx):
        self.log("mean", self(batch[0][0]).mean())


def views(rows):
    x = torch.stack([r["image"] for r in rows])
    return [x, x.flip(-1)], torch.arange(len(rows))


def ship(trainer, tmp_path, module, collate_fn=None, callbacks=(), train=None):
    loaders = [DataLoader(Rows(), 8, collate_fn=collate_fn) for _ in range(2)]
    export = la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"], samples=16)
    trainer(*callbacks, export).fit(module, loaders[0] if train is None else train, loaders[1])
    return json.loads((tmp_path / "b" / "manifest.json").read_text())["inputs"]


@pytest.mark.parametrize(
    ("kind", "collate_fn", "inputs"),
    [
        (OtherName, None, ["x"]),
        (WholeDict, None, ["image"]),
        (Popped, None, ["image"]),
        (NoForward, None, ["input"]),
        (Scaled, None, ["input"]),
        (Contrastive, None, ["x"]),
        (Fields, collate(Item), ["x"]),
        (Fields, collate(Pair), ["x"]),
        (TwoViews, views, ["x"]),
    ],
)
def test_what_the_steps_pass_ships(trainer, tmp_path, kind, collate_fn, inputs):
    assert ship(trainer, tmp_path, kind(), collate_fn) == inputs


def test_the_shipped_network_computes_what_the_steps_call(trainer, tmp_path):
    module = Scaled()
    ship(trainer, tmp_path, module)
    x = torch.randn(4, 8)
    with la.load_runner(tmp_path / "b") as runner:
        assert torch.allclose(torch.from_numpy(runner(x.numpy())), module.model.eval()(x), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "path"),
    [(OtherName, ""), (Contrastive, ""), (TrainsModel, "model"), (NoForward, "model"), (Projection, "model")],
)
def test_the_network_that_training_calls_is_quantized(trainer, tmp_path, kind, path, caplog):
    module, qat = kind(), la.QuantizationAwareTraining("onnxruntime", start=1, calibration_batches=2)
    with caplog.at_level("INFO"):
        ship(trainer, tmp_path, module, callbacks=[qat])
    assert list(quantized_forwards(module)) == [path]
    said = "QuantizationAwareTraining takes `model`, the largest network that `training_step` calls; it doesn't call `forward`."
    assert (said in caplog.text) == bool(path)
    assert ("`projection`" in caplog.text) == (kind is Projection)


def test_what_was_chosen_is_found_again_in_a_checkpoint(trainer, tmp_path):
    def qat():
        return la.QuantizationAwareTraining("portable", start=0, calibration_batches=2)

    loader = DataLoader(Rows(), 8)
    t = trainer(qat())
    module = NoForward()
    t.fit(module, loader, loader)
    t.save_checkpoint(tmp_path / "a.ckpt")
    (before,) = t.validate(module, loader, verbose=False)
    (fresh,) = trainer(qat()).validate(NoForward(), loader, ckpt_path=str(tmp_path / "a.ckpt"), verbose=False)
    assert fresh == before
    resumed = NoForward()
    trainer(qat(), max_epochs=3).fit(resumed, loader, loader, ckpt_path=str(tmp_path / "a.ckpt"))
    assert list(quantized_forwards(resumed)) == ["model"]


class Several(OtherName):
    def training_step(self, batch, batch_idx):
        first, second = batch.values() if isinstance(batch, dict) else batch
        return cross_entropy(self(first["image"]), first["label"]) + self(second["image"]).softmax(1).var()


def loader():
    return DataLoader(Rows(), 8)


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"a": loader(), "b": loader()},
        lambda: [loader(), loader()],
        lambda: CombinedLoader({"a": loader(), "b": loader()}, "max_size_cycle"),
    ],
)
def test_several_training_loaders(trainer, tmp_path, make):
    quantizing = la.QuantizationAwareTraining("portable", start=1, calibration_batches=2)
    assert ship(trainer, tmp_path, Several(), callbacks=[quantizing], train=make()) == ["x"]


def test_post_training_quantization_of_several_loaders(trainer, tmp_path):
    loaders = {"a": loader(), "b": loader()}
    assert ship(trainer, tmp_path, Several(), callbacks=[la.PostTrainingQuantization("portable")], train=loaders) == [
        "x"
    ]


class Labelled(Base):
    """`forward` gives the loss, too, if it gets labels."""

    def forward(self, image, weight=None, labels=None):
        logits = self.model(image) if weight is None else self.model(image * weight)
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}

    def training_step(self, batch, batch_idx):
        return self(batch["image"], labels=batch["label"])["loss"]

    def validation_step(self, batch, batch_idx):
        self.log("loss", self(batch["image"], labels=batch["label"])["loss"])


def test_labels_do_not_ship(trainer, tmp_path):
    assert ship(trainer, tmp_path, Labelled()) == ["image"]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["outputs"] == ["logits"]


class Spanned(Base):
    """Two targets without a usual name, which `forward` needs both for a loss; a weight of ones changes nothing in this data."""

    def forward(self, image, weight=None, first=None, last=None):
        logits = self.model(image if weight is None else image * weight)
        found = {"logits": logits}
        if first is not None and last is not None:
            found["loss"] = cross_entropy(logits, first) + cross_entropy(logits, last)
        return found

    def training_step(self, batch, batch_idx):
        image, label = batch["image"], batch["label"]
        return self(image=image, weight=torch.ones_like(image), first=label, last=label)["loss"]

    def validation_step(self, batch, batch_idx):
        self.log("loss", self.training_step(batch, batch_idx))


class OpenSpanned(Spanned):
    def forward(self, **batch):
        return super().forward(**batch)


@pytest.mark.parametrize("kind", [Spanned, OpenSpanned])
def test_what_only_the_loss_reads_does_not_ship(trainer, tmp_path, kind):
    assert ship(trainer, tmp_path, kind()) == ["image", "weight"]
    assert json.loads((tmp_path / "b" / "manifest.json").read_text())["outputs"] == ["logits"]


def test_what_only_training_passes_does_not_ship(trainer, tmp_path):
    class Flagged(Base):
        def forward(self, image, noise=False):
            return self.model(image + torch.randn_like(image) if noise else image)

        def training_step(self, batch, batch_idx):
            return cross_entropy(self(batch["image"], noise=True), batch["label"])

    module = Flagged()
    assert ship(trainer, tmp_path, module) == ["image"]
    x = torch.randn(4, 8)
    with la.load_runner(tmp_path / "b") as runner:
        assert torch.allclose(torch.from_numpy(runner(x.numpy())), module.model.eval()(x), atol=1e-5)


def test_a_list_with_a_tensor_for_each_sample_is_named(trainer):
    class Detector(OtherName):
        def forward(self, images):
            return self.model(torch.stack(images))

        def training_step(self, batch, batch_idx):
            return self(batch[0]).square().mean()

        validation_step = training_step

    data = DataLoader(Rows(), 8, collate_fn=lambda rows: ([r["image"] for r in rows], 0))
    with pytest.raises(
        InvalidArgumentError,
        match=r"`inputs` must .* but got a list of 8 tensors of shape \(8,\), one for each sample",
    ):
        trainer(la.QuantizationAwareTraining("portable")).fit(Detector(), data, data)


def test_nodes_and_edges_are_no_batch(trainer, tmp_path):
    class Graph(OtherName):
        def forward(self, x, edges):
            return self.model(x.index_add(0, edges[1], x[edges[0]]))

        def training_step(self, batch, batch_idx):
            return self(*batch).square().mean()

        validation_step = training_step

    graphs = [(torch.randn(5, 8), torch.randint(0, 5, (2, 9))) for _ in range(4)]
    data = DataLoader(graphs, batch_size=None)
    with pytest.raises(InvalidArgumentError, match=r"`inputs` must give .* but got {'x': \(5, 8\), 'edges': \(2, 9\)}"):
        trainer(la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"])).fit(Graph(), data, data)


def test_inputs_goes_before_what_the_steps_show(trainer, tmp_path):
    quantizing = la.PostTrainingQuantization("portable", inputs=lambda batch: {"x": batch["image"] * 0})
    module = OtherName()
    ship(trainer, tmp_path, module, callbacks=[quantizing])
    bank = quantized_forwards(module)[""].bank
    assert bank.high[bank.keys.index("model.0:input")].item() == 0


def test_the_users_loaders_are_asked_once_more_than_by_a_plain_fit(trainer, tmp_path):
    class Counting(OtherName):
        asked = 0

        def train_dataloader(self):
            Counting.asked += 1
            return loader()

        def val_dataloader(self):
            return loader()

    callbacks = [
        la.ChannelPruning(pruning_ratio=0.3, end=1),
        la.PostTrainingQuantization("portable", calibration_batches=2),
        la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"], samples=16),
    ]
    trainer(max_epochs=1).fit(Counting())
    plain, Counting.asked = Counting.asked, 0
    trainer(*callbacks).fit(Counting())
    assert Counting.asked <= plain + 1


def test_quantize_learns_from_the_steps_without_a_trainer():
    module = OtherName()
    quantized = la.quantize(module, loader(), target="portable", calibration_batches=2)
    by_hand = la.quantize(module, loader(), target="portable", calibration_batches=2, inputs=lambda b: b["image"])
    x = torch.randn(4, 8)
    assert torch.equal(quantized(x), by_hand(x))


class Pairs(OtherName):
    """Batches are pairs."""

    def training_step(self, batch, batch_idx):
        return self(batch[0]).square().mean()

    validation_step = training_step


class Attends(Pairs):
    """Its steps can't take inputs alone."""

    def forward(self, x):
        return self.model(x) + x[:, :3].mean(0)


class TimeFirst(OtherName):
    """Its steps scale a batch and put another dimension first."""

    def training_step(self, batch, batch_idx):
        return self((batch / 255).transpose(0, 1)).square().mean()

    validation_step = training_step


def test_what_a_step_makes_of_inputs_alone_is_not_taken_for_a_sample():
    torch.manual_seed(0)
    module, x = TimeFirst(), 255 * torch.rand(5, 6, 8)
    quantized = la.quantize(module, [x], target="portable")
    by_hand = la.quantize(module, [x], target="portable", inputs=lambda b: (b / 255).transpose(0, 1))
    probe = torch.rand(6, 5, 8)
    assert torch.equal(quantized(probe), by_hand(probe))


@pytest.mark.parametrize("kind", [Pairs, Attends])
def test_quantize_takes_inputs_alone(kind):
    torch.manual_seed(0)
    module, x = kind(), torch.randn(16, 8)
    quantized = la.quantize(module, [x], target="portable")
    by_hand = la.quantize(module, [x], target="portable", inputs=lambda b: b)
    assert torch.equal(quantized(x), by_hand(x))


def test_learned_inputs_of_a_batch():
    batch = next(iter(loader()))
    (args, kwargs) = call_from_batch(OtherName(), batch, learned_inputs(None, module := OtherName(), module, batch))
    assert args[0] is batch["image"]
    assert not kwargs
    scaled = Scaled()
    found = learned_inputs(None, scaled, scaled.model, batch)
    assert isinstance(found, ReplayedInputs)
    assert torch.equal(found(batch).args[0], batch["image"] * 2 + 1)
    pair = TwoViews()
    learned = learned_inputs(None, pair, pair, views([Rows()[0], Rows()[1]]))
    assert isinstance(learned, LearnedInputs)
    assert learned.leading == 1


class Keywords(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 3)

    def forward(self, image, labels=None):
        return self.b(torch.relu(self.a(image)))


class CallsByKeyword(Base):
    """The step calls a part that `forward` calls by keyword."""

    def __init__(self):
        super().__init__()
        self.model = Keywords()

    def forward(self, image, labels=None):
        return self.model(image=image, labels=labels)

    def logits(self, batch):
        return self.model(batch["image"])


def test_a_quantized_part_that_forward_calls_by_keyword_ships(trainer, tmp_path):
    module, qat = CallsByKeyword(), la.QuantizationAwareTraining("portable", start=0, calibration_batches=2)
    assert ship(trainer, tmp_path, module, callbacks=[qat]) == ["image"]
    assert list(quantized_forwards(module)) == ["model"]
    x = torch.randn(4, 8)
    with la.load_runner(tmp_path / "b") as runner:
        assert torch.allclose(torch.from_numpy(runner(x.numpy())), module.eval()(x), atol=0.05)  # a rounding step


@pytest.mark.filterwarnings("ignore:`torch.jit")
def test_torchscript_is_named(trainer):
    class Scripted(OtherName):
        def __init__(self):
            super().__init__()
            self.model = torch.jit.trace(self.model, torch.randn(2, 8))

    with pytest.raises(InvalidArgumentError, match="must consist of Python modules, but got a ScriptModule, `model`"):
        trainer(la.QuantizationAwareTraining("portable")).fit(Scripted(), loader())


def test_packed_sequences_are_named(trainer):
    class Packs(OtherName):
        def forward(self, packed):
            return self.model(packed.data)

        def training_step(self, batch, batch_idx):
            return self(nn.utils.rnn.pack_sequence(list(batch["image"][:, None]))).square().mean()

        validation_step = training_step

    with pytest.raises(
        InvalidArgumentError, match="`inputs` must hold tensors with a batch dimension, but got a PackedSequence"
    ):
        trainer(la.QuantizationAwareTraining("portable")).fit(Packs(), loader(), loader())
