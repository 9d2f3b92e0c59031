"""Criteria of weight pruning: importance of each weight."""

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.criterion import Criterion, FunctionCriterion, WeightScores, checked_scores, find_criterion


def l1(name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """Absolute value of each weight (https://arxiv.org/abs/1506.02626); a group's score is its L1 norm.

    Args:
        name: of the parameter; not used.
        parameter: any shape.
        grad: not used.

    Returns:
        Scores of the same shape; larger is more important.
    """
    return parameter.detach().abs()


def l2(name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """Square of each weight: orders single weights as :func:`l1` does, and groups by their L2 norm."""
    return parameter.detach().square()


def taylor(name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """``(weight * gradient)^2``: first-order estimate of the squared change of the loss when the weight is removed.

    Source: https://arxiv.org/abs/1906.10771, eq. 8.

    Raises:
        InvalidArgumentError: there is no gradient.
    """
    if grad is None:
        raise InvalidArgumentError(
            f"Argument `criterion` must not be 'taylor' before there are gradients, but got no gradient of `{name}`. Start later, "
            "or exclude parameters that the loss doesn't depend on."
        )
    return (parameter.detach() * grad.detach()).square()


class Random(Criterion):
    """Random importance from the global generator; :func:`scores_of` accepts another generator."""

    single = True

    def scores(self, name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
        """Values in (0, 1], drawn again in each call."""
        return drawn_scores(parameter, None)


RANDOM = "random"
CRITERIA: dict[str, Criterion] = {
    "l1": FunctionCriterion(l1, single=True),
    "l2": FunctionCriterion(l2, single=True),
    "taylor": FunctionCriterion(taylor, needs_gradients=True, single=True),
    "magnitude": FunctionCriterion(l1, single=True),
    RANDOM: Random(),
}


def weight_criterion(criterion: str | Criterion | WeightScores) -> Criterion:
    """Look up a criterion of weights: a key of ``CRITERIA``, an import path, a :class:`Criterion` or a function.

    Raises:
        InvalidArgumentError: none of these.
    """
    return find_criterion(criterion, CRITERIA)


def scores_of(
    criterion: str | Criterion | WeightScores,
    name: str,
    parameter: torch.Tensor,
    grad: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Scores of one parameter's weights in float32.

    Args:
        criterion: as for :func:`weight_criterion`.
        name: of the parameter.
        parameter: any shape.
        grad: its gradient, if there is one.
        generator: for ``"random"``; ``None`` means the global one.

    Returns:
        A tensor of the parameter's shape; the lowest are pruned first.

    Raises:
        InvalidArgumentError: the criterion returned another shape.
    """
    if criterion == RANDOM:
        return drawn_scores(parameter, generator)
    return checked_scores(weight_criterion(criterion), name, parameter, grad)


def drawn_scores(parameter: torch.Tensor, generator: torch.Generator | None) -> torch.Tensor:
    """Random scores of a parameter's shape; of a sharded one the whole, so that each rank can take its rows of the same numbers."""
    device = "cpu" if generator is not None else parameter.device
    drawn = torch.rand(parameter.shape, generator=generator, device=device)
    # The same order as torch.nn.utils.prune, which prunes the largest of these numbers; the difference is exact.
    return (1.0 - drawn).to(parameter.device)
