"""Masks: which weights stay. Plain functions over ``{name: tensor}``, usable without a Trainer."""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import nn

from lightning_accel.globs import select
from lightning_accel.pruning.criteria import CRITERIA, check_criterion

SCOPES = ("layer", "global")


def prunable_parameters(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = ()
) -> dict[str, nn.Parameter]:
    """Weights that pruning may zero: trainable, floating point, two or more dimensions (biases and norms have one).

    Args:
        module: any module; tied parameters appear once, under their first name.
        include: name globs; empty means all.
        exclude: name globs; wins over ``include``.

    Raises:
        ValueError: a glob matches nothing, or nothing is left to prune.
    """
    candidates = {
        name: p for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point() and p.ndim >= 2
    }
    names = select(candidates, include, exclude, "prunable parameter")
    if not names:
        raise ValueError("Argument `include` must leave a parameter to prune, but got none: every one is excluded.")
    return {name: candidates[name] for name in names}


def prune_masks(
    weights: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    criterion: str = "magnitude",
    scope: str = "global",
    masks: Mapping[str, torch.Tensor] | None = None,
) -> dict[str, torch.Tensor]:
    """Masks under which a share of the weights is zero.

    The share is absolute: ``round(sparsity * n)`` of ``n`` weights are pruned, in each tensor (``scope="layer"``) or in
    all together (``scope="global"``), counting those that ``masks`` pruned before, which stay pruned.

    Args:
        weights: tensors of any shape by name.
        sparsity: share of zeros in [0, 1].
        criterion: a key of ``CRITERIA``.
        scope: ``"layer"`` or ``"global"``.
        masks: masks in force, as returned by an earlier call.

    Returns:
        Boolean tensors of the weights' shapes; ``True`` where the weight stays.

    Raises:
        ValueError: an argument is out of its range.

    Example:
        >>> prune_masks({"w": torch.tensor([0.1, -3.0, 0.2, 2.0])}, 0.5)["w"]
        tensor([False,  True, False,  True])
    """
    check_sparsity(sparsity)
    check_scope(scope)
    score = CRITERIA[check_criterion(criterion)]
    scores = {}
    for name, weight in weights.items():
        flat = score(weight).reshape(-1)
        if masks is not None and name in masks:  # below every score: once pruned, pruned for good
            flat = flat.masked_fill(~masks[name].reshape(-1), -torch.inf)
        scores[name] = flat
    groups = [list(scores)] if scope == "global" else [[name] for name in scores]
    kept = {}
    for names in groups:
        joined = torch.cat([scores[name] for name in names]) if len(names) > 1 else scores[names[0]]
        keep = torch.ones_like(joined, dtype=torch.bool)
        count = round(sparsity * joined.numel())
        if count:
            keep[torch.topk(joined, count, largest=False, sorted=False).indices] = False
        for name, part in zip(names, keep.split([scores[name].numel() for name in names]), strict=True):
            kept[name] = part.reshape(weights[name].shape).clone()
    return kept


def apply_masks_(weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
    """Zero the pruned weights in place, unseen by autograd."""
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)


def measured_sparsity(tensors: Iterable[torch.Tensor]) -> float:
    """Share of exact zeros, counted over all tensors together; 0 for none."""
    zeros, total = 0, 0
    for tensor in tensors:
        zeros += int(torch.count_nonzero(tensor == 0))
        total += tensor.numel()
    return zeros / total if total else 0.0


def check_sparsity(sparsity: float) -> None:
    """Check a share of zeros.

    Raises:
        ValueError: it is outside [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise ValueError(
            f"Argument `sparsity` must be a share of zeros in [0, 1), but got {sparsity!r}. Write 0.8 for 80 percent."
        )


def check_scope(scope: str) -> None:
    """Check where the least important weights are looked for.

    Raises:
        ValueError: it is not one of ``SCOPES``.
    """
    if scope not in SCOPES:
        raise ValueError(f"Argument `scope` must be one of {list(SCOPES)}, but got {scope!r}.")
