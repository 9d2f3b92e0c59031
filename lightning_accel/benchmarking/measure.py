"""Interleaved latency measurement: variants run in alternation, so that disturbances affect all of them alike."""

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_accel.benchmarking.environment import environment
from lightning_accel.core.arguments import at_least, checked
from lightning_accel.errors import InvalidArgumentError

__all__ = ["BenchmarkResult", "Measurement", "Ratio", "benchmark", "environment", "median_ratio"]

NOISY = 0.1  # a null ratio whose interval leaves 1 ± this indicates a busy machine
_RESAMPLES = 2000


@dataclass(frozen=True)
class Ratio:
    """A ratio with its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Measurement:
    """Latency of one variant, with a description of what was run.

    Attributes:
        name: name of the variant.
        p50_ms: median latency of a call in ms.
        p90_ms: 90th percentile in ms.
        samples: latency of each call in ms, in the order of the rounds.
        speedup: time of the baseline divided by time of this variant, as measured: below 1 is slower.
        engine: engine that ran it; filled in by the caller, like all that follows.
        file: name of the file that was run.
        bytes: size of that file.
        batch_size: samples in a call.
        threads: threads of the engine.
        note: a remark for the reader.
    """

    name: str
    p50_ms: float
    p90_ms: float
    samples: list[float]
    speedup: Ratio
    engine: str | None = None
    file: str | None = None
    bytes: int | None = None
    batch_size: int | None = None
    threads: int | None = None
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@dataclass(frozen=True)
class BenchmarkResult:
    """Result of :func:`benchmark`.

    Attributes:
        measurements: one for each variant, in the order given.
        baseline: name of the variant that speed-ups refer to.
        null: ratio of the baseline to itself, measured as one more variant. Its interval shows the noise
            of this machine.
        rounds: rounds measured; each calls each variant once.
        noisy: whether the interval of ``null`` leaves 0.9 to 1.1.
        environment: the machine, see :func:`environment`.
    """

    measurements: list[Measurement]
    baseline: str
    null: Ratio
    rounds: int
    noisy: bool
    environment: dict[str, Any] = field(repr=False)

    def __getitem__(self, name: str) -> Measurement:
        for measurement in self.measurements:
            if measurement.name == name:
                return measurement
        raise KeyError(f"No variant {name!r}, only {[measurement.name for measurement in self.measurements]}.")

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)


@checked(max_seconds=at_least(0), warmup_s=at_least(0))
def benchmark(
    variants: Mapping[str, Callable[[], Any]],
    *,
    baseline: str | None = None,
    rounds: int = 200,
    min_rounds: int = 20,
    max_seconds: float = 10.0,
    warmup_s: float = 0.3,
    seed: int = 0,
) -> BenchmarkResult:
    """Measure the latency of several variants of the same computation.

    After a warm-up, each round calls every variant once in random order, and the baseline a second time as a null run
    (A/A). Speed-ups are medians of the ratios within a round, with 95 % bootstrap intervals over the rounds.

    Args:
        variants: callables by name. A call must complete its work before it returns.
        baseline: name of the variant that speed-ups refer to. Default: the first.
        rounds: rounds to measure.
        min_rounds: rounds to measure even if they take longer than ``max_seconds``.
        max_seconds: time limit after which no further round starts, in seconds.
        warmup_s: time for which each variant is called before the first round, in seconds; at least one call.
        seed: seed of the orders and of the resampling.

    Raises:
        InvalidArgumentError: no variants, an unknown baseline, or a number out of its range.

    Example:
        >>> result = benchmark({"fp32": lambda: fp32(x), "int8": lambda: int8(x)})  # doctest: +SKIP
        >>> result["int8"].speedup  # doctest: +SKIP
        Ratio(value=1.83, low=1.79, high=1.88)
    """
    if not variants:
        raise InvalidArgumentError("Argument `variants` must have at least one variant, but got none.")
    if baseline is not None and baseline not in variants:
        raise InvalidArgumentError(f"Argument `baseline` must be one of {list(variants)}, but got {baseline!r}.")
    if min_rounds < 2 or rounds < min_rounds:
        raise InvalidArgumentError(
            f"Argument `min_rounds` must be from 2 to `rounds` ({rounds}), but got {min_rounds}."
        )
    baseline = baseline if baseline is not None else next(iter(variants))
    calls = [*variants.values(), variants[baseline]]  # the last one is the null run
    rng = np.random.default_rng(seed)

    for call in calls[:-1]:
        _warm_up(call, warmup_s)
    times = _measure(calls, rng, rounds, min_rounds, max_seconds)

    reference = times[list(variants).index(baseline)]
    null = median_ratio(reference, times[-1], rng)
    measurements = [
        Measurement(
            name=name,
            p50_ms=float(np.percentile(samples, 50)),
            p90_ms=float(np.percentile(samples, 90)),
            samples=samples.tolist(),
            speedup=Ratio(1.0, 1.0, 1.0) if name == baseline else median_ratio(reference, samples, rng),
        )
        for name, samples in zip(variants, times[:-1], strict=True)
    ]
    noisy = null.low < 1 - NOISY or null.high > 1 + NOISY
    return BenchmarkResult(measurements, baseline, null, times.shape[1], noisy, environment())


def median_ratio(
    numerator: Sequence[float] | np.ndarray, denominator: Sequence[float] | np.ndarray, rng: np.random.Generator
) -> Ratio:
    """Median of the ratios of paired samples, with a 95 % percentile bootstrap interval over the pairs.

    Args:
        numerator: samples, shape ``(rounds,)``.
        denominator: samples of the same rounds.
        rng: generator that the resampling draws from.

    Example:
        >>> median_ratio([2.0, 4.0, 6.0], [1.0, 2.0, 3.0], np.random.default_rng(0))
        Ratio(value=2.0, low=2.0, high=2.0)
    """
    ratios = np.asarray(numerator, dtype=float) / np.asarray(denominator, dtype=float)  # (rounds,)
    draws = rng.integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.percentile(np.median(ratios[draws], axis=1), [2.5, 97.5])
    return Ratio(float(np.median(ratios)), float(low), float(high))


def _warm_up(call: Callable[[], Any], seconds: float) -> None:
    end = time.perf_counter() + seconds
    call()
    while time.perf_counter() < end:
        call()


def _measure(
    calls: Sequence[Callable[[], Any]], rng: np.random.Generator, rounds: int, min_rounds: int, max_seconds: float
) -> np.ndarray:
    """Return the time of each call in ms, shape ``(variants, rounds)``."""
    times: list[np.ndarray] = []
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()  # a garbage collection would distort the timing of one variant
    try:
        end = time.perf_counter() + max_seconds
        while len(times) < rounds and (len(times) < min_rounds or time.perf_counter() < end):
            row = np.empty(len(calls))
            for index in rng.permutation(len(calls)):
                started = time.perf_counter_ns()
                calls[index]()
                row[index] = (
                    max(time.perf_counter_ns() - started, 1) / 1e6
                )  # the clock's resolution may exceed a very short call
            times.append(row)
    finally:
        if collecting:
            gc.enable()
    return np.stack(times, axis=1)
