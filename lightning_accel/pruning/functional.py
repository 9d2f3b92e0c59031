"""One-shot pruning of any module, without a Trainer."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from lightning_accel.calls.batches import call_from_batch
from lightning_accel.core import structure
from lightning_accel.core.globs import as_patterns
from lightning_accel.core.structure import Change
from lightning_accel.pruning.channels.plan import ChannelPlan, ChannelTarget
from lightning_accel.pruning.criterion import Criterion, WeightScores
from lightning_accel.pruning.weights.layers import weight_kinds
from lightning_accel.pruning.weights.masks import apply_masks_, prune_masks
from lightning_accel.pruning.weights.targets import SparsityTargets


def prune_weights_(
    module: torch.nn.Module,
    sparsity: float | Mapping[str, float] | None = None,
    *,
    criterion: str | Criterion | WeightScores = "l1",
    granularity: str = "weight",
    scope: str = "global",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    generator: torch.Generator | None = None,
) -> dict[str, torch.Tensor]:
    """Zero a share of a module's weights in place, without a Trainer.

    Args:
        module: any module; for ``"taylor"`` with gradients.
        sparsity: as in :class:`WeightPruning`.
        criterion: as in :class:`WeightPruning`.
        granularity: as in :class:`WeightPruning`.
        scope: ``"global"`` or ``"layer"``.
        include: as in :class:`WeightPruning`.
        exclude: name globs; takes precedence over ``include``.
        generator: for ``"random"``; ``None`` means the global one.

    Returns:
        Masks by parameter name; ``True`` for weights that are kept.

    Raises:
        InvalidArgumentError: an argument is out of its range, or a glob matches nothing.

    Example:
        >>> masks = prune_weights_(torch.nn.Linear(8, 4), granularity="2:4")
        >>> masks["weight"].reshape(-1, 4).sum(1).unique()
        tensor([2])
    """
    targets = SparsityTargets(sparsity, granularity, as_patterns("include", include), as_patterns("exclude", exclude))
    chosen, kinds = targets.weights(module), weight_kinds(module)
    masks: dict[str, torch.Tensor] = {}
    for target, names in targets.groups(chosen):
        weights = {name: chosen[name] for name in names}
        masks |= prune_masks(
            weights,
            target,
            criterion=criterion,
            granularity=granularity,
            scope=scope,
            generator=generator,
            kinds=kinds,
        )
    apply_masks_(chosen, masks)
    return masks


def prune_channels_(
    module: nn.Module,
    example_inputs: Any,
    *,
    pruning_ratio: float | None = None,
    macs_reduction: float | None = None,
    criterion: str | Criterion | WeightScores = "group_norm",
    scope: str = "global",
    round_to: int = 1,
    limits: Mapping[str, float] | None = None,
    include: str | Sequence[str] = (),
    exclude: str | Sequence[str] = (),
) -> Change:
    """Remove channels of a module in place, without a Trainer.

    Args:
        module: any module; its parameters keep their identity, with smaller data.
        example_inputs: arguments of ``forward``: a tuple holds positional arguments, a dict keyword arguments, anything else is
            the only argument. Values of floating-point tensors don't matter.
        pruning_ratio: share of the channels of all prunable groups to remove, in (0, 1); or
        macs_reduction: factor by which MACs are reduced, above 1.
        criterion: as for :class:`ChannelPruning`; those that need gradients read the present ones.
        scope: ``"global"`` or ``"layer"``.
        round_to: channels of a pruned group are a multiple of it.
        limits: glob of layers -> largest share of a group's channels to remove.
        include: globs of layers whose channels may be removed; empty means all.
        exclude: globs of layers whose channels are kept; takes precedence over ``include``.

    Returns:
        Record of the removal, which is also appended to the module's record.

    Raises:
        InvalidArgumentError: an argument is out of its range, a glob matches nothing, or the target can't be reached.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> change = prune_channels_(network, torch.zeros(1, 4), pruning_ratio=0.5)
        >>> network[0].weight.shape
        torch.Size([4, 4])
    """
    chosen = as_patterns("include", include), as_patterns("exclude", exclude)
    target = ChannelTarget(pruning_ratio, macs_reduction, criterion, scope, round_to, dict(limits or {}), *chosen)
    plan = ChannelPlan(module, "", call_from_batch(module, None, lambda _: example_inputs), target)
    collected = plan.collect(module) if target.method.needs_gradients else {}
    change = plan.change(module, plan.choose(module, collected=collected), owner="")
    structure.apply(module, change)
    return change


def plan_channels(
    model: nn.Module, example_inputs: Any, target: ChannelTarget, *, module: str = ""
) -> list[dict[str, Any]]:
    """Predict how many channels each group would lose with the present weights; nothing is changed.

    Args:
        model: any module.
        example_inputs: as for :func:`prune_channels_`.
        target: pruning ratio or MACs reduction, and the rules.
        module: dotted path of the submodule whose ``forward`` is traced; empty means the model itself.

    Returns:
        A row for each group: ``layers``, ``before`` and ``after`` (channels), and why it is ``kept`` (empty if it isn't).
        With a criterion that needs gradients, which are not known yet, the numbers are those of ``"group_norm"``.
    """
    submodule = model.get_submodule(module)
    plan = ChannelPlan(model, module, call_from_batch(submodule, None, lambda _: example_inputs), target)
    chosen, _ = plan.foresee(model)
    return [
        {
            "layers": list(group.layers),
            "before": group.units * group.width,
            "after": (group.units - len(chosen.get(i, ()))) * group.width,
            "kept": group.kept,
        }
        for i, group in enumerate(plan.groups)
    ]
