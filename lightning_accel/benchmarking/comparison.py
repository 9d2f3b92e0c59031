"""Settings and results of a comparison: the content of ``comparison.json``."""

import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lightning_accel.core.arguments import Rule, above, at_least, check_fields
from lightning_accel.errors import InvalidArgumentError

SCHEMA = 1


def usable_cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class BenchmarkSettings:
    """Settings of a measurement.

    Args:
        batches: samples in a call; each size is measured.
        callers: threads that call at once; each number is measured.
        seconds: time for which each variant is called, at each batch size and number of callers.
        turn_s: time of one turn: a round is one turn of each variant, in random order.
        warmup_s: time for which each variant is called before the first round.
        min_rounds: smallest number of rounds, even if calls take longer than turns.
        limit_s: time limit of a variant in total, with loading and warm-up.
        threads: threads of each engine.
        seed: seed of the random orders and of the bootstrap.

    Raises:
        InvalidArgumentError: a number is out of its range.
    """

    batches: tuple[int, ...] = (1, 32)
    callers: tuple[int, ...] = (1, 4)
    seconds: float = 2.0
    turn_s: float = 0.1
    warmup_s: float = 0.3
    min_rounds: int = 8
    limit_s: float = 60.0
    threads: int = field(default_factory=usable_cores)
    seed: int = 0

    def __post_init__(self) -> None:
        time = above(0)
        warmup = Rule("at least 0 and finite", lambda value: 0 <= value < math.inf)
        counts = {"min_rounds": at_least(2), "threads": at_least(1)}
        check_fields(self, seconds=time, turn_s=time, limit_s=time, warmup_s=warmup, **counts)
        for name in ("batches", "callers"):
            values = getattr(self, name)
            if not values or any(isinstance(v, bool) or not isinstance(v, int) or v < 1 for v in values):
                raise InvalidArgumentError(f"Argument `{name}` must hold integers of at least 1, but got {values!r}.")
            if len(set(values)) != len(values):
                raise InvalidArgumentError(f"Argument `{name}` must hold each number once, but got {values!r}.")
        if 1 not in self.callers:
            raise InvalidArgumentError(
                f"Argument `callers` must hold 1, the number of callers that latency budgets refer to, but got {self.callers!r}."
            )

    @property
    def points(self) -> list[tuple[int, int]]:
        """Batch size and number of callers of each measurement."""
        return [(batch, callers) for batch in self.batches for callers in self.callers]


@dataclass(frozen=True)
class LatencyPoint:
    """Latency of a variant at one batch size and number of callers.

    Args:
        batch: samples in a call.
        callers: threads that called at once.
        p50_ms: median latency of a call in ms, for each caller.
        p90_ms: 90th percentile.
        p99_ms: 99th percentile.
        throughput: samples per second of all callers together.
        speedup: time of the baseline divided by time of this variant: the median over the rounds of the ratio of both within a
            round. The time is the length of a turn divided by its calls. ``None`` where the baseline wasn't measured.
        speedup_low: lower end of its 95 % interval.
        speedup_high: upper end.
        rounds: rounds measured.
        calls: calls measured.
    """

    batch: int
    callers: int
    p50_ms: float
    p90_ms: float
    p99_ms: float
    throughput: float
    speedup: float | None
    speedup_low: float | None
    speedup_high: float | None
    rounds: int
    calls: int


@dataclass
class VariantResult:
    """Measurements of one variant; ``None`` was not measured.

    Args:
        name: name of the variant.
        engine: what ran it.
        precision: of its file.
        status: ``"ran"``, ``"not here"``, ``"failed"`` or ``"out of time"``.
        reason: explanation of a status other than ``"ran"``.
        file: path of its file, relative to the bundle if it is part of it.
        file_bytes: size of that file in bytes, including external weights.
        peak_memory_bytes: largest resident memory of its process after warm-up, in bytes.
        first_ms: time from a fresh process to its first result: imports, loading, one sample; in ms.
        accuracy: share of correct predictions; for outputs that are values, R² against the labels, see
            :func:`~lightning_accel.benchmarking.scores.r_squared`.
        agreement: share of predictions equal to those of the trained network, or of the baseline if these are unknown; for
            values, R² against its outputs.
        samples: number of held-out samples for both.
        kernels: comparison of its kernels with the file as written: ``passed``, ``failures`` and the errors.
        unshippable: why it can't be the bundle's default; empty if it can.
        points: latencies, one for each batch size and number of callers.
    """

    name: str
    engine: str
    precision: str
    status: str = "ran"
    reason: str = ""
    file: str | None = None
    file_bytes: int | None = None
    peak_memory_bytes: int | None = None
    first_ms: float | None = None
    accuracy: float | None = None
    agreement: float | None = None
    samples: int | None = None
    kernels: dict[str, Any] | None = None
    unshippable: str = ""
    points: list[LatencyPoint] = field(default_factory=list)

    def point(self, batch: int, callers: int = 1) -> LatencyPoint | None:
        """The latency at a batch size and number of callers; ``None`` if it was not measured."""
        return next((p for p in self.points if (p.batch, p.callers) == (batch, callers)), None)

    @property
    def score(self) -> float | None:
        """Accuracy, or agreement where there are no labels."""
        return self.agreement if self.accuracy is None else self.accuracy


@dataclass
class Comparison:
    """Measurements of all variants, the machine, and the decision.

    Args:
        environment: the machine, see :func:`~lightning_accel.benchmarking.environment.environment`.
        settings: fields of :class:`BenchmarkSettings`, the origin of the samples, and the reference of the predictions.
        baseline: name of the variant that speed-ups refer to.
        null: the baseline compared with itself in a second process: ``value``, ``low`` and ``high`` at each of the ``points``.
        noisy: whether the interval of a null ratio leaves 0.9 to 1.1.
        variants: one row for each.
        decision: what ships, see :func:`~lightning_accel.benchmarking.decision.choose_variant`; ``None`` without budgets.
        interrupted: whether the measurement was stopped early.
    """

    environment: dict[str, Any]
    settings: dict[str, Any]
    baseline: str
    null: dict[str, Any]
    noisy: bool
    variants: list[VariantResult]
    decision: dict[str, Any] | None = None
    interrupted: bool = False

    def __getitem__(self, name: str) -> VariantResult:
        for variant in self.variants:
            if variant.name == name:
                return variant
        raise KeyError(f"No variant {name!r}, only {[variant.name for variant in self.variants]}.")

    def to_dict(self) -> dict[str, Any]:
        """The content of ``comparison.json``."""
        return {"schema": SCHEMA, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Comparison":
        """Restore a comparison from :meth:`to_dict`.

        Raises:
            InvalidArgumentError: another schema.
        """
        if values.get("schema") != SCHEMA:
            raise InvalidArgumentError(
                f"The comparison must have schema {SCHEMA}, but got {values.get('schema')!r}. Measure again."
            )
        variants = [
            VariantResult(**{**variant, "points": [LatencyPoint(**point) for point in variant["points"]]})
            for variant in values["variants"]
        ]
        known = {one.name for one in fields(cls)}
        return cls(**{**{key: value for key, value in values.items() if key in known}, "variants": variants})


def null_line(null: Mapping[str, Any]) -> str:
    """One line about a null run: its ratio, and whether it is too noisy."""
    callers = f"{null['callers']} caller{'s' if null['callers'] > 1 else ''}"
    says = f"null run, batch {null['batch']}, {callers}: {null['value']:.3f}x [{null['low']:.3f}, {null['high']:.3f}]"
    if null["waiting"] is not None and null["waiting"] >= 0.01:
        says += f", while other processes had the CPUs for {null['waiting']:.0%} of the time"
    return says + (": too noisy for fine distinctions" if null["noisy"] else "")
