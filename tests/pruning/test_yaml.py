"""Criteria in a config file: by name, by class_path, and a function by its import path."""

import pytest
import torch
from jsonargparse import ArgumentParser

import lightning_accel as la
from lightning_accel.pruning.criterion import Criterion


class Scaled(Criterion):
    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def scores(self, name, parameter, grad=None):
        return self.factor * parameter.detach().abs()


class Called:
    """An object that is called, as ``Callable`` takes it from a config."""

    def __init__(self, factor: float = 1.0):
        self.factor = factor

    def __call__(self, name, parameter, grad=None):
        return self.factor * parameter.detach().abs()


def negated(name, parameter, grad=None):
    return -parameter.detach().abs()


@pytest.mark.parametrize("callback", [la.WeightPruning, la.ChannelPruning])
@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("taylor", None),
        ("{class_path: tests.pruning.test_yaml.Scaled, init_args: {factor: -2.0}}", [-2.0, -4.0]),
        ("{class_path: tests.pruning.test_yaml.Called, init_args: {factor: -3.0}}", [-3.0, -6.0]),
        ("tests.pruning.test_yaml.negated", [-1.0, -2.0]),
    ],
)
def test_a_criterion_from_a_config(callback, text, wanted):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(callback, "pruning")
    name = "sparsity" if callback is la.WeightPruning else "pruning_ratio"
    made = parser.instantiate(parser.parse_string(f"pruning: {{{name}: 0.5, criterion: {text}}}")).pruning
    method = made._method if callback is la.WeightPruning else made.target.method
    if wanted is None:
        assert method.needs_gradients
    else:
        assert method.scores("w", torch.tensor([1.0, -2.0]), None).tolist() == wanted


@pytest.mark.parametrize("criterion", [Scaled(-1.0), Called(-1.0), negated], ids=["object", "callable", "function"])
def test_one_criterion_prunes_weights_and_channels(trainer, criterion):
    """The largest weights go, and the channels with the largest weights."""
    from tests.support.models import Classifier, loader

    module = Classifier()
    before = module.net.conv2.weight.detach().abs().sum()
    pruning = la.WeightPruning(0.5, criterion=criterion, include="net.conv2.weight", schedule="constant")
    trainer(pruning, max_epochs=1, limit_train_batches=1).fit(module, loader())
    assert module.net.conv2.weight.detach().abs().sum() < 0.4 * before  # of the smallest half: about a quarter

    module = Classifier()
    channels = la.ChannelPruning(0.5, criterion=criterion, schedule="constant", start=0, end=0)
    trainer(channels, max_epochs=1, limit_train_batches=1).fit(module, loader())
    assert module.net.conv1.weight.shape[0] == 4
