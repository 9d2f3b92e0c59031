"""Criteria of channel pruning: importance of each unit of a group of channels."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group
from lightning_accel.pruning.criterion import Criterion, WeightScores, find_criterion, over_others, unit_sums


class Magnitude(Criterion):
    """Sum of absolute values of the weights that compute the unit's channels (https://arxiv.org/abs/1608.08710)."""

    def unit_scores(self, group: Any, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores ``(units,)`` of a group."""
        return unit_sums(group, lambda n: parameters[n].detach().abs(), _present(group.produced, parameters))


class GroupNorm(Criterion):
    """L2 norm of all parameters that are removed with the unit.

    They are those of the layers that compute its channels, of norms, and of the layers that read them (DepGraph,
    https://arxiv.org/abs/2301.12900, eq. 5).
    """

    def unit_scores(self, group: Any, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores ``(units,)`` of a group."""
        keys = _present(frozenset(group.slices), parameters, dims=1)
        return unit_sums(group, lambda n: parameters[n].detach().square(), keys).sqrt()


class BatchNormScale(Criterion):
    """Sum of absolute scales of the unit's batch norms (network slimming, https://arxiv.org/abs/1708.06519)."""

    def unit_scores(self, group: Any, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Scores ``(units,)`` of a group.

        Raises:
            InvalidArgumentError: the group has no batch norm.
        """
        if not group.scales:
            raise InvalidArgumentError(
                f'Argument `criterion` must be readable from every group, but got "bn_scale" for `{group.name}`, which has no '
                "batch norm. Exclude it or choose another criterion."
            )
        return unit_sums(group, lambda n: parameters[n].detach().abs(), _present(group.scales, parameters, dims=1))


class Taylor(Criterion):
    """Mean over steps of ``(sum of weight · gradient)²`` over the parameters that compute the unit's channels.

    Source: https://arxiv.org/abs/1906.10771, eq. 8.
    """

    needs_gradients = True

    def unit_scores(self, group: Any, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Scores ``(units,)`` of a group from the present gradients; ``None`` without any."""
        return taylor_scores(group, parameters)


CRITERIA: dict[str, Criterion] = {
    "magnitude": Magnitude(),
    "group_norm": GroupNorm(),
    "bn_scale": BatchNormScale(),
    "taylor": Taylor(),
}


def channel_criterion(criterion: str | Criterion | WeightScores) -> Criterion:
    """Look up a criterion of channels: a key of ``CRITERIA``, an import path, a :class:`Criterion` or a function of single weights.

    Raises:
        InvalidArgumentError: none of these.
    """
    return find_criterion(criterion, CRITERIA)


def unit_scores(
    group: Group,
    parameters: Mapping[str, torch.Tensor],
    criterion: str | Criterion | WeightScores = "group_norm",
    collected: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each unit of a group, divided by the group's mean, so that groups of all sizes can be compared.

    Args:
        group: its slices name the parameters.
        parameters: by name, at their present size.
        criterion: as for :func:`channel_criterion`.
        collected: for criteria that need gradients, their scores added up over steps, ``(units,)``.

    Returns:
        Shape ``(units,)``, float64, on the CPU; mean 1, or all zero.

    Raises:
        InvalidArgumentError: the criterion isn't known, doesn't apply to the group, needs gradients and has none, or returned scores
            of another shape or NaN.
    """
    method = channel_criterion(criterion)
    raw = collected if method.needs_gradients else method.unit_scores(group, parameters)
    if raw is None:
        raise InvalidArgumentError(f'Criterion "{label(criterion)}" needs gradients, but got none.')
    if raw.shape != (group.units,) or bool(raw.isnan().any()):
        raise InvalidArgumentError(
            f'Criterion "{label(criterion)}" must give a number for each of the {group.units} units of `{group.name}`, but got '
            f"shape {tuple(raw.shape)}{' with NaN' if bool(raw.isnan().any()) else ''}."
        )
    scores = raw.detach().double().cpu()
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def taylor_scores(group: Group, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """``(sum of weight · gradient)²`` of each unit, ``(units,)``, from the present gradients; ``None`` without any."""
    products = {name: parameters[name] for name, _ in group.produced if parameters[name].grad is not None}
    if not products:
        return None
    total = None
    for (name, dim), (index, unit) in group.slices.items():
        if (name, dim) in group.produced and name in products:
            parameter = products[name]
            part = over_others(parameter.detach() * parameter.grad, dim)  # type: ignore[operator]
            total = torch.zeros(group.units, dtype=part.dtype, device=part.device) if total is None else total
            total.index_add_(0, unit.to(part.device), part[index.to(part.device)])
    return None if total is None else total.square()


def label(criterion: Any) -> str:
    """Name of a criterion for messages."""
    return criterion if isinstance(criterion, str) else getattr(criterion, "__name__", type(criterion).__name__)


def _present(
    keys: frozenset[tuple[str, int]], parameters: Mapping[str, torch.Tensor], dims: int = 2
) -> frozenset[tuple[str, int]]:
    """The keys whose parameter exists and has at least ``dims`` dimensions."""
    return frozenset(key for key in keys if key[0] in parameters and parameters[key[0]].ndim >= dims)
