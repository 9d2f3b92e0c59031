"""Weights that a pruning may zero, and the share of zeros that each must reach."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import nn

from lightning_accel.core.globs import select
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.weights.granularity import granularity_of
from lightning_accel.pruning.weights.masks import check_sparsity


def prunable_parameters(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), granularity: str = "weight"
) -> dict[str, nn.Parameter]:
    """Prunable weights: trainable, floating point, two or more dimensions (biases and norms have one).

    Args:
        module: any module; tied parameters appear once, under their first name.
        include: name globs; empty means all that divide into the granularity's units.
        exclude: name globs; takes precedence over ``include``.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`.

    Raises:
        InvalidArgumentError: a glob matches nothing, nothing is left to prune, or a weight in ``include`` doesn't divide into units.
    """
    units = granularity_of(granularity)
    candidates = {
        name: p for name, p in module.named_parameters() if p.requires_grad and p.is_floating_point() and p.ndim >= 2
    }
    names = select(candidates, include, exclude, "prunable parameter")
    misfits = {name: reason for name in names if (reason := units.misfit(candidates[name].shape))}
    if misfits and include:
        name, reason = next(iter(misfits.items()))
        raise InvalidArgumentError(
            f"Argument `include` must name weights that divide into units of {granularity!r}, but got `{name}`: {reason}. "
            "Exclude it."
        )
    chosen = {name: candidates[name] for name in names if name not in misfits}
    if not chosen:
        why = "; ".join(f"`{name}`: {reason}" for name, reason in misfits.items()) or "every one is excluded"
        raise InvalidArgumentError(f"Argument `include` must leave a parameter to prune, but got none: {why}.")
    return chosen


def left_dense(
    module: nn.Module, include: Sequence[str] = (), exclude: Sequence[str] = (), granularity: str = "weight"
) -> dict[str, str]:
    """Reasons why weights that the globs select are not pruned, by name."""
    units = granularity_of(granularity)
    every = {name: p for name, p in module.named_parameters() if p.is_floating_point() and p.ndim >= 2}
    frozen = {name: "it is frozen" for name, p in every.items() if not p.requires_grad}
    chosen = select(every, include, exclude, "prunable parameter") if every else []
    reasons = {name: frozen.get(name) or units.misfit(every[name].shape) for name in chosen}
    return {name: reason for name, reason in reasons.items() if reason}


class SparsityTargets:
    """Name globs and the share of zeros for each.

    Args:
        sparsity: share of zeros in [0, 1), or one for each name glob, or ``None`` for that of an N:M pattern.
        granularity: as in :func:`~lightning_accel.pruning.weights.granularity.granularity_of`.
        include: name globs; empty means all weights with two or more dimensions that divide into units.
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
        """Weights of a module to prune, by name.

        Raises:
            InvalidArgumentError: a glob matches nothing, nothing is left, or two targets match one weight.
        """
        chosen = prunable_parameters(module, self.include, self.exclude, self.granularity)
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
