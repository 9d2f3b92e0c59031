import copy

import pytest
import torch
from torch import nn

from lightning_accel.core.effective_weight import (
    EffectiveLinear,
    add_adapter_,
    linear_layers,
    remove_adapter_,
    restore_,
    set_rounding_,
    transform_,
)


class Shift(nn.Module):
    """An adapter that adds a constant to the weight, or to the output."""

    def __init__(self, merged):
        super().__init__()
        self.value, self.active, self.merged = nn.Parameter(torch.tensor(0.25)), True, merged

    def delta(self):
        return self.value.expand(3, 4)

    def forward(self, x):
        return self.value * x.sum(-1, keepdim=True)


def test_rounding_comes_after_the_adapters():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    add_adapter_(layer, "a", Shift(merged=True))
    set_rounding_(layer, torch.round)
    assert torch.equal(layer(x), nn.functional.linear(x, (layer.weight + 0.25).round(), layer.bias))
    layer.adapters["a"].active = False
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight.round(), layer.bias))


def test_an_adapter_kept_apart_adds_to_the_output():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    add_adapter_(layer, "a", Shift(merged=False))
    torch.testing.assert_close(
        layer(x), nn.functional.linear(x, layer.weight, layer.bias) + 0.25 * x.sum(-1, keepdim=True)
    )


def test_the_class_goes_back_once_nothing_is_left():
    layer = nn.Linear(4, 3)
    keys, weight = list(layer.state_dict()), layer.weight
    set_rounding_(layer, torch.round)
    add_adapter_(layer, "a", Shift(merged=True))
    assert type(layer) is EffectiveLinear
    assert isinstance(layer, nn.Linear)
    set_rounding_(layer, None)
    assert type(layer) is EffectiveLinear
    remove_adapter_(layer, "a")
    assert type(layer) is nn.Linear
    assert list(layer.state_dict()) == keys
    assert layer.weight is weight
    restore_(layer)


def test_copies_compute_with_their_own_weight():
    layer, x = nn.Linear(4, 3), torch.randn(2, 4)
    set_rounding_(layer, torch.round)
    twin = copy.deepcopy(layer)
    with torch.no_grad():
        twin.weight.add_(5.0)
    assert torch.equal(twin(x), nn.functional.linear(x, twin.weight.round(), twin.bias))
    assert not torch.equal(twin(x), layer(x))


def test_the_conv1d_of_transformers_is_a_linear_layer():
    conv1d = pytest.importorskip("transformers.pytorch_utils", reason="transformers is not installed").Conv1D
    layer, x = conv1d(3, 4), torch.randn(2, 5, 4)
    nn.init.normal_(layer.weight)
    expected = layer(x)
    assert list(linear_layers(nn.Sequential(layer, nn.Conv2d(1, 1, 1), nn.Linear(1, 1)))) == ["0", "2"]
    effective = transform_(layer)
    assert effective.stored_weight().shape == (3, 4)
    torch.testing.assert_close(layer(x), expected)
    set_rounding_(layer, torch.round)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight.t().round(), layer.bias))
    set_rounding_(layer, None)
    assert type(layer) is conv1d


def test_a_subclass_may_compute_anything_and_is_left_alone():
    class Gated(nn.Linear):
        pass

    assert linear_layers(nn.Sequential(Gated(2, 2))) == {}
