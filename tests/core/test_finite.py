"""NaN in a teacher, a loss, the data or the weights is named as what it is, in the first step or before it."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.core.finite import nan_array, nan_input, nan_weight
from tests.support.models import Classifier, Residual, images, loader

NAN = float("nan")


def poisoned(module: nn.Module, name: str, *, count: int = 1) -> nn.Module:
    tensor = dict([*module.named_parameters(), *module.named_buffers()])[name]
    tensor.data.view(-1)[:count] = NAN
    return module


def data(sample: int, count: int = 16) -> DataLoader:
    """Images of which one has a NaN."""
    x, y = images(count).tensors
    x[sample, 0, 0, 0] = NAN
    return DataLoader(TensorDataset(x, y), 8)


class Breaks(Classifier):
    """Its loss is NaN in a step."""

    def __init__(self, step: int = 0):
        super().__init__()
        self.step = step

    def training_step(self, batch, batch_idx):
        loss = super().training_step(batch, batch_idx)
        return loss * NAN if self.global_step == self.step else loss


def test_names_and_counts():
    assert nan_weight(Residual()) == ""
    assert (
        nan_weight(poisoned(Residual(), "conv2.weight", count=3))
        == "parameter `conv2.weight` has NaN in 3 of 576 values"
    )
    assert (
        nan_weight(poisoned(Residual(), "norm1.running_var")) == "buffer `norm1.running_var` has NaN in 1 of 8 values"
    )
    late = nn.Linear(2, 2)
    late.register_buffer("threshold", torch.tensor(NAN))  # found by validation later
    assert nan_weight(late) == ""
    infinite = nn.Linear(2, 2)
    infinite.register_buffer("mask", torch.full((2, 2), -torch.inf))
    assert nan_weight(infinite) == nan_weight(nn.LazyLinear(2)) == ""
    x = torch.tensor([1.0, NAN])
    assert nan_input((torch.zeros(2), torch.arange(2), {"mask": x})) == "`batch[2]['mask']` has NaN in 1 of 2 values"
    assert nan_input(x) == "the batch has NaN in 1 of 2 values"
    assert nan_input([torch.arange(3), "text", None]) == ""
    array = np.zeros((5, 2), np.float32)
    assert nan_array("x", array) == nan_array("x", np.arange(3)) == ""
    array[3, 1] = NAN
    assert nan_array("input `x`", array) == "input `x` has NaN in 1 of 10 values, the first in sample 3"


@pytest.mark.parametrize("name", ["conv1.weight", "norm1.running_mean"])
def test_a_teacher_with_nan(trainer, name):
    module = la.DistillationModule(Classifier(), poisoned(Residual(), name))
    with pytest.raises(
        ValueError, match=rf"Argument `teacher` must have numbers as weights, .* `{name}` has NaN in 1 of"
    ):
        trainer().fit(module, loader())


class Overflows(Residual):
    def forward(self, x):
        return super().forward(x) / 0 * 0


@pytest.mark.parametrize(
    ("student", "teacher", "batches", "message"),
    [
        (
            Classifier,
            Overflows,
            loader,
            r"'kd' .* the output of the teacher has NaN, although its weights and inputs are numbers",
        ),
        (Classifier, Residual, lambda: data(5), r"`batch\[0\]` has NaN in 1 of 1,536 values"),
        (Breaks, Residual, loader, r"loss 'training_step' must be .* weights, inputs and outputs are numbers"),
        (
            lambda: poisoned(Classifier(), "net.head.bias"),
            Residual,
            loader,
            "parameter `net.head.bias` has NaN in 1 of 4",
        ),
    ],
    ids=["teacher", "data", "loss", "student"],
)
def test_the_first_step_of_a_distillation(trainer, student, teacher, batches, message):
    with pytest.raises(RuntimeError, match=f"must be a number in the first step, but got NaN: .*{message}|{message}"):
        trainer().fit(la.DistillationModule(student(), teacher()), batches())


CALLBACKS = {
    "channels": lambda: la.ChannelPruning(0.5, start=1, end=1),
    "weights": lambda: la.WeightPruning(0.5, start=1, end=1),
    "qat": lambda: la.QuantizationAwareTraining("portable", start=1, calibration_batches=1),
}


@pytest.mark.parametrize("kind", CALLBACKS)
@pytest.mark.parametrize(
    ("module", "batches", "message"),
    [
        (Breaks, loader, "step 0: weights and inputs are numbers: look at the loss itself"),
        (lambda: Breaks(5), loader, "step 5: weights and inputs are numbers"),
        (Classifier, lambda: data(9), r"step 1: `batch\[0\]` has NaN in 1 of 1,536 values"),
    ],
    ids=["loss", "later", "data"],
)
def test_the_step_in_which_a_loss_becomes_nan(trainer, kind, module, batches, message):
    broken = module()
    with pytest.raises(RuntimeError, match=rf"The loss of `training_step` must be a number, but got NaN in {message}"):
        trainer(CALLBACKS[kind]()).fit(broken, batches())
    assert not any(p.isnan().any() for p in broken.parameters())  # no step was made with it


def test_weights_with_nan_before_training(trainer):
    for kind in CALLBACKS:
        with pytest.raises(
            (ValueError, RuntimeError), match=r"parameter `net.conv1.weight` has NaN in 1 of 216 values"
        ):
            trainer(CALLBACKS[kind]()).fit(poisoned(Classifier(), "net.conv1.weight"), loader())


class Diverges(Classifier):
    """NaN enters in the middle of the run, through the weights."""

    def on_train_epoch_end(self):
        poisoned(self, "net.conv2.bias")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("channels", "Channels must have numbers as weights to be compared, but in epoch 1"),
        ("weights", "The loss of `training_step` must be a number, but got NaN in step 8:"),
    ],
)
def test_weights_that_become_nan_are_named(trainer, kind, message):
    with pytest.raises(RuntimeError, match=rf"{message} .*parameter `net.conv2.bias` has NaN in 1 of 8 values"):
        trainer(CALLBACKS[kind](), max_epochs=3).fit(Diverges(), loader())


class Quiet(Diverges):
    """Its loss doesn't depend on what has become NaN."""

    def training_step(self, batch, batch_idx):
        return sum(p.square().sum() for name, p in self.named_parameters() if name != "net.conv2.bias")


def test_weights_are_numbers_where_masks_are_updated(trainer):
    with pytest.raises(
        RuntimeError, match=r"Weights must be numbers to be compared, but at step 9 parameter `net.conv2.bias`"
    ):
        trainer(la.WeightPruning(0.5, start=1, end=2), max_epochs=3).fit(Quiet(), loader())


def export(folder) -> la.ModelExport:
    return la.ModelExport(str(folder / "bundle"), engines=["onnxruntime"])


def test_weights_with_nan_do_not_ship(trainer, tmp_path):
    with pytest.raises(
        RuntimeError, match=r"must have numbers as weights to ship, but parameter `net.conv2.bias` has NaN"
    ):
        trainer(export(tmp_path), max_epochs=1).fit(Diverges(), loader(), loader(16))
    assert not (tmp_path / "bundle").exists()
    with pytest.raises(
        ValueError, match=r"Argument `model` must have numbers as weights, .* parameter `net.conv1.weight`"
    ):
        trainer(export(tmp_path), max_epochs=1).fit(poisoned(Classifier(), "net.conv1.weight"), loader(), loader(16))


def test_held_out_data_with_nan(trainer, tmp_path):
    message = (
        r"Argument `data` must hold samples of numbers, but in the validation loader input `x` has NaN in 1 of [\d,]+ values, the first in "
        r"sample 3, and output `\w+` has NaN"
    )
    with pytest.raises(ValueError, match=message):
        trainer(export(tmp_path), max_epochs=1).fit(Classifier(), loader(), data(3))


class Replaces(Classifier):
    def forward(self, x):
        return super().forward(torch.nan_to_num(x))


def test_a_network_that_replaces_nan_may_get_it(trainer, tmp_path):
    trainer(export(tmp_path), max_epochs=1).fit(Replaces(), data(3), data(3))
    assert (tmp_path / "bundle" / "model.onnx").exists()
