"""Quantization within a budget: more effort first, then as few operators in float as the user's metric needs."""

import copy

import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.weight_only.layers import rounded_layers


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


@pytest.fixture
def fragile_weights():
    """Weights on the grid, so that rounding them costs nothing, in all layers but two, of which one matters a hundred times more."""
    torch.manual_seed(0)
    module = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(3)), nn.Linear(64, 8, bias=False))
    with torch.no_grad():
        for place in (0, 2):
            module[place].weight.copy_(la.quantization.GroupGrid()(module[place].weight))
        module[3].weight.add_(0.01 * module[3].weight.abs().max() * torch.randn(8, 64))
        module[3].weight.copy_(la.quantization.GroupGrid(8, 32)(module[3].weight))
    return module, torch.randn(256, 64)


def test_sensitivity_of_weights_alone_ranks_what_rounding_costs(fragile_weights):
    module, x = fragile_weights
    found = la.quantization.sensitivity(module, [x], target="int4")
    assert list(found.costs)[:2] in (["1", "3"], ["3", "1"])
    assert found.costs["0"] == found.costs["2"] == 0.0
    with torch.no_grad():
        want = module(x)
        half = copy.deepcopy(module)
        half[1].weight.copy_(la.quantization.GroupGrid()(half[1].weight))
        assert found.costs["1"] == pytest.approx(float((half(x) - want).square().mean() / want.var()), rel=1e-4)
        rounded = copy.deepcopy(module)
        la.quantization.quantize_weights_(rounded, "int4")
        assert found.total == pytest.approx(float((rounded(x) - want).square().mean() / want.var()), rel=1e-4)
    by_loss = la.quantization.sensitivity(
        module, [x], target="int4", loss=lambda result, _: (result - want).square().mean()
    )
    assert list(by_loss.costs)[:2] == list(found.costs)[:2]


def test_a_budget_for_weights_alone(fragile_weights):
    module, x = fragile_weights
    error = error_of(module, x)
    costs = la.quantization.sensitivity(module, [x], target="int4").costs
    _first, second = list(costs)[:2]
    limit = 1.2 * costs[second]
    candidate = la.quantization.quantize_within(module, [x], error, limit, higher_is_better=False, target="int4")
    assert error(candidate) <= limit
    assert set(rounded_layers(candidate)) >= {"0", "2"}
    assert not rounded_layers(module)
    with pytest.raises(InvalidArgumentError, match="Argument `method` must be left out, since it is raised as needed"):
        la.quantization.quantize_within(module, [x], error, limit, target="int4", method="awq")
    with pytest.raises(RunError, match=r"with method 'rtn' and .* with method 'awq'"):
        la.quantization.quantize_within(
            module, [x], lambda candidate: len(rounded_layers(candidate)), 0, higher_is_better=False, target="int4"
        )


def test_training_is_the_last_effort(fragile):
    module, x = fragile
    message = "1 with effort 'standard' and 1 with effort 'high' and 1 with effort 'trained', and by more than that"
    with pytest.raises(RunError, match=message):
        la.quantization.quantize_within(
            module, [x], lambda candidate: float(candidate is module), 0.1, target="portable"
        )
