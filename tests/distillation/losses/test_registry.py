"""Losses from outside of the package: by registered name and by entry point."""

import pytest
import torch
from torch import nn

from lightning_accel import DistillationModule
from lightning_accel.distillation.losses.registry import (
    layers_of,
    loss_names,
    named_loss,
    register_loss,
    unregister_loss,
)
from lightning_accel.distillation.terms import LossTerm, make_terms
from tests.support.distributions import install
from tests.support.models import Classifier, Residual, loader


class Huber:
    def __init__(self, temperature: float = 1.0):
        self.temperature = temperature

    def __call__(self, student, teacher):
        return nn.functional.huber_loss(student / self.temperature, teacher / self.temperature)


class OfLayers:
    layers = "required"

    def __call__(self, student, teacher):
        return (student - teacher).abs().mean()


@pytest.fixture
def registered():
    register_loss("huber", Huber)
    register_loss("of_layers", OfLayers)
    yield
    unregister_loss("huber")
    unregister_loss("of_layers")


@pytest.mark.usefixtures("registered")
def test_a_registered_loss_is_used_by_its_name():
    (term,) = make_terms("huber", temperature=2.0)
    a, b = torch.tensor([[4.0]]), torch.tensor([[0.0]])
    assert term.name == "huber"
    assert float(term.loss(a, b)) == 1.5  # of 2 and 0, Huber's loss is 2 - 0.5
    assert [t.name for t in make_terms({"kd": 0.5, "huber": 0.5})] == ["kd", "huber"]
    assert make_terms(Huber())[0].name == "huber"


@pytest.mark.usefixtures("registered")
def test_a_registered_loss_of_layers_asks_for_layers():
    with pytest.raises(ValueError, match="Argument `student_layer` must name a layer for the loss 'of_layers'"):
        LossTerm("of_layers")
    (term,) = make_terms("of_layers", student_layer="conv1", teacher_layer="conv2")
    assert (term.student_layer, term.teacher_layer) == ("conv1", "conv2")
    assert (layers_of("of_layers"), layers_of("huber"), layers_of("hint"), layers_of("rkd")) == (
        "required",
        "none",
        "required",
        "optional",
    )


@pytest.mark.usefixtures("registered")
def test_a_run_distills_with_it(trainer):
    module = DistillationModule(Classifier(), Residual(12), losses="huber", alpha=0.5)
    fit = trainer(max_epochs=1)
    fit.fit(module, loader(16))
    assert torch.isfinite(fit.callback_metrics["distillation_loss"])


def test_an_entry_point_is_a_loss(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"Argument `losses` must name one of kd, hard, .*, but got 'huber'"):
        make_terms("huber")
    install(tmp_path, "more", "lightning_accel.losses", huber=f"{__name__}:Huber")
    monkeypatch.syspath_prepend(tmp_path)
    assert loss_names()[-1] == "huber"
    assert isinstance(named_loss("huber"), Huber)
    assert make_terms("huber", temperature=3.0)[0].loss.temperature == 3.0


def test_a_name_belongs_to_one_loss(registered):
    register_loss("huber", Huber)  # the same again
    with pytest.raises(ValueError, match="Argument `name` must be one that no other loss has, but got 'kd'"):
        register_loss("kd", Huber)
    with pytest.raises(ValueError, match="Argument `factory` must be a class or a function, but got 3"):
        register_loss("three", 3)
    with pytest.raises(ValueError, match=r"Argument `name` must be one of \['huber', 'of_layers'\], but got 'kd'"):
        unregister_loss("kd")
