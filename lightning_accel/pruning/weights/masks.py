"""Compute and apply masks; pure functions over ``{name: tensor}``."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.criterion import Criterion, WeightScores
from lightning_accel.pruning.weights.criteria import RANDOM, scores_of, weight_criterion
from lightning_accel.pruning.weights.granularity import granularity_of
from lightning_accel.pruning.weights.layers import WeightKind
from lightning_accel.pruning.weights.threshold import keep_highest

SCOPES = ("layer", "global")


def prune_masks(
    weights: Mapping[str, torch.Tensor],
    sparsity: float,
    *,
    criterion: str | Criterion | WeightScores = "l1",
    granularity: str = "weight",
    scope: str = "global",
    masks: Mapping[str, torch.Tensor] | None = None,
    grads: Mapping[str, torch.Tensor | None] | None = None,
    generator: torch.Generator | None = None,
    kinds: Mapping[str, WeightKind] | None = None,
) -> dict[str, torch.Tensor]:
    """Masks under which a share of the weights is zero.

    The share is absolute: ``round(sparsity * n)`` of ``n`` weights are pruned, in each tensor (``scope="layer"``) or in
    all together (``scope="global"``), including those pruned by ``masks``, which stay pruned. Units larger than a weight are
    rounded to the nearest number; one channel is always kept in each tensor.

    Args:
        weights: tensors by name; any shape for single weights, ``(O, I, ...)`` else.
        sparsity: share of zeros in [0, 1]; at most that of the pattern for N:M.
        criterion: ``"l1"``, ``"l2"``, ``"taylor"``, ``"random"``, a :class:`~lightning_accel.pruning.criterion.Criterion`, or a function
            ``(name, parameter, grad) -> scores``.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`.
        scope: ``"layer"`` or ``"global"``.
        masks: present masks, from an earlier call.
        grads: gradients by name, for the criteria that need them; default: each tensor's ``grad``.
        generator: for ``"random"``; ``None`` means the global one.
        kinds: layout of tensors that aren't laid out ``(O, I, ...)``, and tensors of which each output channel keeps a weight, from
            :func:`~lightning_accel.pruning.weights.layers.weight_kinds`.

    Returns:
        Boolean tensors of the weights' shapes; ``True`` where the weight stays.

    Raises:
        InvalidArgumentError: an argument is out of its range, or a tensor doesn't divide into the granularity's units.

    Example:
        >>> prune_masks({"w": torch.tensor([0.1, -3.0, 0.2, 2.0])}, 0.5)["w"]
        tensor([False,  True, False,  True])
    """
    check_sparsity(sparsity)
    check_scope(scope)
    weight_criterion(criterion)
    units, kinds = granularity_of(granularity), kinds or {}
    if units.sparsity is not None and sparsity > units.sparsity + 1e-9:
        raise InvalidArgumentError(
            f"Argument `sparsity` must be at most {units.sparsity:g} with granularity {granularity!r}, but got {sparsity}."
        )

    def outputs_first(name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A tensor as ``(O, I, ...)``; the same call takes it back."""
        return tensor.transpose(0, 1) if name in kinds and kinds[name].inputs_first else tensor

    for name, weight in weights.items():
        if units.name != "weight" and (
            reason := "it has one dimension" if weight.ndim < 2 else units.misfit(outputs_first(name, weight).shape)
        ):
            raise InvalidArgumentError(
                f"Argument `weights` must divide into units of {granularity!r}, but got `{name}`: {reason}."
            )
    shapes = {name: outputs_first(name, weight).shape for name, weight in weights.items()}
    rows = {name: len(weight) for name, weight in weights.items() if name in kinds and kinds[name].normed}
    check_reachable(shapes, sparsity, granularity, scope, rows)
    drawn = (
        {n: scores_of(criterion, n, w, generator=generator) for n, w in weights.items()} if criterion == RANDOM else {}
    )

    def scores(name: str) -> torch.Tensor:
        """Scores of single weights, recomputed on each call to save the memory of a second copy of the network."""
        weight = weights[name]
        grad = weight.grad if grads is None else grads.get(name)
        found = drawn[name] if drawn else scores_of(criterion, name, weight, grad)
        masked, normed = masks is not None and name in masks, units.name == "weight" and name in rows
        if (masked or normed) and not (isinstance(criterion, str) and not drawn):  # it isn't a new tensor
            found = found.clone()
        if masks is not None and masked:  # below every score: pruned weights stay pruned
            found.masked_fill_(~masks[name], -torch.inf)
        if normed:  # a channel of zeros has norm 0, by which the layer would divide
            found.flatten(1).scatter_(1, found.flatten(1).argmax(1, keepdim=True), torch.inf)
        return found

    kept = {}
    for names in [list(weights)] if scope == "global" else [[name] for name in weights]:
        if units.name == "weight":
            sizes = [weights[name].numel() for name in names]
            drop = round(sparsity * sum(sizes))
            keeps = keep_highest([lambda name=name: scores(name).reshape(-1) for name in names], sizes, drop)  # type: ignore[misc]
            kept.update({name: keep.reshape(weights[name].shape) for name, keep in zip(names, keeps, strict=True)})
            continue
        parts = [
            (units.unit_scores(outputs_first(name, scores(name))), units.unit_size(shapes[name])) for name in names
        ]
        zeros = sparsity * sum(weights[name].numel() for name in names)
        pruned = _units_that_go(parts, zeros, leave_one=units.dim is not None)
        for name, gone in zip(names, pruned, strict=True):
            stay = units.expand(gone, outputs_first(name, scores(name)))
            kept[name] = outputs_first(name, stay).contiguous()
    return kept


def _units_that_go(parts: list[tuple[torch.Tensor, int]], zeros: float, leave_one: bool) -> list[torch.Tensor]:
    """Select the units with the lowest scores whose number of weights is nearest to ``zeros``.

    Args:
        parts: for each tensor, scores of its units ``(U,)`` and the number of zeros in a pruned unit.
        zeros: number of weights to zero.
        leave_one: whether to keep the best unit of each tensor.

    Returns:
        For each tensor a mask ``(U,)``, ``True`` for pruned units.
    """
    size = parts[0][1]
    if not leave_one and all(other == size for _, other in parts):
        lengths = [len(scores) for scores, _ in parts]
        drop = min(round(zeros / size), sum(lengths))
        return [~keep for keep in keep_highest([lambda s=s: s for s, _ in parts], lengths, drop)]  # type: ignore[misc]
    joined = torch.cat([scores for scores, _ in parts])
    if torch.isnan(joined).any():
        raise InvalidArgumentError("Argument `criterion` must give numbers, but got NaN. Has the training diverged?")
    if leave_one:
        first = 0
        for scores, _ in parts:
            joined[first + int(scores.argmax())] = torch.inf
            first += len(scores)
    order = torch.sort(joined, stable=True).indices
    sizes = torch.cat([torch.full((len(scores),), size) for scores, size in parts])
    cumulated = torch.cat([torch.zeros(1, dtype=torch.int64), sizes[order.cpu()].cumsum(0)])
    spare = len(parts) if leave_one else 0
    count = int((cumulated[: len(cumulated) - spare] - zeros).abs().argmin())
    pruned = torch.zeros(len(order), dtype=torch.bool, device=order.device)
    pruned[order[:count]] = True
    return list(pruned.split([len(scores) for scores, _ in parts]))


def apply_masks_(weights: Mapping[str, torch.Tensor], masks: Mapping[str, torch.Tensor]) -> None:
    """Zero the pruned weights in place, without autograd."""
    if masks:
        with torch.no_grad():
            torch._foreach_mul_([weights[name] for name in masks], list(masks.values()))


def measured_sparsity(tensors: Iterable[torch.Tensor]) -> float:
    """Share of exact zeros over all tensors together; 0 without tensors."""
    return sparsity_by_name(dict(enumerate(tensors)))["all"]


def sparsity_by_name(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, float]:
    """Share of exact zeros of each tensor, and of all together under ``"all"``; 0 without tensors."""
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    zeros = {name: sizes[name] - int(torch.count_nonzero(tensor)) for name, tensor in tensors.items()}
    shares = {name: zeros[name] / size if size else 0.0 for name, size in sizes.items()}
    total = sum(sizes.values())
    return {**shares, "all": sum(zeros.values()) / total if total else 0.0}


def check_reachable(
    shapes: Mapping[str, torch.Size],
    sparsity: float,
    granularity: str,
    scope: str,
    rows: Mapping[str, int] | None = None,
) -> None:
    """Raise if a share of zeros isn't reachable with what has to be kept in each tensor.

    Args:
        shapes: shapes ``(O, I, ...)`` of the tensors by name.
        sparsity: share of zeros.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`; of channels one is kept in each tensor.
        scope: ``"layer"`` or ``"global"``.
        rows: number of rows of the tensors that keep a weight in each row.

    Raises:
        InvalidArgumentError: too few channels, or too few weights in a row.
    """
    units, rows = granularity_of(granularity), rows or {}
    if units.name == "weight" and rows:
        for names in [list(shapes)] if scope == "global" else [[name] for name in shapes]:
            total = sum(shapes[name].numel() for name in names)
            most = total - sum(rows.get(name, 0) for name in names)
            if round(sparsity * total) > most:
                raise InvalidArgumentError(
                    f"Argument `sparsity` must leave a weight in each output channel of layers that divide by its norm, such as "
                    f"`{next(iter(n for n in names if n in rows))}`: at most {most / total:.3f}, but got {sparsity:g}. Exclude them, or "
                    "remove their weight norm."
                )
    if units.dim is None:
        return
    for names in [list(shapes)] if scope == "global" else [[name] for name in shapes]:
        channel = [units.unit_size(shapes[name]) for name in names]
        total = sum(shapes[name].numel() for name in names)
        most = total - sum(channel)
        if sparsity * total > most + min(channel, default=0) / 2:
            where = "in each tensor" if scope == "global" else f"in `{names[0]}`"
            raise InvalidArgumentError(
                f"Argument `sparsity` must leave a channel {where}: at most {most / total:.3f} with granularity "
                f"{granularity!r}, but got {sparsity:g}."
            )


def check_sparsity(sparsity: float) -> None:
    """Check a share of zeros.

    Raises:
        InvalidArgumentError: it is outside [0, 1).
    """
    if isinstance(sparsity, bool) or not isinstance(sparsity, int | float) or not 0.0 <= sparsity < 1.0:
        raise InvalidArgumentError(
            f"Argument `sparsity` must be a share of zeros in [0, 1), but got {sparsity!r}. Write 0.8 for 80 percent."
        )


def check_scope(scope: str) -> None:
    """Check a scope.

    Raises:
        InvalidArgumentError: it is not one of ``SCOPES``.
    """
    if scope not in SCOPES:
        raise InvalidArgumentError(f"Argument `scope` must be one of {list(SCOPES)}, but got {scope!r}.")
