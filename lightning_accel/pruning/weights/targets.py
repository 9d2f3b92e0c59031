"""Weights that a pruning may zero, and the share of zeros that each must reach."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import nn

from lightning_accel.core.globs import select
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.weights.granularity import granularity_of
from lightning_accel.pruning.weights.layers import ADAPTER, WeightKind, weight_kinds
from lightning_accel.pruning.weights.masks import check_sparsity

FROZEN = "it is frozen"


def selected_parameters(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), granularity: str = "weight"
) -> dict[str, nn.Parameter]:
    """Weights that the globs select and that can be pruned, trainable or frozen.

    Args:
        module: any module; tied parameters appear once, under their first name.
        include: name globs; empty means the weights of layers that divide into the granularity's units. A glob selects the weights
            of layers that it matches; if it matches none, the other floating-point parameters with two or more dimensions.
        exclude: name globs; takes precedence over ``include``.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`.

    Raises:
        InvalidArgumentError: a glob matches nothing, nothing is left to prune, or a weight in ``include`` can't be pruned or doesn't divide
            into units.
    """
    kinds, named = weight_kinds(module), dict(module.named_parameters())
    names = _selected(kinds, include, exclude)
    misfits = {name: reason for name in names if (reason := _misfit(kinds[name], named[name].shape, granularity))}
    if misfits and include:
        name, reason = next(iter(misfits.items()))
        raise InvalidArgumentError(
            f"Argument `include` must name weights that divide into units of {granularity!r}, but got `{name}`: {reason}. "
            "Exclude it."
        )
    if adapters := _adapters_only(kinds, named, names):
        raise InvalidArgumentError(
            f"Argument `include` must name weights that train beside adapters, but got {list(include) or None}: {summary(adapters)} train, "
            "and most of the weights to prune are frozen. Zeros in an adapter are lost when it is merged. Merge the adapters into their "
            "layers and train those, or name what is to be pruned."
        )
    chosen = {name: named[name] for name in names if name not in misfits}
    if not chosen:
        other = {name: kind.reason for name, kind in kinds.items() if kind.reason}
        why = "; ".join(f"`{name}`: {reason}" for name, reason in [*misfits.items(), *other.items()][:6])
        raise InvalidArgumentError(
            f"Argument `include` must leave a parameter to prune, but got none: {why or 'every one is excluded'}."
        )
    return chosen


def prunable_parameters(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), granularity: str = "weight"
) -> dict[str, nn.Parameter]:
    """Weights that the globs select, that can be pruned, and that are trained: frozen ones stay as they are.

    Args:
        module: any module; tied parameters appear once, under their first name.
        include: as for :func:`selected_parameters`.
        exclude: name globs; takes precedence over ``include``.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`.

    Raises:
        InvalidArgumentError: as for :func:`selected_parameters`, or all of them are frozen.
    """
    selected = selected_parameters(module, include, exclude, granularity)
    chosen = {name: p for name, p in selected.items() if p.requires_grad}
    if not chosen:
        raise InvalidArgumentError(
            f"Argument `include` must leave a parameter to prune, but got none: {summary(list(selected))} are frozen. Set "
            "`requires_grad` of the weights to prune."
        )
    return chosen


def left_dense(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), granularity: str = "weight"
) -> dict[str, str]:
    """Reasons why parameters with two or more dimensions that the globs match are not pruned, by name."""
    kinds, named = weight_kinds(module), dict(module.named_parameters())
    selected = set(_selected(kinds, include, exclude))
    matched = select(kinds, include, exclude, "prunable parameter") if kinds else []
    reasons = {}
    for name in matched:
        reason = _misfit(kinds[name], named[name].shape, granularity) if name in selected else kinds[name].reason
        if name in selected and not named[name].requires_grad:
            reason = reason or FROZEN
        if reason:
            reasons[name] = reason
    return reasons


def summary(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    shown = ", ".join(f"`{name}`" for name in names[:3])
    return shown + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _selected(kinds: Mapping[str, WeightKind], include: Sequence[str], exclude: Sequence[str]) -> list[str]:
    """Names of the parameters that the globs select."""
    select(kinds, include, exclude, "prunable parameter")  # raises for a glob that matches nothing
    layers = [name for name, kind in kinds.items() if not kind.reason]
    chosen = set() if include else set(layers)
    for glob in include:
        named = [name for name in kinds if fnmatchcase(name, glob)]
        chosen |= set(named).intersection(layers) or set(named)
    return [name for name in kinds if name in chosen and not any(fnmatchcase(name, glob) for glob in exclude)]


def _misfit(kind: WeightKind, shape: torch.Size, granularity: str) -> str:
    """Reason why a weight can't be pruned in units of ``granularity``; empty if it can."""
    units = granularity_of(granularity)
    if kind.refusal or units.name == "weight":
        return kind.refusal
    if kind.inputs_first and kind.groups > 1:
        return "it is a grouped transposed convolution, which has no such units"
    if kind.normed and not units.keep:
        return "its layer divides by the norm of each output channel, which must not be 0"
    return units.misfit(outputs_first(shape) if kind.inputs_first else shape)


def outputs_first(shape: torch.Size) -> torch.Size:
    """Shape ``(O, I, ...)`` of a weight that is laid out ``(I, O, ...)``."""
    return torch.Size([shape[1], shape[0], *shape[2:]])


def _adapters_only(
    kinds: Mapping[str, WeightKind], named: Mapping[str, nn.Parameter], names: Sequence[str]
) -> list[str]:
    """Adapters that train while most of the named weights are frozen; none if those train, too."""
    adapters = [name for name, kind in kinds.items() if kind.reason == ADAPTER and named[name].requires_grad]
    frozen = sum(named[name].numel() for name in names if not named[name].requires_grad)
    return adapters if frozen > sum(named[name].numel() for name in names) / 2 else []


class SparsityTargets:
    """Name globs and the share of zeros for each.

    Args:
        sparsity: share of zeros in [0, 1), or one for each name glob, or ``None`` for that of an N:M pattern.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`.
        include: name globs, as for :func:`selected_parameters`.
        exclude: name globs; takes precedence over ``include``.

    Raises:
        InvalidArgumentError: a share outside [0, 1), one that contradicts an N:M pattern, or none for a granularity that has none.
    """

    def __init__(
        self,
        sparsity: float | Mapping[str, float] | None,
        granularity: str = "weight",
        include: tuple[str, ...] = (),
        exclude: tuple[str, ...] = (),
    ) -> None:
        self.granularity, self.include, self.exclude = granularity, include, exclude
        self.by_glob = isinstance(sparsity, Mapping)
        self.shares = _targets(sparsity, granularity, include)
        if self.by_glob:
            self.include = tuple(self.shares)

    def weights(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Weights of a module to prune, by name: those of :meth:`selected` that are trained.

        Raises:
            InvalidArgumentError: a glob matches nothing, nothing is left, or two targets match one weight.
        """
        self.selected(module)  # raises for targets that overlap
        return prunable_parameters(module, self.include, self.exclude, self.granularity)

    def selected(self, module: nn.Module) -> dict[str, nn.Parameter]:
        """Weights of a module to prune, by name; frozen ones, too, which may train later.

        Raises:
            InvalidArgumentError: a glob matches nothing, nothing is left, or two targets match one weight.
        """
        chosen = selected_parameters(module, self.include, self.exclude, self.granularity)
        for name in chosen if self.by_glob else ():
            mine = {glob: share for glob, share in self.shares.items() if fnmatchcase(name, glob)}
            if len(set(mine.values())) > 1:
                raise InvalidArgumentError(
                    f"Argument `sparsity` must give each weight one target, but got {mine} for `{name}`. Use globs that don't overlap."
                )
        return chosen

    def left_dense(self, module: nn.Module) -> dict[str, str]:
        """Reasons why weights that the globs select are not pruned, by name."""
        return left_dense(module, self.include, self.exclude, self.granularity)

    def groups(self, names: Iterable[str]) -> list[tuple[float, list[str]]]:
        """Group names by target; weights of one glob are compared with each other."""
        left, groups = list(names), []
        for glob, share in self.shares.items():
            mine = [name for name in left if not self.by_glob or fnmatchcase(name, glob)]
            left = [name for name in left if name not in mine]
            groups += [(share, mine)] if mine else []
        return groups


def _targets(
    sparsity: float | Mapping[str, float] | None, granularity: str, include: tuple[str, ...]
) -> dict[str, float]:
    """Target by name glob; ``"*"`` for a single one."""
    pattern = granularity_of(granularity).sparsity
    if isinstance(sparsity, Mapping):
        if include:
            raise InvalidArgumentError(
                f"Argument `include` must be None where `sparsity` names the weights, but got {list(include)}."
            )
        if not sparsity:
            raise InvalidArgumentError(
                "Argument `sparsity` must hold a target for at least one glob, but got an empty dict."
            )
        targets = dict(sparsity)
    elif sparsity is None and pattern is None:
        raise InvalidArgumentError(
            f"Argument `sparsity` must be a share of zeros with granularity {granularity!r}, but got None."
        )
    else:
        targets = {"*": pattern if sparsity is None else sparsity}  # type: ignore[dict-item]
    for share in targets.values():
        check_sparsity(share)
        if pattern is not None and abs(share - pattern) > 1e-9:
            raise InvalidArgumentError(
                f"Argument `sparsity` must be {pattern:g} (or left out) with granularity {granularity!r}, which keeps "
                f"{granularity.replace(':', ' of ')}, but got {share}."
            )
    return targets
