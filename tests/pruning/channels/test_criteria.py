"""Scores against the formulas, written out in NumPy; the order in which units leave."""

import numpy as np
import pytest
import torch
from torch import nn

from lightning_accel.pruning.channels.criteria import channel_criterion, taylor_scores, unit_scores
from lightning_accel.pruning.channels.equivalence import find_groups
from lightning_accel.pruning.channels.groups import Group
from lightning_accel.pruning.channels.selection import fewest, removal_order, shares_of, units_of
from lightning_accel.pruning.criterion import Criterion
from lightning_accel.pruning.functional import prune_channels_
from tests.pruning import networks as nets

X = torch.randn(nets.IMAGES)


def parts(module):
    return {name: p.detach().numpy().astype(np.float64) for name, p in module.named_parameters()}


def group_of(module, name):
    group = next(g for g in find_groups(module, ((X,), {})) if g.name == name)
    return group, dict(module.named_parameters())


def test_group_norm_is_over_all_that_leaves():
    module = nets.Residual()
    nn.init.normal_(module.norm2.weight)
    group, parameters = group_of(module, "inner")
    w = parts(module)
    squares = (w["inner.weight"] ** 2).sum((1, 2, 3)) + w["inner.bias"] ** 2 + w["norm2.weight"] ** 2
    squares += w["norm2.bias"] ** 2 + (w["outer.weight"] ** 2).sum((0, 2, 3))
    wanted = np.sqrt(squares) / np.sqrt(squares).mean()
    np.testing.assert_allclose(unit_scores(group, parameters).numpy(), wanted, rtol=1e-6)


def test_magnitude_is_of_the_filters():
    module = nets.Residual()
    group, parameters = group_of(module, "stem")  # and `outer`, whose channels are added to its
    w = parts(module)
    sums = np.abs(w["stem.weight"]).sum((1, 2, 3)) + np.abs(w["outer.weight"]).sum((1, 2, 3))
    np.testing.assert_allclose(unit_scores(group, parameters, "magnitude").numpy(), sums / sums.mean(), rtol=1e-6)


def test_bn_scale_is_of_the_norms():
    module = nets.Residual()
    nn.init.normal_(module.norm2.weight)
    group, parameters = group_of(module, "inner")
    scale = np.abs(parts(module)["norm2.weight"])
    np.testing.assert_allclose(unit_scores(group, parameters, "bn_scale").numpy(), scale / scale.mean(), rtol=1e-6)


def test_heads_are_scored_whole():
    module = nets.Transformer(nets.FusedAttention("index"))
    group, parameters = group_of(module, "attention.qkv")
    w = parts(module)["attention.qkv.weight"].reshape(3, 4, 4, 16)  # q, k, v; head; channel; input
    sums = np.abs(w).sum((0, 2, 3))
    np.testing.assert_allclose(unit_scores(group, parameters, "magnitude").numpy(), sums / sums.mean(), rtol=1e-6)


def test_taylor_is_the_squared_sum_over_what_makes_the_channels():
    module = nets.Residual().double()
    group, parameters = group_of(module, "inner")
    assert taylor_scores(group, parameters) is None
    module(X.double()).square().sum().backward()
    w = parts(module)
    g = {name: p.grad.numpy().astype(np.float64) for name, p in module.named_parameters()}
    wanted = ((w["inner.weight"] * g["inner.weight"]).sum((1, 2, 3)) + w["inner.bias"] * g["inner.bias"]) ** 2
    np.testing.assert_allclose(taylor_scores(group, parameters).numpy(), wanted, rtol=1e-9)
    scores = unit_scores(group, parameters, "taylor", taylor_scores(group, parameters))
    np.testing.assert_allclose(scores.numpy(), wanted / wanted.mean(), rtol=1e-9)


def test_scores_that_are_all_zero_stay_zero():
    module = nets.Residual()
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    group, parameters = group_of(module, "inner")
    assert not unit_scores(group, parameters).any()


def test_what_cannot_be_scored_is_told():
    group, parameters = group_of(nets.Squeezed(), "conv")
    with pytest.raises(ValueError, match=r"Argument `criterion` must be one of .* but got 'l2'"):
        unit_scores(group, parameters, "l2")
    with pytest.raises(ValueError, match='Criterion "taylor" needs gradients, but got none'):
        unit_scores(group, parameters, "taylor")
    with pytest.raises(ValueError, match=r'got "bn_scale" for `conv`, which has no batch norm. Exclude it'):
        unit_scores(group, parameters, "bn_scale")


class Cubed(Criterion):
    def scores(self, name, parameter, grad=None):
        return parameter.detach().abs() ** 3


def cubed(name, parameter, grad):
    return parameter.detach().abs() ** 3


class ByPosition(Criterion):
    """Scores units, not weights: the first unit is the least important."""

    def unit_scores(self, group, parameters):
        return torch.arange(group.units)


@pytest.mark.parametrize("criterion", [cubed, Cubed(), Cubed, "tests.pruning.channels.test_criteria.cubed"])
def test_scores_of_weights_are_added_up_for_each_channel(criterion):
    """Over what makes the channels and what reads them, biases and norms apart."""
    module = nets.Residual()
    group, parameters = group_of(module, "inner")
    w = parts(module)
    made = (np.abs(w["inner.weight"].astype(np.float64)) ** 3).sum((1, 2, 3))
    read = (np.abs(w["outer.weight"].astype(np.float64)) ** 3).sum((0, 2, 3))
    wanted = made + read
    np.testing.assert_allclose(unit_scores(group, parameters, criterion).numpy(), wanted / wanted.mean(), rtol=1e-5)


def test_a_criterion_may_score_units_itself():
    module = nets.Residual()
    before = module.inner.weight.detach().clone()
    prune_channels_(module, X, pruning_ratio=0.25, include="inner", criterion=ByPosition())
    assert torch.equal(module.inner.weight, before[3:])  # a quarter of 12


def test_a_function_that_needs_gradients_reads_the_present_ones():
    module = nets.Residual()

    def gradient(name, parameter, grad):
        return grad.abs()

    gradient.needs_gradients = True
    with pytest.raises(ValueError, match='Criterion "gradient" needs gradients, but got none'):
        prune_channels_(module, X, pruning_ratio=0.25, criterion=gradient)
    module(X).square().sum().backward()
    group, parameters = group_of(module, "inner")
    collected = channel_criterion(gradient).unit_scores(group, parameters)
    g = {name: p.grad.numpy().astype(np.float64) for name, p in module.named_parameters()}
    wanted = np.abs(g["inner.weight"]).sum((1, 2, 3)) + np.abs(g["outer.weight"]).sum((0, 2, 3))
    np.testing.assert_allclose(collected.numpy(), wanted, rtol=1e-5)
    prune_channels_(module, X, pruning_ratio=0.25, criterion=gradient)


@pytest.mark.parametrize(
    ("criterion", "says"),
    [
        (
            lambda name, parameter, grad: parameter.sum(),
            r"must return scores of the parameter's shape .*, but got \(\)",
        ),
        (lambda name, parameter, grad: parameter * torch.nan, "must give a number for each of the .* with NaN"),
    ],
)
def test_functions_that_give_no_scores(criterion, says):
    with pytest.raises(ValueError, match=says):
        prune_channels_(nets.Residual(), X, pruning_ratio=0.25, criterion=criterion)


# --- order


def group(name, units, width=1, original=None, kept=""):
    return Group(name, (name,), units, original or units, width, {}, frozenset(), frozenset(), {}, kept)


A, B = group("a", 4), group("b", 3, width=2)
SCORES = [torch.tensor([3.0, 1.0, 2.0, 9.0]), torch.tensor([1.5, 8.0, 2.5])]


def leaving(groups, scores, **rules):
    return [(b.group, b.units, b.channels) for b in removal_order(groups, scores, **rules)]


def test_the_least_important_leave_first_and_one_stays_in_each_group():
    assert leaving([A, B], SCORES) == [(0, (1,), 1), (1, (0,), 2), (0, (2,), 1), (1, (2,), 2), (0, (0,), 1)]
    assert leaving([A, group("b", 3, kept="reason")], SCORES) == [(0, (1,), 1), (0, (2,), 1), (0, (0,), 1)]


def test_by_layer_the_share_that_has_gone_decides():
    order = leaving([A, B], SCORES, scope="layer")
    assert order == [(0, (1,), 1), (1, (0,), 2), (0, (2,), 1), (1, (2,), 2), (0, (0,), 1)]
    worn = group("a", 3, original=8)  # five of eight have gone
    assert leaving([worn, B], SCORES, scope="layer")[:2] == [(1, (0,), 2), (1, (2,), 2)]


@pytest.mark.parametrize(
    ("units", "width", "round_to", "counts"),
    [
        (20, 1, 8, [4, 8]),  # to 16, to 8
        (16, 1, 8, [8]),
        (7, 1, 8, []),  # can't be a multiple
        (6, 4, 8, [2, 2]),  # two units are eight channels
        (5, 4, 8, [1, 2]),
        (4, 8, 8, [1, 1, 1]),
        (3, 3, 2, [1]),
    ],
)
def test_what_is_left_is_a_multiple(units, width, round_to, counts):
    scores = [torch.arange(units, dtype=torch.float64)]
    order = removal_order([group("a", units, width)], scores, round_to=round_to)
    assert [len(b.units) for b in order] == counts
    assert [u for b in order for u in b.units] == list(range(sum(counts)))


def test_limits_count_what_left_before():
    tired = group("a", 6, original=8)
    assert len(removal_order([tired], [torch.zeros(6)], shares=[0.5])) == 2
    assert len(removal_order([tired], [torch.zeros(6)], shares=[0.25])) == 0
    assert shares_of([A, B], {"a": 0.5}) == [0.5, 1.0]
    assert shares_of([A, B], {"*": 0.5, "a": 0.5}) == [0.5, 0.5]


def test_the_fewest_that_reach_it():
    order = removal_order([A, B], SCORES)
    assert [b.units for b in fewest(order, lambda blocks: sum(b.channels for b in blocks) >= 4)] == [(1,), (0,), (2,)]
    assert fewest(order, lambda blocks: True) == []
    assert fewest(order, lambda blocks: False) is None
    assert units_of(order) == {0: [0, 1, 2], 1: [0, 2]}
