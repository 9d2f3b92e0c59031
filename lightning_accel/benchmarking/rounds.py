"""Interleaved measurement rounds, with one process for each variant."""

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import BenchmarkSettings, LatencyPoint, VariantResult
from lightning_accel.benchmarking.measure import NOISY, Ratio, median_ratio
from lightning_accel.benchmarking.process import VariantEndedError, VariantProcess
from lightning_accel.benchmarking.variants import RuntimeVariant
from lightning_accel.engines.registry import registered_record
from lightning_accel.errors import InvalidArgumentError

_PREDICT_BATCH = 32
_Key = tuple[int, int]  # batch size and number of callers


@dataclass
class _Turn:
    """One turn of a variant, in ms: latencies, duration, and the time that its threads ran and waited for a CPU."""

    times_ms: list[float]
    wall_ms: float
    ran_ms: float
    waited_ms: float

    @property
    def call_ms(self) -> float:
        """Duration of the turn divided by its calls.

        The median would favour short calls: those within a time slice of the scheduler are mostly undisturbed, longer ones never
        are. Several callers also wait for each other.
        """
        return self.wall_ms / len(self.times_ms)


@dataclass
class VariantRun:
    """Measurement of a variant in progress."""

    variant: RuntimeVariant
    result: VariantResult
    process: VariantProcess | None = None
    turns: dict[_Key, dict[int, _Turn]] = field(default_factory=dict)  # by round
    outputs: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def computed(self) -> dict[str, np.ndarray]:
        """Outputs for the kept samples by output name."""
        prefix = "output "
        return {name.removeprefix(prefix): a for name, a in self.outputs.items() if name.startswith(prefix)}

    def end(self, status: str, reason: str) -> None:
        """End the measurement of the variant; earlier results are kept."""
        self.result.status, self.result.reason = status, reason
        self.close()

    def close(self) -> None:
        """Kill its process."""
        if self.process is not None:
            self.process.close()
            self.process = None


@dataclass
class Measured:
    """Measurements of all variants, and of the null run.

    Args:
        rows: one for each variant, in the order given.
        null: of each point: batch size, callers, ratio and interval, ``waiting``, and whether it is noisy.
        interrupted: whether it was stopped by Ctrl-C.
    """

    rows: list[VariantRun]
    null: list[dict[str, Any]]
    interrupted: bool = False


def measure_variants(
    variants: Sequence[RuntimeVariant],
    samples: Mapping[str, np.ndarray],
    settings: BenchmarkSettings,
    *,
    baseline: str,
    keep: int = 512,
    classify: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Measured:
    """Measure the latency of several runtime variants of the same network, and collect what they compute.

    Each variant, and the baseline a second time, is loaded in a separate process and warmed up. In each round every variant
    has one turn, in random order, while the other processes sleep. A variant that fails, dies or exceeds its time limit gets a
    status with the reason, and the others continue. Ctrl-C ends the measurement and keeps the results so far.

    Args:
        variants: variants to run; those with ``missing`` are listed without a measurement.
        samples: inputs by name, each ``(S, ...)``. Calls use the first samples, repeated if there are too few.
        settings: batch sizes, callers and times.
        baseline: name of the variant that speed-ups refer to.
        keep: number of samples whose outputs are kept.
        classify: whether to keep the predicted classes of all samples, from the first output; otherwise only the kept samples run.
        progress: called with a description of each step.

    Raises:
        InvalidArgumentError: two variants have the same name, or none has the baseline's.
    """
    names = [variant.name for variant in variants]
    if len(set(names)) != len(names):
        raise InvalidArgumentError(f"Argument `variants` must have different names, but got {names}.")
    if baseline not in names:
        raise InvalidArgumentError(f"Argument `baseline` must be one of {names}, but got {baseline!r}.")
    rows = [
        VariantRun(
            variant, VariantResult(variant.name, variant.engine, variant.precision, unshippable=variant.unshippable)
        )
        for variant in variants
    ]
    base = rows[names.index(baseline)]
    second = VariantRun(base.variant, VariantResult("null", base.variant.engine, base.variant.precision))
    interrupted = False
    with ExitStack() as stack, tempfile.TemporaryDirectory() as scratch:
        for row in (*rows, second):
            stack.callback(row.close)
        try:
            files = _write_inputs(samples, Path(scratch))
            for row in (*rows, second):
                progress(f"start {row.result.name}")
                _start(row, files, settings, Path(scratch), 0 if row is second else keep, classify)
            _run_rounds([*rows, second], settings, progress)
        except KeyboardInterrupt:
            interrupted = True
    rng = np.random.default_rng(settings.seed)
    for row in rows:
        row.result.points = [_point(row, base, key, rng) for key in row.turns if row.turns[key]]
        if interrupted and row.result.status == "ran" and not row.result.points:
            row.result.status, row.result.reason = "out of time", "interrupted before it was measured"
    return Measured(rows, _null(rows, base, second, rng), interrupted)


def _write_inputs(samples: Mapping[str, np.ndarray], folder: Path) -> dict[str, str]:
    files = {name: str(folder / f"input{index}.npy") for index, name in enumerate(samples)}
    for name, array in samples.items():
        np.save(files[name], array, allow_pickle=False)
    return files


def _start(
    row: VariantRun, files: Mapping[str, str], settings: BenchmarkSettings, scratch: Path, keep: int, classify: bool
) -> None:
    """Load a variant, warm it up, measure its memory, and collect its outputs."""
    variant, result = row.variant, row.result
    if variant.missing:
        row.end("not here", variant.missing)
        return
    described: dict[str, Any] = {
        "engine": variant.engine,
        "mode": variant.mode,
        "file": str(variant.file),
        "options": dict(variant.options),
    }
    described["spec"] = registered_record(variant.engine)
    try:
        row.process = process = VariantProcess(threads=settings.threads, limit_s=settings.limit_s)
        result.first_ms = process.request("start", variant=described, inputs=files, threads=settings.threads)[
            "first_ms"
        ]
        for batch, callers in settings.points:
            process.request("warm", batch=batch, callers=callers, seconds=settings.warmup_s)
        result.peak_memory_bytes = process.request("memory")["peak_memory_bytes"]
        if keep:
            out = scratch / "outputs.npz"
            wish = {"batch": _PREDICT_BATCH, "keep": keep, "classify": classify, "out": str(out)}
            result.samples = process.request("predict", **wish)["samples"]
            with np.load(out, allow_pickle=False) as arrays:
                row.outputs = dict(arrays)
    except VariantEndedError as ended:
        row.end(ended.status, ended.reason)


def _run_rounds(rows: Sequence[VariantRun], settings: BenchmarkSettings, progress: Callable[[str], None]) -> None:
    rng = np.random.default_rng(settings.seed)
    rounds = max(settings.min_rounds, round(settings.seconds / settings.turn_s))
    for batch, callers in settings.points:
        progress(f"batch {batch}, {callers} caller{'s' if callers > 1 else ''}")
        end = time.perf_counter() + 1.5 * settings.seconds * sum(row.process is not None for row in rows)
        for number in range(rounds):
            if number >= settings.min_rounds and time.perf_counter() > end:
                break
            for index in rng.permutation(len(rows)):
                row = rows[index]
                if row.process is None:
                    continue
                try:
                    measured = row.process.request("turn", batch=batch, callers=callers, seconds=settings.turn_s)
                except VariantEndedError as ended:
                    row.end(ended.status, f"{ended.reason}, at batch {batch} with {callers} at once")
                    continue
                row.turns.setdefault((batch, callers), {})[number] = _Turn(**measured)


def _point(row: VariantRun, base: VariantRun, key: _Key, rng: np.random.Generator) -> LatencyPoint:
    batch, callers = key
    turns = row.turns[key]
    times = np.concatenate([turn.times_ms for turn in turns.values()])
    rates = [1e3 * batch * len(turn.times_ms) / turn.wall_ms for turn in turns.values()]
    ratio = Ratio(1.0, 1.0, 1.0) if row is base else _ratio(base, row, key, rng)
    return LatencyPoint(
        batch=batch,
        callers=callers,
        p50_ms=float(np.percentile(times, 50)),
        p90_ms=float(np.percentile(times, 90)),
        p99_ms=float(np.percentile(times, 99)),
        throughput=float(np.median(rates)),
        speedup=None if ratio is None else ratio.value,
        speedup_low=None if ratio is None else ratio.low,
        speedup_high=None if ratio is None else ratio.high,
        rounds=len(turns),
        calls=len(times),
    )


def _ratio(base: VariantRun, row: VariantRun, key: _Key, rng: np.random.Generator) -> Ratio | None:
    """Time of the baseline divided by the time of the variant, over the rounds in which both had a turn."""
    before, after = base.turns.get(key, {}), row.turns.get(key, {})
    both = sorted(before.keys() & after.keys())
    if len(both) < 2:
        return None
    of_base, of_row = ([turns[n].call_ms for n in both] for turns in (before, after))
    return median_ratio(of_base, of_row, rng)


def _null(
    rows: Sequence[VariantRun], base: VariantRun, second: VariantRun, rng: np.random.Generator
) -> list[dict[str, Any]]:
    points = []
    for key in second.turns:
        if (ratio := _ratio(base, second, key, rng)) is not None:
            waiting = _waiting(rows, key)
            noisy = ratio.low < 1 - NOISY or ratio.high > 1 + NOISY or (waiting or 0.0) > NOISY
            points.append({"batch": key[0], "callers": key[1], **vars(ratio), "waiting": waiting, "noisy": noisy})
    return points


def _waiting(rows: Sequence[VariantRun], key: _Key) -> float | None:
    """Share of runnable time during which other processes occupied the CPUs; ``None`` if unknown.

    The ratio of a null run doesn't show it, since both processes are affected alike. Several callers also wait for each other.
    """
    turns = [turn for row in rows for turn in row.turns.get(key, {}).values()]
    ran, waited = sum(turn.ran_ms for turn in turns), sum(turn.waited_ms for turn in turns)
    return None if key[1] > 1 or not ran else waited / (ran + waited)
