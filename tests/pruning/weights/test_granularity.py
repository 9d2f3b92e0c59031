import itertools

import pytest
import torch
from torch import nn

from lightning_accel.pruning.functional import prune_weights_
from lightning_accel.pruning.weights.granularity import granularity_of
from lightning_accel.pruning.weights.masks import prune_masks
from lightning_accel.pruning.weights.targets import SparsityTargets, left_dense, prunable_parameters
from tests.support.models import Residual


def groups_of(mask: torch.Tensor, size: int):
    """Each group along the input channels: (O, I, kh, kw) -> all (kept weights of) runs of `size` input channels."""
    moved = mask.flatten(2) if mask.ndim > 2 else mask[..., None]
    for o, i, k in itertools.product(range(moved.shape[0]), range(0, moved.shape[1], size), range(moved.shape[2])):
        yield moved[o, i : i + size, k]


@pytest.mark.parametrize("shape", [(6, 16), (4, 8, 3, 3)])
@pytest.mark.parametrize("pattern", [(2, 4), (4, 8), (1, 4), (3, 4)])
def test_n_of_m_keeps_the_best_n_of_every_group(shape, pattern):
    keep, of = pattern
    weight = torch.randn(shape)
    mask = prune_masks({"w": weight}, 1 - keep / of, granularity=f"{keep}:{of}")["w"]
    for kept, values in zip(groups_of(mask, of), groups_of(weight.abs(), of), strict=True):
        assert int(kept.sum()) == keep
        assert set(kept.nonzero()[:, 0].tolist()) == set(values.topk(keep).indices.tolist())


def test_ties_do_not_break_the_pattern():
    mask = prune_masks({"w": torch.ones(4, 8)}, 0.5, granularity="2:4")["w"]
    assert all(int(kept.sum()) == 2 for kept in groups_of(mask, 4))


def test_half_of_a_pattern_prunes_the_groups_that_lose_least():
    weight = torch.cat([torch.tensor([[9.0, 8, 0.1, 0.2]]), torch.tensor([[9.0, 8, 7, 6]])])
    mask = prune_masks({"w": weight}, 0.25, granularity="2:4")["w"]
    assert mask.tolist() == [[True, True, False, False], [True] * 4]


def test_a_group_that_was_pruned_stays_as_it_is():
    first = prune_masks({"w": torch.randn(4, 8)}, 0.25, granularity="2:4")
    second = prune_masks({"w": torch.randn(4, 8)}, 0.5, granularity="2:4", masks=first)["w"]
    assert not (second & ~first["w"]).any()
    assert all(int(kept.sum()) == 2 for kept in groups_of(second, 4))


def test_blocks_go_whole():
    weight = torch.randn(8, 12, 3, 3)
    mask = prune_masks({"w": weight}, 0.5, granularity="4x2")["w"]
    norms = {}
    for o, i in itertools.product(range(0, 8, 4), range(0, 12, 2)):
        block = mask[o : o + 4, i : i + 2]
        assert block.all() or not block.any()
        norms[float(weight[o : o + 4, i : i + 2].abs().sum())] = bool(block.all())
    assert [norms[n] for n in sorted(norms)] == [False] * 6 + [True] * 6


def test_one_channel_is_always_left():
    weights = {"small": torch.full((4, 3), 1e-6), "large": torch.randn(8, 3) + 5}
    masks = prune_masks(weights, 0.5, granularity="channel")
    assert int(masks["small"].any(1).sum()) == 1
    zeros = sum(int((~m).sum()) for m in masks.values())
    assert zeros == 18  # of 36 weights in rows of 3


@pytest.mark.parametrize("name", ["4:2", "0:4", "2:2", "1x1", "0x4", "rows", 4])
def test_unknown_granularities(name):
    with pytest.raises(ValueError, match="Argument `granularity` must be"):
        granularity_of(name)


def test_more_than_the_pattern_has():
    with pytest.raises(ValueError, match=r"at most 0.5 with granularity '2:4', but got 0.6"):
        prune_masks({"w": torch.ones(4, 8)}, 0.6, granularity="2:4")


def test_tensors_that_do_not_divide():
    with pytest.raises(
        ValueError, match=r"units of '2:4', but got `w`: its input channels \(6\) aren't divisible by 4"
    ):
        prune_masks({"w": torch.ones(4, 6)}, 0.5, granularity="2:4")
    with pytest.raises(ValueError, match="`w`: it has one dimension"):
        prune_masks({"w": torch.ones(8)}, 0.5, granularity="channel")


def test_what_does_not_divide_is_left_dense_with_its_reason_unless_it_was_named():
    net = Residual()
    assert set(prunable_parameters(net, granularity="2:4")) == {"conv2.weight", "head.weight"}
    assert left_dense(net, granularity="2:4") == {"conv1.weight": "its input channels (3) aren't divisible by 4"}
    with pytest.raises(ValueError, match=r"`conv1.weight`: its input channels \(3\)"):
        prunable_parameters(net, ("conv*",), granularity="2:4")
    with pytest.raises(ValueError, match="must leave a parameter to prune, but got none: `weight`: its input channels"):
        prunable_parameters(nn.Linear(3, 3), granularity="2:4")


def test_a_target_for_each_glob():
    net = Residual(16)
    masks = prune_weights_(net, {"conv*": 0.75, "head*": 0.25})
    convs = [net.conv1.weight, net.conv2.weight]
    assert sum(int((w == 0).sum()) for w in convs) == round(0.75 * sum(w.numel() for w in convs))
    assert int((net.head.weight == 0).sum()) == round(0.25 * net.head.weight.numel())
    assert set(masks) == {"conv1.weight", "conv2.weight", "head.weight"}


def test_functions_alone_make_2_of_4_on_a_plain_module():
    net = Residual()
    prune_weights_(net, granularity="2:4")
    for weight in (net.conv2.weight, net.head.weight):
        assert all(int(kept.sum()) == 2 for kept in groups_of(weight != 0, 4))
    assert (net.conv1.weight != 0).all()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"sparsity": {"conv*": 0.5, "*": 0.9}}, r"give each weight one target, but got .* for `conv1.weight`"),
        ({"sparsity": {"neck*": 0.5}}, "'neck\\*', which matches none"),
        ({"sparsity": {"conv*": 1.5}}, "share of zeros"),
        ({"sparsity": {}}, "at least one glob"),
        ({"sparsity": None}, "must be a share of zeros with granularity 'weight', but got None"),
        (
            {"sparsity": 0.6, "granularity": "2:4"},
            r"must be 0.5 \(or left out\) with granularity '2:4', which keeps 2 of 4",
        ),
        ({"sparsity": {"conv*": 0.5}, "include": ("head*",)}, "Argument `include` must be None where `sparsity` names"),
    ],
)
def test_targets_that_contradict(arguments, says):
    with pytest.raises(ValueError, match=says):
        SparsityTargets(**arguments).weights(Residual())
