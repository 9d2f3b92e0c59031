"""Plan of a channel pruning: groups, target, and the units to remove."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import ceil, floor, gcd
from typing import Any

import torch
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.calls.copies import count_macs, few_samples, parameter_count, skeleton
from lightning_accel.core import structure
from lightning_accel.core.structure import Change
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.pruning.channels.criteria import channel_criterion, unit_scores
from lightning_accel.pruning.channels.equivalence import find_groups
from lightning_accel.pruning.channels.groups import Group, channel_count
from lightning_accel.pruning.channels.latency import counts_of
from lightning_accel.pruning.channels.latency_target import LatencyTarget
from lightning_accel.pruning.channels.selection import Block, fewest, removal_order, shares_of, units_of
from lightning_accel.pruning.channels.slices import Removal, follow, removal_of, removed
from lightning_accel.pruning.channels.step_trials import StepTrials
from lightning_accel.pruning.criterion import Criterion, WeightScores
from lightning_accel.pruning.weights.masks import check_scope

KIND = "remove_channels"


@dataclass(frozen=True)
class ChannelTarget:
    """Target of a channel pruning, and rules for the selection of channels.

    Args:
        pruning_ratio: share of the channels of all prunable groups to remove, in (0, 1); or
        macs_reduction: factor by which MACs are reduced, above 1; or
        latency_reduction: factor by which latency is reduced, above 1.
        criterion: ``"group_norm"``, ``"magnitude"``, ``"bn_scale"``, ``"taylor"``, a
            :class:`~lightning_accel.pruning.criterion.Criterion`, or a function ``(name, parameter, grad) -> scores``.
        scope: ``"global"`` or ``"layer"``.
        round_to: channels of a pruned group are a multiple of it.
        limits: glob of layers -> largest share of a group's channels to remove.
        include: globs of layers whose channels may be removed; empty means all.
        exclude: globs of layers whose channels are kept; takes precedence over ``include``.

    Raises:
        InvalidArgumentError: an argument is out of its range.
    """

    pruning_ratio: float | None = None
    macs_reduction: float | None = None
    criterion: str | Criterion | WeightScores = "group_norm"
    scope: str = "global"
    round_to: int = 1
    limits: Mapping[str, float] = field(default_factory=dict)
    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    latency_reduction: float | None = None

    def __post_init__(self) -> None:
        ratio = self.pruning_ratio
        names = ("pruning_ratio", "macs_reduction", "latency_reduction")
        given = [f"{name}={getattr(self, name)}" for name in names if getattr(self, name) is not None]
        if len(given) != 1:
            raise InvalidArgumentError(
                "Exactly one of `pruning_ratio`, `macs_reduction` and `latency_reduction` must be given, but got "
                f"{' and '.join(given) or 'none'}."
            )
        if ratio is not None and (isinstance(ratio, bool) or not isinstance(ratio, int | float) or not 0 < ratio < 1):
            raise InvalidArgumentError(
                f"Argument `pruning_ratio` must be a share of channels in (0, 1), but got {ratio!r}. Write 0.5 for half of them."
            )
        for name, what in (("macs_reduction", "MACs"), ("latency_reduction", "latency")):
            factor = getattr(self, name)
            if factor is not None and (
                isinstance(factor, bool) or not isinstance(factor, int | float) or not 1 < factor < float("inf")
            ):
                raise InvalidArgumentError(
                    f"Argument `{name}` must be a factor above 1, but got {factor!r}. Write 2.0 for half of the {what}."
                )
        channel_criterion(self.criterion)
        check_scope(self.scope)
        if isinstance(self.round_to, bool) or not isinstance(self.round_to, int) or self.round_to < 1:
            raise InvalidArgumentError(
                f"Argument `round_to` must be a number of channels >= 1, but got {self.round_to!r}."
            )
        for glob, share in self.limits.items():
            if isinstance(share, bool) or not isinstance(share, int | float) or not 0 <= share <= 1:
                raise InvalidArgumentError(
                    f"Argument `limits` must map globs to shares in [0, 1], but got {share!r} for {glob!r}."
                )

    @property
    def method(self) -> Criterion:
        """The criterion that ``criterion`` names."""
        return channel_criterion(self.criterion)


class ChannelPlan:
    """Groups of a module, and the removals that reach a target.

    Args:
        module: module to prune.
        path: dotted path of the submodule whose ``forward`` is traced; empty for the module itself.
        call: example arguments of that ``forward``.
        target: absolute target, relative to the module before any removal.
        steps: trial runs of the user's steps; ``None`` outside of a run.

    Raises:
        InvalidArgumentError: no channel can be removed, a glob matches nothing, or the target can't be reached.
    """

    def __init__(
        self, module: nn.Module, path: str, call: Call, target: ChannelTarget, steps: StepTrials | None = None
    ) -> None:
        self.target, self._path = target, path
        self.latency: LatencyTarget | None = None
        self._call = few_samples(call, module.get_submodule(path))
        self.groups = find_groups(module, call, path, target.include, target.exclude)
        if steps is not None:
            self.groups = steps.kept(self.groups)
        earlier = [c.args["original"] for c in structure.record_of(module) if c.kind == KIND]
        self.original: dict[str, Any] = earlier[0] if earlier else self._measure(module)
        units = self.original["units"]
        self.groups = [replace(g, original=max(units.get(g.name, 0), g.units)) for g in self.groups]
        self._check(module)

    def _check(self, module: nn.Module) -> None:
        self._shares = shares_of(self.groups, self.target.limits)
        open_ = [g for g in self.groups if not g.kept]
        if not open_:
            kept = (
                "; ".join(f"`{g.name}`: {g.kept}" for g in self.groups[:8]) or "it has no convolution or linear layer"
            )
            raise InvalidArgumentError(f"Channel pruning must find channels that may leave, but got none ({kept}).")
        if not self.target.method.needs_gradients:  # raises if the criterion doesn't apply to one of the groups
            for group in open_:
                unit_scores(group, dict(module.named_parameters()), self.target.criterion)
        if self.target.latency_reduction is not None:
            return  # known once the latency is, see `aim`
        scores = [torch.zeros(g.units) for g in self.groups]
        most = removal_order(self.groups, scores, self.target.scope, self.target.round_to, self._shares)
        if self._reached(module, 1.0)(most):
            return
        rules = "with at least `round_to` channels left in each group, `limits` and what is kept"
        if self.target.pruning_ratio is not None:
            share = self._gone(most) / self._total
            raise InvalidArgumentError(
                f"Argument `pruning_ratio` must be reachable {rules}: at most {share:.3f}, but got {self.target.pruning_ratio}."
            )
        least = self._counter(module)(most)
        raise InvalidArgumentError(
            f"Argument `macs_reduction` must be reachable {rules}: at most {self.original['macs'] / max(least, 1):.2f}, but got "
            f"{self.target.macs_reduction}."
        )

    def aim(self, latency: LatencyTarget) -> None:
        """Take a latency as the target.

        Raises:
            InvalidArgumentError: it can't be reached.
        """
        latency.check(self.groups, self._least)
        self.latency = latency

    def calibrate(self, module: nn.Module, measure: Callable[[Mapping[str, int]], float]) -> float:
        """Correct the table of the latency target by measurements, see :meth:`LatencyTarget.calibrate`."""
        assert self.latency is not None
        return self.latency.calibrate(self.groups, self._known_scores(module), self._least, measure)

    def latency_counts(self) -> dict[str, list[int]]:
        """Numbers of units of each group that may lose some, for a table."""
        pairs = zip(self.groups, self._least, strict=True)
        return {g.name: counts_of(g, self._step(g), least) for g, least in pairs if not g.kept}

    @property
    def _least(self) -> list[int]:
        """Smallest number of units of each group."""
        return [
            max(min(self._step(g), g.units), g.original - floor(share * g.original + 1e-9))
            for g, share in zip(self.groups, self._shares, strict=True)
        ]

    def _step(self, group: Group) -> int:
        """Units of a group that are a multiple of `round_to` channels."""
        return self.target.round_to // gcd(self.target.round_to, group.width)

    def _known_scores(self, module: nn.Module) -> list[torch.Tensor]:
        """Scores that need no gradients: those of the criterion, or of `group_norm`."""
        criterion = "group_norm" if self.target.method.needs_gradients else self.target.criterion
        parameters = dict(module.named_parameters())
        return [torch.zeros(g.units) if g.kept else unit_scores(g, parameters, criterion) for g in self.groups]

    def check_not_exceeded(self, module: nn.Module) -> None:
        """Raise if more channels were removed than the target allows.

        Raises:
            InvalidArgumentError: more channels were removed; they can't be restored.
        """
        ratio, reduction = self.target.pruning_ratio, self.target.macs_reduction
        if ratio is not None and (share := self._gone(()) / self._total) > ratio + 1e-9:
            raise InvalidArgumentError(
                f"Argument `pruning_ratio` must be at least the share of channels that has left already, {share:.3f}, but got "
                f"{ratio}. Channels can't come back: raise it, or train from an earlier checkpoint."
            )
        if reduction is not None and (factor := self.original["macs"] / self.macs(module)) > reduction + 1e-9:
            raise InvalidArgumentError(
                f"Argument `macs_reduction` must be at least the factor that is reached already, {factor:.2f}, but got "
                f"{reduction}. Channels can't come back: raise it, or train from an earlier checkpoint."
            )

    def _measure(self, module: nn.Module) -> dict[str, Any]:
        units = {g.name: g.units for g in self.groups}
        return {"macs": self.macs(module), "parameters": parameter_count(module), "units": units}

    def macs(self, module: nn.Module) -> int:
        """MACs of one sample of the present module."""
        return self._counter(module)(())

    def choose(
        self, module: nn.Module, fraction: float = 1.0, collected: Mapping[str, torch.Tensor] | None = None
    ) -> dict[int, list[int]]:
        """Select the units to remove next, by position of their group; empty if the target is already reached.

        Args:
            module: present module; not changed.
            fraction: progress from the original module to the target, in [0, 1].
            collected: for criteria that need gradients, scores added up over steps, by group name.

        Raises:
            RunError: the target is no longer reachable.
        """
        parameters = dict(module.named_parameters())
        known = collected or {}
        scores = [
            torch.zeros(g.units) if g.kept else unit_scores(g, parameters, self.target.criterion, known.get(g.name))
            for g in self.groups
        ]
        if self.target.latency_reduction is not None:
            if self.latency is None:
                raise RunError("A latency must be known before channels leave by it, but none was measured.")
            return self.latency.choose(self.groups, scores, self._least, fraction)
        blocks = removal_order(self.groups, scores, self.target.scope, self.target.round_to, self._shares)
        chosen = fewest(blocks, self._reached(module, fraction))
        if chosen is None:
            raise RunError(
                "The target must still be reachable, but other callbacks have changed the network so that it isn't."
            )
        return units_of(chosen)

    def foresee(self, module: nn.Module) -> tuple[dict[int, list[int]], dict[str, int]]:
        """Predict a removal that reaches the target now, and the parameters and MACs afterwards; nothing is changed.

        With a criterion that needs gradients, which are not known yet, units are those of ``"group_norm"``.
        """
        target = self.target
        if target.method.needs_gradients:
            self.target = replace(target, criterion="group_norm")
        try:
            chosen = self.choose(module)
        finally:
            self.target = target
        copy, call = skeleton(module, self._path, self._call)
        with removed(copy, removal_of(copy, self.groups, chosen)):
            macs = count_macs(copy.get_submodule(self._path), call)
            return chosen, {"parameters": parameter_count(copy), "MACs a sample": macs}

    def entries_after(self, module: nn.Module, chosen: Mapping[int, Sequence[int]]) -> dict[str, int]:
        """Number of entries of each parameter after a removal; nothing is changed."""
        copy, _ = skeleton(module, self._path, self._call)
        with removed(copy, removal_of(copy, self.groups, chosen)):
            return {name: p.numel() for name, p in copy.named_parameters()}

    def change(self, module: nn.Module, chosen: Mapping[int, Sequence[int]], owner: str) -> Change:
        """Record of a removal."""
        return Change(KIND, owner, {**removal_of(module, self.groups, chosen), "original": self.original})

    def collect(self, module: nn.Module) -> dict[str, torch.Tensor]:
        """Scores from the present gradients by group name, for criteria that need gradients."""
        parameters = dict(module.named_parameters())
        method = self.target.method
        found = {g.name: method.unit_scores(g, parameters) for g in self.groups if not g.kept}
        return {name: scores for name, scores in found.items() if scores is not None}

    def follow(self, removal: Removal) -> None:
        """Update the groups after a removal."""
        self.groups = follow(self.groups, removal)

    @property
    def _total(self) -> int:
        return sum(g.original * g.width for g in self.groups if not g.kept)

    def _gone(self, blocks: Sequence[Block]) -> int:
        return self._total - channel_count(self.groups) + sum(block.channels for block in blocks)

    def _counter(self, module: nn.Module) -> Callable[[Sequence[Block]], int]:
        """Function that counts MACs after the removal of blocks, on a copy."""
        copy, call = skeleton(module, self._path, self._call)
        part = copy.get_submodule(self._path)

        def count(blocks: Sequence[Block]) -> int:
            with removed(copy, removal_of(copy, self.groups, units_of(blocks))):
                return count_macs(part, call)

        return count

    def _reached(self, module: nn.Module, fraction: float) -> Callable[[Sequence[Block]], bool]:
        if self.target.pruning_ratio is not None:
            wanted = ceil(self.target.pruning_ratio * fraction * self._total - 1e-9)
            return lambda blocks: self._gone(blocks) >= wanted
        assert self.target.macs_reduction is not None
        macs = self.original["macs"] * (1 - fraction * (1 - 1 / self.target.macs_reduction))
        count = self._counter(module)
        return lambda blocks: count(blocks) <= macs
