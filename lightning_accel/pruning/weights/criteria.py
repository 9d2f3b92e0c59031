"""Criteria: how much each weight matters. The least important ones are pruned first."""

from collections.abc import Callable

import torch

from lightning_accel.errors import InvalidArgumentError

Criterion = Callable[..., torch.Tensor]  # (name, parameter, gradient or None) -> scores of the parameter's shape


def l1(name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """Absolute value of each weight (https://arxiv.org/abs/1506.02626); a group's score is its L1 norm.

    Args:
        name: of the parameter; not looked at.
        parameter: any shape.
        grad: not looked at.

    Returns:
        Scores of the same shape; larger is more important.
    """
    return parameter.detach().abs()


def l2(name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """Square of each weight: single weights in the order of :func:`l1`, a group by its L2 norm."""
    return parameter.detach().square()


def taylor(name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
    """``(weight * gradient)^2``: first-order estimate of the loss without the weight (https://arxiv.org/abs/1906.10771, eq. 8).

    Raises:
        InvalidArgumentError: there is no gradient.
    """
    if grad is None:
        raise InvalidArgumentError(
            f"Argument `criterion` must not be 'taylor' before there are gradients, but got no gradient of `{name}`. Start later, "
            "or exclude parameters that the loss doesn't depend on."
        )
    return (parameter.detach() * grad.detach()).square()


CRITERIA: dict[str, Criterion] = {"l1": l1, "l2": l2, "taylor": taylor, "magnitude": l1}
RANDOM = "random"


def scores_of(
    criterion: str | Criterion,
    name: str,
    parameter: torch.Tensor,
    grad: torch.Tensor | None = None,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Scores of one parameter's weights in float32.

    Args:
        criterion: a key of ``CRITERIA``, ``"random"``, or a function ``(name, parameter, grad) -> scores``.
        name: of the parameter.
        parameter: any shape.
        grad: its gradient, if there is one.
        generator: for ``"random"``; ``None`` means the global one.

    Returns:
        A tensor of the parameter's shape; the lowest are pruned first.

    Raises:
        InvalidArgumentError: a function returned another shape, or NaN.
    """
    if criterion == RANDOM:
        drawn = torch.rand(
            parameter.shape, generator=generator, device="cpu" if generator is not None else parameter.device
        )
        return (1.0 - drawn).to(
            parameter.device
        )  # exact: the same order as torch.nn.utils.prune, which prunes the largest
    function = criterion if callable(criterion) else CRITERIA[criterion]
    scores = function(name, parameter, grad)
    if not isinstance(scores, torch.Tensor) or scores.shape != parameter.shape:
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise InvalidArgumentError(
            f"Argument `criterion` must return scores of the parameter's shape {tuple(parameter.shape)}, but got {got} for `{name}`."
        )
    return scores.detach().float()


def check_criterion(criterion: str | Criterion) -> str | Criterion:
    """Return ``criterion`` if it is known.

    Raises:
        InvalidArgumentError: it is not.
    """
    if not callable(criterion) and criterion not in (*CRITERIA, RANDOM):
        raise InvalidArgumentError(
            f"Argument `criterion` must be one of {sorted([*CRITERIA, RANDOM])} or a function `(name, parameter, grad) -> scores`, "
            f"but got {criterion!r}."
        )
    return criterion
