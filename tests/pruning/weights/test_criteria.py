import lightning as L
import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.pruning.criterion import Criterion
from lightning_accel.pruning.weights.criteria import scores_of
from lightning_accel.pruning.weights.masks import prune_masks


def layer(shape=(16, 8, 3, 3)):
    made = nn.Linear(2, 2)
    made.weight = nn.Parameter(torch.randn(shape))
    return made


@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.5, 0.83])
@pytest.mark.parametrize("shape", [(40, 30), (16, 8, 3, 3)])
def test_random_masks_equal_those_of_torch(shape, sparsity):
    one = layer(shape)
    torch.manual_seed(5)
    ours = prune_masks({"w": one.weight}, sparsity, criterion="random")["w"]
    torch.manual_seed(5)
    prune.random_unstructured(one, "weight", amount=sparsity)
    assert torch.equal(ours, one.weight_mask.bool())


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
@pytest.mark.parametrize(("norm", "criterion"), [(1, "l1"), (2, "l2")])
@pytest.mark.parametrize(("dim", "granularity"), [(0, "channel"), (1, "input_channel")])
def test_channel_masks_equal_ln_structured(dim, granularity, norm, criterion, sparsity):
    one = layer()
    ours = prune_masks({"w": one.weight}, sparsity, criterion=criterion, granularity=granularity)["w"]
    prune.ln_structured(one, "weight", amount=sparsity, n=norm, dim=dim)
    assert torch.equal(ours, one.weight_mask.bool())


def test_a_generator_gives_the_same_masks_again_and_leaves_the_global_one_alone():
    weights, state = {"a": torch.randn(50), "b": torch.randn(70)}, torch.get_rng_state()
    first, again = (
        prune_masks(weights, 0.5, criterion="random", generator=torch.Generator().manual_seed(1)) for _ in range(2)
    )
    assert all(torch.equal(first[n], again[n]) for n in weights)
    assert torch.equal(torch.get_rng_state(), state)


def test_taylor_prunes_what_the_loss_depends_on_least():
    # f(w) = w . x: without w_i the loss changes by exactly w_i x_i.
    w, x = torch.tensor([3.0, 0.1, -2.0, 1.0], requires_grad=True), torch.tensor([0.01, 5.0, 1.0, -0.2])
    (w * x).sum().backward()
    change = (w * x).detach().abs()
    kept = prune_masks({"w": w}, 0.5, criterion="taylor")["w"]
    assert set(kept.nonzero()[:, 0].tolist()) == set(change.topk(2).indices.tolist())


def test_taylor_without_gradients():
    with pytest.raises(ValueError, match=r"must not be 'taylor' before there are gradients.*`w`"):
        prune_masks({"w": torch.ones(4)}, 0.5, criterion="taylor")


def test_a_function_of_name_parameter_and_gradient():
    asked = []

    def last_first(name, parameter, grad):
        asked.append((name, grad))
        return -torch.arange(parameter.numel(), dtype=torch.float64).reshape(parameter.shape)

    kept = prune_masks({"w": torch.ones(2, 3)}, 0.5, criterion=last_first)["w"]
    assert kept.tolist() == [[True, True, True], [False, False, False]]
    assert set(asked) == {("w", None)}


@pytest.mark.parametrize(
    ("scores", "says"),
    [
        (lambda n, p, g: p.sum(), r"parameter's shape \(4,\), but got \(\)"),
        (lambda n, p, g: None, "but got NoneType for `w`"),
        (lambda n, p, g: p * torch.nan, "must give numbers, but got NaN"),
    ],
)
def test_functions_that_give_no_scores(scores, says):
    with pytest.raises(ValueError, match=says):
        prune_masks({"w": torch.ones(4)}, 0.5, criterion=scores)


def test_scores_are_float32_whatever_the_weights_are():
    assert scores_of("l1", "w", torch.ones(3, dtype=torch.bfloat16)).dtype is torch.float32


class Reversed(Criterion):
    """The largest weights are the least important."""

    def scores(self, name, parameter, grad=None):
        return -parameter.detach().abs()


def smallest_gradient_first(name, parameter, grad):
    return grad.abs()


smallest_gradient_first.needs_gradients = True


@pytest.mark.parametrize("criterion", [Reversed(), Reversed, "tests.pruning.weights.test_criteria.Reversed"])
def test_a_criterion_as_an_object_a_class_or_an_import_path(criterion):
    kept = prune_masks({"w": torch.tensor([0.1, -3.0, 0.2, 2.0])}, 0.5, criterion=criterion)["w"]
    assert kept.tolist() == [True, False, True, False]


@pytest.mark.parametrize("criterion", ["tests.pruning.weights.test_criteria.missing", "no_such_package.x", "L1", 3])
def test_what_is_no_criterion_is_refused(criterion):
    with pytest.raises(ValueError, match=r"Argument `criterion` must be one of \['l1', .*, but got"):
        prune_masks({"w": torch.ones(4)}, 0.5, criterion=criterion)
    with pytest.raises(
        (ValueError, TypeError), match=r"Argument `criterion` must be (one of \['l1', .*|a string.*), but got"
    ):
        la.WeightPruning(0.5, criterion=criterion)


def test_a_function_that_needs_gradients_gets_those_of_the_steps(trainer):
    """With weights of 1 and inputs of different size, the gradients alone tell which weights go."""

    class Linear(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 1, bias=False)
            nn.init.ones_(self.layer.weight)

        def forward(self, x):
            return self.layer(x)

        def training_step(self, batch, batch_idx):
            return self(batch).sum()

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 1e-9)

    module, data = Linear(), DataLoader(torch.tensor([[3.0, 1.0, 4.0, 2.0]]).repeat(4, 1), 1)
    pruning = la.WeightPruning(0.5, criterion=smallest_gradient_first, start=1, end=1, schedule="constant")
    trainer(pruning, max_epochs=2).fit(module, data)
    assert pruning.masks["layer.weight"].tolist() == [[True, False, True, False]]
    with pytest.raises(ValueError, match="must leave a step before the first pruning with criterion"):
        trainer(la.WeightPruning(0.5, criterion=smallest_gradient_first, schedule="constant")).fit(Linear(), data)
