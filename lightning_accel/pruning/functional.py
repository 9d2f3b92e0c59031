"""Pruning without a Trainer: what the callbacks schedule, done once on any module."""

from collections.abc import Mapping, Sequence

import torch

from lightning_accel.globs import as_patterns
from lightning_accel.pruning.choice import Choice
from lightning_accel.pruning.criteria import Criterion
from lightning_accel.pruning.masks import apply_masks_, prune_masks


def prune_weights_(
    module: torch.nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    criterion: str | Criterion = "l1",
    granularity: str = "weight",
    scope: str = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Zero a share of a module's weights in place, once; the callback's work without a Trainer.

    Args:
        module: any module; for ``"taylor"`` with gradients.
        sparsity: as in :class:`WeightPruning`.
        criterion: as in :class:`WeightPruning`.
        granularity: as in :class:`WeightPruning`.
        scope: ``"global"`` or ``"layer"``.
        include: name globs; ``None`` means all weights with two or more dimensions that divide into units.
        exclude: name globs; wins over ``include``.
        generator: for ``"random"``; ``None`` means the global one.

    Returns:
        The masks, by parameter name; ``True`` where the weight stays.

    Raises:
        ValueError: an argument is out of its range, or a glob matches nothing.

    Example:
        >>> masks = prune_weights_(torch.nn.Linear(8, 4), granularity="2:4")
        >>> masks["weight"].reshape(-1, 4).sum(1).unique()
        tensor([2])
    """
    choice = Choice(sparsity, granularity, as_patterns("include", include), as_patterns("exclude", exclude))
    chosen = choice.weights(module)
    masks: dict[str, torch.Tensor] = {}
    for target, names in choice.groups(chosen):
        weights = {name: chosen[name] for name in names}
        masks |= prune_masks(
            weights, target, criterion=criterion, granularity=granularity, scope=scope, generator=generator
        )
    apply_masks_(chosen, masks)
    return masks
