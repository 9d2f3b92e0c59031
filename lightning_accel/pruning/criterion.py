"""Criterion protocol of weight pruning and channel pruning."""

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, Protocol

import torch

from lightning_accel.errors import InvalidArgumentError

WeightScores = Callable[[str, torch.Tensor, torch.Tensor | None], torch.Tensor]


class Units(Protocol):
    """Channels that are removed in units, see :class:`~lightning_accel.pruning.channels.groups.Group`."""

    @property
    def units(self) -> int:
        """Number of units."""

    @property
    def slices(self) -> Mapping[tuple[str, int], tuple[torch.Tensor, torch.Tensor]]:
        """Parameter name and dimension -> indices in that dimension, and the unit that each index belongs to."""


class Criterion:
    """Importance of weights and of channels; the least important are pruned first.

    A subclass implements :meth:`scores` for single weights. :class:`~lightning_accel.ChannelPruning` adds them up for each channel, unless
    the subclass implements :meth:`unit_scores`. A function ``(name, parameter, grad) -> scores`` may be passed in the place of a
    criterion.

    Attributes:
        needs_gradients: whether the scores depend on gradients. They are then computed after each backward pass and averaged over
            steps, and pruning can't begin before the first step.
        single: whether the score of a weight depends on that weight and its gradient alone, so that it can be computed where only rows of
            the parameter are (FSDP2).

    Example:
        >>> class Magnitude(Criterion):
        ...     def scores(self, name, parameter, grad=None):
        ...         return parameter.detach().abs()
        >>> Magnitude().scores("weight", torch.tensor([-2.0, 1.0]))
        tensor([2., 1.])
    """

    needs_gradients = False
    single = False

    def scores(self, name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
        """Score each weight of a parameter.

        Args:
            name: of the parameter.
            parameter: any shape.
            grad: its gradient; ``None`` if there is none.

        Returns:
            A tensor of the parameter's shape; larger is more important.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `scores`.")

    def unit_scores(self, group: Units, parameters: Mapping[str, torch.Tensor]) -> torch.Tensor | None:
        """Score each unit of a group of channels: the sum of :meth:`scores` over all weights that are removed with the unit.

        Parameters with one dimension (biases and norms) don't count.

        Args:
            group: units and the parameters that they are slices of.
            parameters: by name; their ``grad`` is read.

        Returns:
            Shape ``(units,)``, float64, on the CPU; ``None`` if the criterion needs gradients and there are none.

        Raises:
            InvalidArgumentError: scores of another shape than the parameter's.
        """
        usable = {
            n: p for n, p in parameters.items() if p.ndim >= 2 and (p.grad is not None or not self.needs_gradients)
        }
        if not any(name in usable for name, _ in group.slices):
            return None if self.needs_gradients else torch.zeros(group.units, dtype=torch.float64)
        return unit_sums(group, lambda name: checked_scores(self, name, usable[name], usable[name].grad), usable)


class FunctionCriterion(Criterion):
    """A function ``(name, parameter, grad) -> scores`` as a criterion.

    Args:
        function: returns a tensor of the parameter's shape.
        needs_gradients: ``None`` reads the attribute ``needs_gradients`` of the function, by default ``False``.
        single: the same for the attribute ``single``.
    """

    def __init__(self, function: WeightScores, needs_gradients: bool | None = None, single: bool | None = None) -> None:
        self.function = function
        self.single = bool(getattr(function, "single", False) if single is None else single)
        declared = getattr(function, "needs_gradients", False)
        self.needs_gradients = bool(declared if needs_gradients is None else needs_gradients)

    def scores(self, name: str, parameter: torch.Tensor, grad: torch.Tensor | None = None) -> torch.Tensor:
        """Scores of the parameter's shape."""
        return self.function(name, parameter, grad)

    def __repr__(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)


def find_criterion(criterion: Any, known: Mapping[str, Criterion]) -> Criterion:
    """Look up a criterion.

    Args:
        criterion: a name in ``known``, an import path ``"package.module.name"``, a :class:`Criterion`, or a function
            ``(name, parameter, grad) -> scores``.
        known: criteria by name.

    Raises:
        InvalidArgumentError: none of these.
    """
    found = criterion
    if isinstance(criterion, str):
        found = known.get(criterion) or _imported(criterion)
    if isinstance(found, type) and issubclass(found, Criterion):
        found = found()
    if isinstance(found, Criterion):
        return found
    if callable(found):
        return FunctionCriterion(found)
    raise InvalidArgumentError(
        f"Argument `criterion` must be one of {sorted(known)}, a Criterion or a function `(name, parameter, grad) -> scores`, but got "
        f"{criterion!r}."
    )


def checked_scores(criterion: Criterion, name: str, parameter: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
    """Scores of a parameter's weights in float32, of the parameter's shape.

    Raises:
        InvalidArgumentError: the criterion returned something else.
    """
    scores = criterion.scores(name, parameter, grad)
    if not isinstance(scores, torch.Tensor) or scores.shape != parameter.shape:
        got = tuple(scores.shape) if isinstance(scores, torch.Tensor) else type(scores).__name__
        raise InvalidArgumentError(
            f"Argument `criterion` must return scores of the parameter's shape {tuple(parameter.shape)}, but got {got} for `{name}`."
        )
    return scores.detach().float()


def unit_sums(
    group: Units, values: Callable[[str], torch.Tensor], keys: Mapping[str, Any] | frozenset[tuple[str, int]]
) -> torch.Tensor:
    """Sum values of single weights over the weights of each unit.

    Args:
        group: the units.
        values: parameter name -> tensor of the parameter's shape.
        keys: the parameters to sum over, by name or by name and dimension.

    Returns:
        Shape ``(units,)``, float64, on the CPU.
    """
    total = torch.zeros(group.units, dtype=torch.float64)
    for (name, dim), (index, unit) in group.slices.items():
        if name in keys or (name, dim) in keys:
            total.index_add_(0, unit, over_others(values(name), dim).cpu()[index])
    return total


def over_others(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """Sum over all dimensions but one, in float64."""
    others = [d for d in range(tensor.ndim) if d != dim]
    return tensor.sum(dim=others, dtype=torch.float64) if others else tensor.double()


def _imported(path: str) -> Any:
    """What an import path names; ``None`` if it names nothing."""
    module, _, name = path.rpartition(".")
    try:
        return getattr(import_module(module), name) if module else None
    except (ImportError, AttributeError):
        return None
