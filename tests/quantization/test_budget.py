"""Quantization within a budget: more effort first, then as few operators in float as the user's metric needs."""

import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.quantization.graph.prepare import quantized_forwards


@pytest.fixture
def fragile():
    """A network with one layer that is hurt by quantization: an outlier in each row takes the resolution of all others."""
    torch.manual_seed(0)
    module = nn.Sequential(*(part for _ in range(4) for part in (nn.Linear(16, 16), nn.ReLU())), nn.Linear(16, 4))
    with torch.no_grad():
        module[4].weight[:, 0] *= 3000
        module[2].weight[0] = 0
        module[2].bias[0] = 0
    return module, torch.randn(256, 16)


def error_of(module, x):
    with torch.no_grad():
        want = module(x)

    @torch.no_grad()
    def error(candidate):
        return float((candidate(x) - want).square().mean() / want.var())

    return error


def kept(candidate):
    return set(quantized_forwards(candidate)[""].kept_float)


def test_the_layer_that_hurts_stays_in_float(fragile):
    module, x = fragile
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    error = error_of(module, x)
    assert error(la.quantize(module, [x], target="portable", effort="high")) > 0.002
    candidate = la.quantization.quantize_within(module, [x], error, 0.002, higher_is_better=False, target="portable")
    assert error(candidate) <= 0.002
    assert kept(candidate) == {"4"}
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())


def test_a_budget_that_holds_at_once_keeps_nothing(fragile):
    module, x = fragile
    called = []

    def metric(candidate):
        called.append(candidate)
        return 1.0

    candidate = la.quantization.quantize_within(module, [x], metric, 0.0, target="portable")
    assert kept(candidate) == set()
    assert called[0] is module
    assert len(called) == 2
    assert not any(part.training for part in candidate.modules())


def test_a_budget_out_of_reach_is_told(fragile):
    module, x = fragile
    metric = iter([1.0] + [0.0] * 100)
    with pytest.raises(
        RunError, match=r"must be within `max_drop` \(0.1\), but the metric drops by 1 with effort 'standard' and 1"
    ):
        la.quantization.quantize_within(module, [x], lambda _: next(metric), 0.1, target="portable")


def test_arguments_are_checked(fragile):
    module, x = fragile
    with pytest.raises(InvalidArgumentError, match="`max_drop` must be at least 0, but got -1"):
        la.quantization.quantize_within(module, [x], lambda _: 1.0, -1)
    with pytest.raises(InvalidArgumentError, match="`effort` must be left out"):
        la.quantization.quantize_within(module, [x], lambda _: 1.0, 0.1, effort="low")
