"""Select units so that a network reaches a latency, by a table that is corrected where it can be measured."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.channels.groups import Group
from lightning_accel.pruning.channels.knapsack import cheapest
from lightning_accel.pruning.channels.latency_table import LatencyTable

_CLOSE = 0.03  # relative deviation from the target that ends the search
_TRIES = 10


@dataclass
class LatencyTarget:
    """A latency to reach, by a table.

    Args:
        reduction: factor by which the latency is reduced.
        table: of the network.
        correction: factor on the gains that the table asks for, learned from measurements.
    """

    reduction: float
    table: LatencyTable
    correction: float = 1.0

    def check(self, groups: Sequence[Group], least: Sequence[int]) -> None:
        """Check that the latency can be reached.

        Raises:
            InvalidArgumentError: not with the fewest units that may stay.
        """
        most = self.table.reduction(
            sum(max(gain for gain, _ in self._gains(g, n)) for g, n in zip(groups, least, strict=True) if not g.kept)
        )
        if most < self.reduction:
            raise InvalidArgumentError(
                f"Argument `latency_reduction` must be reachable with at least `round_to` channels left in each group, `limits` and what "
                f"is kept: at most {most:.2f} in {self.table.engine}, but got {self.reduction:g}."
            )

    def choose(
        self, groups: Sequence[Group], scores: Sequence[torch.Tensor], least: Sequence[int], fraction: float
    ) -> dict[int, list[int]]:
        """Units to remove next, by position of their group.

        Args:
            groups: at present.
            scores: ``(units,)`` of each group.
            least: smallest number of units of each group.
            fraction: progress to the target, in [0, 1].

        Raises:
            InvalidArgumentError: it can't be reached any more.
        """
        left = self._solved(groups, scores, least, 1 / (1 - fraction * (1 - 1 / self.reduction)))
        return {
            i: sorted(torch.argsort(scores[i], stable=True)[: g.units - left[g.name]].tolist())
            for i, g in enumerate(groups)
            if not g.kept and left[g.name] < g.units
        }

    def calibrate(
        self,
        groups: Sequence[Group],
        scores: Sequence[torch.Tensor],
        least: Sequence[int],
        measure: Callable[[Mapping[str, int]], float],
    ) -> float:
        """Measure the networks that the table chooses, and correct it until one is as fast as was asked for.

        This is done before training, so that a run and its resumption choose alike.

        Args:
            groups: of the whole network.
            scores: as they are now.
            least: smallest number of units of each group.
            measure: the factor by which a network with units left is faster.

        Returns:
            The factor of the nearest network.
        """
        known: dict[tuple[int, ...], float] = {}
        best, nearest, reached = self.correction, math.inf, 1.0
        for _ in range(_TRIES):
            try:
                left = self._solved(groups, scores, least, self.reduction)
            except InvalidArgumentError:  # the table doesn't know enough for the correction
                break
            key = tuple(left.values())
            if key not in known:
                known[key] = measure(left)
            off = math.log(known[key] / self.reduction)
            if abs(off) < nearest:
                best, nearest, reached = self.correction, abs(off), known[key]
            if abs(off) <= _CLOSE:
                break
            self.correction *= min(max(math.log(self.reduction) / max(math.log(known[key]), 0.02), 0.7), 1.5)
        self.correction = best
        return reached

    def _solved(
        self, groups: Sequence[Group], scores: Sequence[torch.Tensor], least: Sequence[int], reduction: float
    ) -> dict[str, int]:
        open_ = [i for i, g in enumerate(groups) if not g.kept]
        options, counts = [], []
        for i in open_:
            lost = torch.cat([torch.zeros(1), scores[i].float().cpu().sort().values.clamp_min(0).cumsum(0)])
            found = [(gain, n) for gain, n in self._gains(groups[i], least[i])]
            counts.append([n for _, n in found])
            options.append([(gain, float(lost[groups[i].units - n]) * groups[i].width) for gain, n in found])
        needed = self.table.gain_for(reduction) * self.correction
        taken = cheapest(options, needed)
        if taken is None:
            raise InvalidArgumentError(
                f"Argument `latency_reduction` must be reachable, but got {self.reduction:g}, and the channels that are left allow less."
            )
        return {groups[i].name: counts[k][index] for k, (i, index) in enumerate(zip(open_, taken, strict=True))}

    def _gains(self, group: Group, least: int) -> list[tuple[float, int]]:
        """Gain and number of units of each choice: all that are left, and fewer."""
        known = sorted((n for n in self.table.ratios[group.name] if least <= n < group.units), reverse=True)
        present = group.units if group.units in (*self.table.ratios[group.name], self.table.units[group.name]) else None
        own = [(self.table.gain(group.name, present), present)] if present is not None else [(0.0, group.units)]
        return [*own, *((self.table.gain(group.name, n), n) for n in known)]
