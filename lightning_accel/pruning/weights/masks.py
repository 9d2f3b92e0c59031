"""Compute and apply masks; pure functions over ``{name: tensor}``."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from math import prod
from typing import Any

import torch

from lightning_accel.core.shards import group_of, group_of_all, is_sharded, local, rows_of, sharded_as, total
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.criterion import Criterion, WeightScores
from lightning_accel.pruning.weights.criteria import RANDOM, drawn_scores, scores_of, weight_criterion
from lightning_accel.pruning.weights.granularity import granularity_of
from lightning_accel.pruning.weights.layers import WeightKind
from lightning_accel.pruning.weights.sharded import keep_highest_of_all
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

    Of tensors that are spread over ranks by rows (FSDP2) single weights and N:M patterns are pruned, as if each rank held all of them, by
    criteria that score each weight by itself; the masks are spread alike, and every rank must make the call.

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
    group = group_of_all(weights.values())
    if group is not None:
        check_sharded(criterion, granularity, [name for name in weights if name in kinds and kinds[name].inputs_first])
    shapes = {name: outputs_first(name, weight).shape for name, weight in weights.items()}
    rows = {name: len(weight) for name, weight in weights.items() if name in kinds and kinds[name].normed}
    check_reachable(shapes, sparsity, granularity, scope, rows)
    drawn = (
        {n: local(rows_of(drawn_scores(w, generator), w)) for n, w in weights.items()} if criterion == RANDOM else {}
    )

    def scores(name: str) -> torch.Tensor:
        """Scores of single weights, recomputed on each call to save the memory of a second copy of the network."""
        weight, grad = local(weights[name]), weights[name].grad if grads is None else grads.get(name)
        grad = None if grad is None else local(grad)
        found = drawn[name] if drawn else scores_of(criterion, name, weight, grad)
        masked, normed = masks is not None and name in masks, units.name == "weight" and name in rows
        if (masked or normed) and not (isinstance(criterion, str) and not drawn):  # it isn't a new tensor
            found = found.clone()
        if masks is not None and masked:  # below every score: pruned weights stay pruned
            found.masked_fill_(~local(masks[name]), -torch.inf)
        if normed and found.numel():  # a channel of zeros has norm 0, by which the layer would divide
            found.flatten(1).scatter_(1, found.flatten(1).argmax(1, keepdim=True), torch.inf)
        return found

    def highest(parts: list[Callable[[], torch.Tensor]], sizes: list[int], drop: int) -> list[torch.Tensor]:
        if group is None:
            return keep_highest(parts, sizes, drop)
        return keep_highest_of_all(parts, drop, group)

    kept = {}
    for names in [list(weights)] if scope == "global" else [[name] for name in weights]:
        if units.name == "weight":
            sizes = [weights[name].numel() for name in names]
            drop = round(sparsity * sum(sizes))
            keeps = highest([lambda name=name: scores(name).reshape(-1) for name in names], sizes, drop)  # type: ignore[misc]
            for name, keep in zip(names, keeps, strict=True):
                kept[name] = sharded_as(keep.reshape(local(weights[name]).shape), weights[name])
            continue
        parts = [
            (units.unit_scores(outputs_first(name, scores(name))), units.unit_size(shapes[name])) for name in names
        ]
        zeros = sparsity * sum(weights[name].numel() for name in names)
        most = None if group is None else sum(weights[name].numel() // prod(units.block or (1,)) for name in names)
        pruned = _units_that_go(parts, zeros, highest, most, leave_one=units.dim is not None)
        for name, gone in zip(names, pruned, strict=True):
            stay = units.expand(gone, outputs_first(name, scores(name)))
            kept[name] = sharded_as(outputs_first(name, stay).contiguous(), weights[name])
    return kept


def check_sharded(criterion: Any, granularity: str, inputs_first: Sequence[str] = ()) -> None:
    """Raise unless masks of tensors of which each rank holds rows can be computed.

    Args:
        criterion: must score each weight by itself.
        granularity: its units must lie within rows.
        inputs_first: names of tensors whose rows are input channels.

    Raises:
        InvalidArgumentError: one of these doesn't hold.
    """
    units = granularity_of(granularity)
    if units.name != "weight" and (not units.keep or inputs_first):
        where = f" for `{inputs_first[0]}`, whose rows are input channels" if units.keep else ""
        raise InvalidArgumentError(
            f'Argument `granularity` must be "weight" or N:M where ranks hold rows of a tensor (FSDP2), but got {granularity!r}{where}: a '
            "unit would lie on several ranks. Train with DDP, or exclude such tensors."
        )
    if not weight_criterion(criterion).single:
        raise InvalidArgumentError(
            f"Argument `criterion` must score each weight by itself where each rank holds rows of a tensor (FSDP2), but got {criterion!r}, "
            "which may look at the whole one. If it doesn't, set its attribute `single = True`."
        )


def _units_that_go(
    parts: list[tuple[torch.Tensor, int]],
    zeros: float,
    highest: Callable[[list[Callable[[], torch.Tensor]], list[int], int], list[torch.Tensor]],
    most: int | None,
    leave_one: bool,
) -> list[torch.Tensor]:
    """Select the units with the lowest scores whose number of weights is nearest to ``zeros``.

    Args:
        parts: for each tensor, scores of its units ``(U,)`` and the number of zeros in a pruned unit.
        zeros: number of weights to zero.
        highest: marks the highest of some scores, see :func:`keep_highest`.
        most: number of units that all ranks hold; ``None``: these are all.
        leave_one: whether to keep the best unit of each tensor.

    Returns:
        For each tensor a mask ``(U,)``, ``True`` for pruned units.
    """
    size = parts[0][1]
    if not leave_one and all(other == size for _, other in parts):
        lengths = [len(scores) for scores, _ in parts]
        drop = min(round(zeros / size), sum(lengths) if most is None else most)
        return [~keep for keep in highest([lambda s=s: s for s, _ in parts], lengths, drop)]  # type: ignore[misc]
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
            torch._foreach_mul_([local(weights[name]) for name in masks], [local(mask) for mask in masks.values()])


def measured_sparsity(tensors: Iterable[torch.Tensor]) -> float:
    """Share of exact zeros over all tensors together; 0 without tensors. Collective if they are spread over ranks."""
    return sparsity_by_name(dict(enumerate(tensors)))["all"]


def sparsity_by_name(tensors: Mapping[Any, torch.Tensor]) -> dict[Any, float]:
    """Share of exact zeros of each tensor, and of all together under ``"all"``; 0 without tensors.

    Collective if they are spread over ranks.
    """
    sizes = {name: tensor.numel() for name, tensor in tensors.items()}
    others = {name: int(torch.count_nonzero(local(tensor))) for name, tensor in tensors.items()}
    if any(is_sharded(tensor) for tensor in tensors.values()):
        counted = {name: others[name] if is_sharded(tensor) else 0 for name, tensor in tensors.items()}
        group = next(group_of(tensor) for tensor in tensors.values() if is_sharded(tensor))
        summed = total(torch.tensor(list(counted.values())), group).tolist()
        others |= {name: n for (name, tensor), n in zip(tensors.items(), summed, strict=True) if is_sharded(tensor)}
    zeros = {name: sizes[name] - count for name, count in others.items()}
    shares = {name: zeros[name] / size if size else 0.0 for name, size in sizes.items()}
    every = sum(sizes.values())
    return {**shares, "all": sum(zeros.values()) / every if every else 0.0}


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
            count = sum(shapes[name].numel() for name in names)
            most = count - sum(rows.get(name, 0) for name in names)
            if round(sparsity * count) > most:
                raise InvalidArgumentError(
                    f"Argument `sparsity` must leave a weight in each output channel of layers that divide by its norm, such as "
                    f"`{next(iter(n for n in names if n in rows))}`: at most {most / count:.3f}, but got {sparsity:g}. Exclude them, or "
                    "remove their weight norm."
                )
    if units.dim is None:
        return
    for names in [list(shapes)] if scope == "global" else [[name] for name in shapes]:
        channel = [units.unit_size(shapes[name]) for name in names]
        count = sum(shapes[name].numel() for name in names)
        most = count - sum(channel)
        if sparsity * count > most + min(channel, default=0) / 2:
            where = "in each tensor" if scope == "global" else f"in `{names[0]}`"
            raise InvalidArgumentError(
                f"Argument `sparsity` must leave a channel {where}: at most {most / count:.3f} with granularity "
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
