import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

from lightning_accel import QuantizationAwareTraining
from lightning_accel.errors import CaptureError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from tests.support.models import Classifier, Residual, images, loader


class Ranges(Callback):
    """The learned ranges after each hook of interest."""

    def __init__(self):
        self.seen: list[tuple[str, torch.Tensor, bool]] = []

    def note(self, where, pl_module):
        for forward in quantized_forwards(pl_module).values():
            self.seen.append((where, torch.stack([forward.bank.low, forward.bank.high]).clone(), forward.bank.active))

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.note("train", pl_module)

    def on_validation_end(self, trainer, pl_module):
        self.note("validation", pl_module)

    def on_test_end(self, trainer, pl_module):
        self.note("test", pl_module)


def test_calibration_then_fake_quant_from_start_on(trainer):
    watch = Ranges()
    qat = QuantizationAwareTraining("portable", start=1, calibration_batches=3)
    trainer(qat, watch, max_epochs=3).fit(Classifier(), loader())
    active = [a for where, _, a in watch.seen if where == "train"]
    assert len(active) == 16  # nothing in the first epoch of 8 steps
    assert active == [False] * 2 + [True] * 14
    assert qat.unfinished() == ""


def test_ranges_move_in_training_and_nowhere_else(trainer):
    watch, module = Ranges(), Classifier()
    t = trainer(QuantizationAwareTraining("portable", start=0, freeze_ranges=1.0), watch, num_sanity_val_steps=2)
    t.fit(module, loader(), DataLoader(images(32, 9), 8))
    t.test(module, DataLoader(images(32, 10), 8), verbose=False)
    kinds = [where for where, _, _ in watch.seen]
    assert {"train", "validation", "test"} == set(kinds)
    for (_, before, _), (where, after, _) in zip(watch.seen, watch.seen[1:], strict=False):
        assert torch.equal(before, after) == (where != "train"), where


def test_it_learns_and_the_module_computes_what_ships_after_fit(trainer):
    module = Classifier(width=12, lr=0.03)
    t = trainer(QuantizationAwareTraining("portable", start=2), max_epochs=6)
    t.fit(module, loader(256, 16, shuffle=True))
    (result,) = t.test(module, DataLoader(images(256, 5), 64), verbose=False)
    assert result["test_accuracy"] > 0.7
    forward = quantized_forwards(module)[""]
    forward.bank.active = False
    x = images(16, 3).tensors[0]
    module.eval()
    floating = module(x)
    forward.bank.active = True
    assert not torch.equal(module(x), floating)


def test_keys_hooks_and_parameters_of_the_module_stay(trainer):
    module = Classifier()
    keys = list(module.state_dict())
    trainer(QuantizationAwareTraining("tensorrt", start=0)).fit(module, loader())
    assert list(module.state_dict()) == keys
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())


def test_a_submodule_that_training_step_calls(trainer):
    class Direct(Classifier):
        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

    with pytest.raises(
        ValueError, match=r'which it did not call. It called: net. Use QuantizationAwareTraining\(module="net"\)'
    ):
        trainer(QuantizationAwareTraining("portable", start=1, inputs=lambda batch: batch[0])).fit(Direct(), loader())
    for named in (None, "net"):
        module = Direct()
        trainer(QuantizationAwareTraining("portable", start=0, module=named)).fit(module, loader())
        assert "forward" not in vars(module)
        assert list(quantized_forwards(module)) == ["net"]


def test_a_module_without_forward(trainer):
    class Bare(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = Residual()

        def training_step(self, batch, batch_idx):
            return cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    with pytest.raises(ValueError, match=r"`Bare` has no `forward`. There are: net"):
        trainer(QuantizationAwareTraining("portable", start=0, inputs=lambda b: b[0])).fit(Bare(), loader())
    for named in (None, "net"):
        module = Bare()
        trainer(QuantizationAwareTraining("portable", start=0, module=named)).fit(module, loader())
        assert list(quantized_forwards(module)) == ["net"]


class Text(L.LightningModule):
    """Integer and boolean inputs by keyword, from a dict batch."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True)
        self.head = nn.Linear(16, 2)

    def forward(self, input_ids, attention_mask=None):
        x = self.layer(self.embed(input_ids), src_key_padding_mask=~attention_mask)
        return {"logits": self.head(x[:, 0])}

    def training_step(self, batch, batch_idx):
        out = self(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        return cross_entropy(out["logits"], batch["labels"])

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 1e-3)


def sentences(count=32):
    ids = torch.randint(1, 20, (count, 6))
    return [{"input_ids": i, "attention_mask": i > 3, "labels": i[0] % 2} for i in ids]


def test_a_dict_batch_with_integer_and_boolean_keywords(trainer):
    module = Text()
    for row in (data := sentences()):
        row["attention_mask"][0] = True
    trainer(QuantizationAwareTraining("portable", start=0)).fit(module, DataLoader(data, 8))
    keys = quantized_forwards(module)[""].bank.keys
    assert "head:input" in keys
    assert not any("embed" in key for key in keys)


def test_what_cannot_be_captured_fails_in_setup(trainer):
    class Dynamic(Classifier):
        def forward(self, x):
            y = self.net(x)
            return y if y.sum() > 0 else -y

    watch = Ranges()
    with pytest.raises(CaptureError, match=r"test_qat.py:\d+\).*Its submodule `net` can be captured"):
        trainer(QuantizationAwareTraining("portable"), watch).fit(Dynamic(), loader())
    assert watch.seen == []


def test_parts_are_called_with_what_the_step_gives_them(trainer):
    class Steps(Classifier):
        """Calls its parts one after the other, and has no forward."""

        forward = L.LightningModule.forward

        def __init__(self):
            super().__init__()
            self.neck = torch.nn.Linear(4, 4)

        def training_step(self, batch, batch_idx):
            return self.neck(self.net(batch[0])).square().mean()

    module = Steps()
    trainer(QuantizationAwareTraining("portable", start=0, module=["net", "neck"])).fit(module, loader())
    assert {path: f.inputs["args"][0]["tensor"][1:] for path, f in quantized_forwards(module).items()} == {
        "net": [3, 8, 8],
        "neck": [4],
    }


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": "tpu"}, "Argument `target` must be one of"),
        ({"start": 1.5}, r"Argument `start` must be a share of the run in \[0, 1\], but got 1.5"),
        ({"calibration_batches": 0}, "Argument `calibration_batches` must be at least 1"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        QuantizationAwareTraining(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"exclude": "neck.*"}, "Argument `exclude` must match the name of a quantizable operator"),
        ({"module": "neck"}, r"Argument `module` must be the path of a submodule, but got 'neck'. There are: net"),
        ({"start": 7}, "Argument `start` must lie within the run's 2 epochs"),
        ({"start": 2}, "Argument `start` must lie before the end of the run"),
    ],
)
def test_bad_plans_fail_before_the_first_step(trainer, arguments, message):
    watch = Ranges()
    with pytest.raises(ValueError, match=message):
        trainer(QuantizationAwareTraining("portable", **arguments), watch).fit(Classifier(), loader())
    assert watch.seen == []


def test_the_random_state_and_the_loader_are_not_moved_by_setup(trainer):
    class Spy(Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if not hasattr(self, "first"):
                self.first = (batch[0].clone(), torch.get_rng_state())

    firsts = []
    for callbacks in ([], [QuantizationAwareTraining("portable", start=1)]):
        torch.manual_seed(3)
        module, spy = Classifier(dropout=0.2), Spy()
        trainer(*callbacks, spy).fit(module, loader(shuffle=True))
        firsts.append(spy.first)
    assert torch.equal(firsts[0][0], firsts[1][0])
    assert torch.equal(firsts[0][1], firsts[1][1])
