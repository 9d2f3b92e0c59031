"""Pareto front of accuracy against cost."""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class ParetoPoint:
    """A point of a plot of accuracy against cost.

    Args:
        number: label in the plot; variants at the same position share it.
        name: of the variant.
        cost: latency in ms, or size in bytes: less is better.
        accuracy: share in [0, 1]: more is better.
        low: lower end of the accuracy's interval.
        high: upper end.
        ships: whether it is the one that ships.
    """

    number: str
    name: str
    cost: float
    accuracy: float
    low: float
    high: float
    ships: bool = False


def pareto_front(points: Sequence[ParetoPoint]) -> list[ParetoPoint]:
    """Points that no other point dominates, by increasing cost; equal points are all included.

    A point dominates another if it is at least as good in accuracy and cost, and better in one of them.

    Example:
        >>> fast, good, bad = (ParetoPoint("", "", *xy, 0, 1) for xy in [(1, 0.8), (2, 0.9), (3, 0.85)])
        >>> [p.cost for p in pareto_front([bad, good, fast])]
        [1, 2]
    """

    def beats(a: ParetoPoint, b: ParetoPoint) -> bool:
        better = a.cost < b.cost or a.accuracy > b.accuracy
        return better and a.cost <= b.cost and a.accuracy >= b.accuracy

    front = [point for point in points if not any(beats(other, point) for other in points)]
    return sorted(front, key=lambda point: point.cost)
