"""A network in an engine, measured beside the trained one, and whether it fits budgets."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.benchmarking.pareto import ParetoPoint, pareto_front
from lightning_accel.export.quality import ACCURACY, Change

UNSCORED = (
    "nothing says how good it is: the held-out data has no class labels, and `validation_step` logs no metric, or none that the "
    "engine's outputs can be given to"
)


def latency_and_size(budgets: Budgets, p50_ms: float, file_bytes: int) -> tuple[float, float]:
    """Factors by which a network exceeds the limits of latency and of size; 0 where there is no limit."""
    latency = 0.0 if budgets.max_latency_ms is None else p50_ms / budgets.max_latency_ms
    return latency, 0.0 if budgets.max_bytes is None else file_bytes / budgets.max_bytes


@dataclass(frozen=True)
class Candidate:
    """A network in an engine.

    Args:
        engine: that ran it.
        file: of the bundle.
        file_bytes: size of that file in bytes.
        p50_ms: median latency in ms of a call with ``batch`` samples, one caller.
        p10_ms: its 10th percentile.
        speedup: time of the trained network in float32 in ONNX Runtime divided by its time, in turns.
        speedup_low: lower end of the 95 % interval.
        speedup_high: upper end.
        score: ``"accuracy"``, or the name of the user's metric; ``None`` if nothing says how good it is.
        drop: points lost against the trained network in float32: percentage points of accuracy, or see :func:`points`.
        drop_low: lower end of its 95 % interval.
        drop_high: upper end.
    """

    engine: str
    file: str
    file_bytes: int
    p50_ms: float
    p10_ms: float
    speedup: float
    speedup_low: float
    speedup_high: float
    score: str | None
    drop: float | None
    drop_low: float | None
    drop_high: float | None

    def misses(self, budgets: Budgets) -> dict[str, str]:
        """The limits that it exceeds, and by how much, in words; empty if it fits."""
        found = {}
        if self.drop is None:
            found["max_drop"] = UNSCORED
        elif self.drop > budgets.max_drop + 1e-9:
            assert self.drop_low is not None
            unsure = (
                " (within the interval: more held-out data could decide)" if self.drop_low <= budgets.max_drop else ""
            )
            found["max_drop"] = f"{self._lost} of {self.score}, more than {budgets.max_drop:g}{unsure}"
        if budgets.max_latency_ms is not None and self.p50_ms > budgets.max_latency_ms:
            found["max_latency_ms"] = f"{self.p50_ms:.3f} ms, more than {budgets.max_latency_ms:g}"
        if budgets.max_bytes is not None and self.file_bytes > budgets.max_bytes:
            found["max_bytes"] = f"{self.file_bytes:,} bytes, more than {budgets.max_bytes:,}"
        return found

    def excess(self, budgets: Budgets) -> float:
        """Largest factor by which it exceeds a limit; at most 1 if it fits."""
        if self.drop is None:
            return math.inf
        lost = self.drop / max(budgets.max_drop, 0.1)
        return max(0.0, lost, *latency_and_size(budgets, self.p50_ms, self.file_bytes))

    def to_dict(self) -> dict[str, Any]:
        """JSON values."""
        return asdict(self)

    @property
    def _lost(self) -> str:
        return (
            "unknown"
            if self.drop is None
            else f"loses {self.drop:.2f} [{self.drop_low:.2f}, {self.drop_high:.2f}] points"
        )

    def __str__(self) -> str:
        quality = UNSCORED if self.drop is None else f"{self._lost} of {self.score}"
        return (
            f"{self.engine}: {self.p50_ms:.3f} ms ({self.speedup:.2f}x [{self.speedup_low:.2f}, {self.speedup_high:.2f}]), "
            f"{self.file_bytes:,} bytes, {quality}"
        )


def points(change: Change, before: float | None, lower_is_better: bool = False) -> tuple[float, float, float]:
    """A change of a score as points lost: value, lower and upper end of the interval.

    Percentage points of accuracy, and of a metric of which more is better and whose value lies in [0, 1]; of any other metric, percent of
    the trained network's value.

    Args:
        change: positive is better.
        before: value of the trained network; ``None`` for accuracy.
        lower_is_better: whether a smaller value is better.
    """
    share = change.score == ACCURACY or (before is not None and 0 <= before <= 1 and not lower_is_better)
    factor = 100.0 if share else 100.0 / max(abs(before or 0.0), 1e-12)
    value, low, high = (factor * v for v in (-change.value, -change.high, -change.low))
    return round(value, 6) + 0.0, round(low, 6) + 0.0, round(high, 6) + 0.0


def front(candidates: Sequence[tuple[str, Candidate]]) -> list[str]:
    """Labels of the candidates that no other one beats in latency and points lost, by latency."""
    known = [
        ParetoPoint("", label, c.p50_ms, -c.drop, -(c.drop_high or 0), -(c.drop_low or 0))
        for label, c in candidates
        if c.drop is not None
    ]
    return [point.name for point in pareto_front(known)]
