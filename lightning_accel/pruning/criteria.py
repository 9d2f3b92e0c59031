"""Criteria: how much each weight matters. The least important ones are pruned first."""

from collections.abc import Callable

import torch

Criterion = Callable[[torch.Tensor], torch.Tensor]


def magnitude(weight: torch.Tensor) -> torch.Tensor:
    """Absolute value of each weight (https://arxiv.org/abs/1506.02626).

    Args:
        weight: any shape.

    Returns:
        Scores of the same shape; larger is more important.
    """
    return weight.detach().abs()


CRITERIA: dict[str, Criterion] = {"magnitude": magnitude}


def check_criterion(criterion: str) -> str:
    """Return ``criterion`` if it is known.

    Raises:
        ValueError: it is not.
    """
    if criterion not in CRITERIA:
        raise ValueError(f"Argument `criterion` must be one of {sorted(CRITERIA)}, but got {criterion!r}.")
    return criterion
