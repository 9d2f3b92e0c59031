"""Importance of channels: which units of a group matter least."""

from collections.abc import Callable, Mapping

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group

CRITERIA = ("magnitude", "group_norm", "bn_scale", "taylor")


def unit_scores(
    group: Group,
    parameters: Mapping[str, torch.Tensor],
    criterion: str = "group_norm",
    taylor: torch.Tensor | None = None,
) -> torch.Tensor:
    """Score each unit of a group, divided by the group's mean, so that groups of all sizes can be compared.

    - ``"magnitude"``: sum of absolute values of the weights that make the unit's channels (https://arxiv.org/abs/1608.08710).
    - ``"group_norm"``: L2 norm of all parameters that would leave with the unit, in the layers that make its channels, in
      norms, and in the layers that read them (DepGraph, https://arxiv.org/abs/2301.12900, eq. 5).
    - ``"bn_scale"``: sum of absolute scales of its batch norms (network slimming, https://arxiv.org/abs/1708.06519).
    - ``"taylor"``: mean over steps of ``(sum of weight · gradient)²`` over the parameters that make its channels
      (https://arxiv.org/abs/1906.10771, eq. 8), collected with :func:`taylor_scores`.

    Args:
        group: its slices say which parameters are meant.
        parameters: by name, at their present size.
        criterion: one of ``CRITERIA``.
        taylor: for ``"taylor"``, the collected scores, ``(units,)``.

    Returns:
        Shape ``(units,)``, float64, on the CPU; mean 1, or all zero.

    Raises:
        InvalidArgumentError: the criterion isn't known, or the group has nothing that it could be read from.
    """
    check_criterion(criterion)
    if criterion == "taylor":
        if taylor is None:
            raise InvalidArgumentError('Criterion "taylor" needs gradients, but got none.')
        scores = taylor.detach().double().cpu()
    elif criterion == "magnitude":
        scores = _sums(group, parameters, group.produced, lambda t: t.abs())
    elif criterion == "bn_scale":
        if not group.scales:
            raise InvalidArgumentError(
                f'Argument `criterion` must be readable from every group, but got "bn_scale" for `{group.name}`, which has no '
                "batch norm. Exclude it or choose another criterion."
            )
        scores = _sums(group, parameters, group.scales, lambda t: t.abs(), least=1)
    else:
        scores = _sums(group, parameters, frozenset(group.slices), lambda t: t.square(), least=1).sqrt()
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def taylor_scores(group: Group, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
    """``(sum of weight · gradient)²`` of each unit, ``(units,)``, from the gradients that are there; ``None`` without any."""
    products = {name: parameters[name] for name, _ in group.produced if parameters[name].grad is not None}
    if not products:
        return None
    total = None
    for (name, dim), (index, unit) in group.slices.items():
        if (name, dim) in group.produced and name in products:
            parameter = products[name]
            part = _over_others(parameter.detach() * parameter.grad, dim)  # type: ignore[operator]
            total = torch.zeros(group.units, dtype=part.dtype, device=part.device) if total is None else total
            total.index_add_(0, unit.to(part.device), part[index.to(part.device)])
    return None if total is None else total.square()


def check_criterion(criterion: str) -> str:
    """Return ``criterion`` if it is known.

    Raises:
        InvalidArgumentError: it is not.
    """
    if criterion not in CRITERIA:
        raise InvalidArgumentError(f"Argument `criterion` must be one of {list(CRITERIA)}, but got {criterion!r}.")
    return criterion


def _sums(
    group: Group,
    parameters: Mapping[str, torch.Tensor],
    keys: frozenset[tuple[str, int]],
    function: Callable[[torch.Tensor], torch.Tensor],
    least: int = 2,
) -> torch.Tensor:
    """Sum of a function of the entries that belong to each unit, over tensors of ``least`` dimensions or more."""
    total = torch.zeros(group.units, dtype=torch.float64)
    for (name, dim), (index, unit) in group.slices.items():
        if (name, dim) in keys and name in parameters and parameters[name].ndim >= least:
            part = _over_others(function(parameters[name].detach()), dim).cpu()
            total.index_add_(0, unit, part[index])
    return total


def _over_others(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over all dimensions but one, in float64."""
    others = [d for d in range(tensor.ndim) if d != dim]
    return tensor.sum(dim=others, dtype=torch.float64) if others else tensor.double()
