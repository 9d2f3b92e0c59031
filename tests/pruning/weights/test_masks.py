import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from lightning_accel.pruning.functional import prune_weights_
from lightning_accel.pruning.weights.masks import apply_masks_, measured_sparsity, prune_masks
from lightning_accel.pruning.weights.targets import prunable_parameters
from tests.support.models import Residual


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.77, 0.99])
def test_layer_masks_equal_those_of_torch(sparsity):
    layer = nn.Conv2d(5, 7, 3)
    ours = prune_masks({"w": layer.weight.detach()}, sparsity, scope="layer")["w"]
    prune.l1_unstructured(layer, "weight", amount=sparsity)
    assert torch.equal(ours, layer.weight_mask.bool())


@pytest.mark.parametrize("sparsity", [0.2, 0.8])
def test_global_masks_equal_those_of_torch(sparsity):
    net = Residual()
    weights = {n: p.detach().clone() for n, p in prunable_parameters(net).items()}
    ours = prune_masks(weights, sparsity, scope="global")
    layers = {"conv1.weight": net.conv1, "conv2.weight": net.conv2, "head.weight": net.head}
    prune.global_unstructured([(m, "weight") for m in layers.values()], prune.L1Unstructured, amount=sparsity)
    for name, layer in layers.items():
        assert torch.equal(ours[name], layer.weight_mask.bool())


def test_the_count_is_exact_where_scores_tie():
    masks = prune_masks({"a": torch.ones(100), "b": torch.ones(100)}, 0.35)
    assert sum(int((~m).sum()) for m in masks.values()) == 70


def test_targets_are_absolute_and_what_is_pruned_stays_pruned():
    weights = {"w": torch.randn(1000)}
    first = prune_masks(weights, 0.3)
    weights["w"] = torch.randn(1000)  # other weights are the smallest now
    second = prune_masks(weights, 0.5, masks=first)
    assert int((~second["w"]).sum()) == 500
    assert not (second["w"] & ~first["w"]).any()


def test_biases_norms_and_frozen_weights_are_left_alone():
    net = Residual()
    net.conv2.weight.requires_grad = False
    assert set(prunable_parameters(net)) == {"conv1.weight", "head.weight"}


def test_excluding_everything_is_an_error():
    with pytest.raises(ValueError, match="every one is excluded"):
        prunable_parameters(Residual(), exclude=("*",))


@pytest.mark.parametrize("sparsity", [1.5, -0.1, 1.0, True, "0.5"])
def test_sparsity_is_a_share(sparsity):
    with pytest.raises(ValueError, match=r"Argument `sparsity` must be a share of zeros in \[0, 1\)"):
        prune_masks({"w": torch.ones(4)}, sparsity)


def test_scope_and_criterion_are_checked():
    with pytest.raises(ValueError, match="Argument `scope` must be one of"):
        prune_masks({"w": torch.ones(4)}, 0.5, scope="block")
    with pytest.raises(ValueError, match="Argument `criterion` must be one of"):
        prune_masks({"w": torch.ones(4)}, 0.5, criterion="luck")


def test_functions_alone_prune_a_plain_module():
    net = Residual()
    masks = prune_weights_(net, 0.6, include=("conv*",))
    assert set(masks) == {"conv1.weight", "conv2.weight"}
    total = net.conv1.weight.numel() + net.conv2.weight.numel()
    zeros = int((net.conv1.weight == 0).sum() + (net.conv2.weight == 0).sum())
    assert zeros == round(0.6 * total)
    assert measured_sparsity([net.conv1.weight, net.conv2.weight]) == zeros / total
    net.conv1.weight.data += 1
    apply_masks_(dict(net.named_parameters()), masks)
    assert int((net.conv1.weight == 0).sum() + (net.conv2.weight == 0).sum()) == zeros
