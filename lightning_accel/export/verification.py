"""Verification: do two ways to run a network compute the same? Measured on real batches, at several batch sizes.

Arrays in, numbers out: nothing but numpy is needed, so an engine can be held against its file on the machine it runs on.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_accel.export.tolerances import FLOAT, Tolerance

Feeds = Mapping[str, np.ndarray]
Network = Callable[[Feeds], Mapping[str, np.ndarray]]

_SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)


class VerificationError(RuntimeError):
    """What was exported is not what was trained. The checkpoint is safe; the message holds the measured numbers."""


@dataclass
class Verification:
    """What was measured when two ways to run a network were compared.

    Errors are absolute differences as shares of the reference's output range, over all outputs and samples.

    Args:
        engine: what was compared with the reference.
        samples: compared samples.
        batch_sizes: batch size -> samples compared at it.
        median_error: median error.
        p99_error: 99th percentile.
        max_error: largest.
        agreement: share of samples with the same largest logit; ``None`` where outputs aren't logits.
        tolerance: limits it was held against.
        distribution: error below which a share of all errors lies, by that share.
        cosine: smallest cosine between the outputs of a sample, over all outputs; ``None`` if all are zero.
        lengths: symbol of a dynamic axis beyond the batch -> sizes compared.
        decided: share of samples whose two largest reference logits are further apart than twice the 99th percentile of
            the error (of the tolerated one, if that is smaller). Only these are held against the limit: on the rest an
            error within tolerance can turn the order.
        agreement_decided: agreement on those.
        failures: which limits were broken, in words; empty if it passed.
        metric: the user's metrics, reference and engine, by name.
        first_divergence: first node whose output differs on the same inputs, if it was looked for.
        note: what could not be measured, and why.
    """

    engine: str
    samples: int
    batch_sizes: dict[int, int]
    median_error: float
    p99_error: float
    max_error: float
    agreement: float | None
    tolerance: Tolerance
    distribution: dict[str, float] = field(default_factory=dict)
    cosine: float | None = None
    lengths: dict[str, list[int]] = field(default_factory=dict)
    decided: float | None = None
    agreement_decided: float | None = None
    failures: list[str] = field(default_factory=list)
    metric: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_divergence: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every limit held."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {**asdict(self), "passed": self.passed, "batch_sizes": {str(k): v for k, v in self.batch_sizes.items()}}

    def raise_if_failed(self, repeat: str = "") -> None:
        """Raise if a limit was broken.

        Args:
            repeat: command that repeats the step.

        Raises:
            VerificationError: with the numbers and the first diverging node.
        """
        if self.passed:
            return
        message = f"What {self.engine} computes must be what was trained, but {'; '.join(self.failures)} ({self.samples} samples)."
        if self.first_divergence:
            message += f" {self.first_divergence}"
        raise VerificationError(message + (f" Repeat this step with: {repeat}" if repeat else ""))


def verify(
    reference: Network,
    network: Network,
    samples: Feeds,
    *,
    engine: str = "engine",
    batch_sizes: Sequence[int] = (1, 8, 64),
    tolerance: Tolerance = FLOAT,
    few: int = 64,
    check_agreement: bool = True,
    axes: Mapping[str, Mapping[int, str]] | None = None,
) -> Verification:
    """Compare two ways to run a network on the same samples, at several batch sizes and lengths.

    Args:
        reference: named arrays in, named arrays out; what is right.
        network: the same for what is to be checked, e.g. ``runner.run``.
        samples: inputs, each ``(S, ...)`` with the samples along the first dimension.
        engine: name for the result.
        batch_sizes: the largest is run over all samples, the others over ``few``.
        tolerance: limits.
        few: samples for the smaller batch sizes and for the shorter lengths.
        check_agreement: hold the agreement against its limit; an untrained network's largest logits are ties.
        axes: dynamic axes beyond the batch, ``{input: {axis: symbol}}``: samples are also cut to half of each length.

    Returns:
        What was measured; ``failures`` says which limits were broken. Nothing is raised for those.

    Raises:
        ValueError: samples of different numbers, or none; networks with different outputs.

    Example:
        >>> twice = lambda feeds: {"y": feeds["x"] * 2}
        >>> verify(twice, twice, {"x": np.ones((4, 3), np.float32)}, batch_sizes=(1, 4)).max_error
        0.0
    """
    sizes = {name: len(array) for name, array in samples.items()}
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) == 0:
        raise ValueError(
            f"Argument `samples` must hold the same number of samples (at least 1) of each input, but got {sizes}."
        )
    total = next(iter(sizes.values()))
    ordered = sorted({min(size, total) for size in batch_sizes})
    used = {size: total if size == ordered[-1] else min(few, total) for size in ordered}
    seen = _Comparison()
    for size, count in used.items():
        for feeds in _batches(samples, size, count):
            seen.add(reference(feeds), network(feeds), f"at batch size {len(next(iter(feeds.values())))}")
    lengths: dict[str, list[int]] = {}
    for symbol, length, short in _shorter(samples, axes or {}):
        lengths.setdefault(symbol, [length]).append(-(-length // 2))
        for feeds in _batches(short, ordered[-1], min(few, total)):
            seen.add(reference(feeds), network(feeds), f"at `{symbol}` {-(-length // 2)}")
    return _judged(seen.result(engine, total, used, tolerance), lengths, check_agreement)


def _batches(samples: Feeds, size: int, count: int) -> Iterator[dict[str, np.ndarray]]:
    for start in range(0, count, size):
        yield {name: array[start : min(start + size, count)] for name, array in samples.items()}


def _shorter(samples: Feeds, axes: Mapping[str, Mapping[int, str]]) -> Iterator[tuple[str, int, dict[str, np.ndarray]]]:
    """Samples with one dynamic axis cut to its first half, one symbol after the other."""
    for symbol in dict.fromkeys(s for of_input in axes.values() for s in of_input.values()):
        lengths = {samples[n].shape[a] for n, of_input in axes.items() for a, s in of_input.items() if s == symbol}
        if len(lengths) != 1:
            raise ValueError(f"Argument `samples` must have one length along `{symbol}`, but got {sorted(lengths)}.")
        length = lengths.pop()
        if length < 2:
            continue
        short = dict(samples)
        for name, of_input in axes.items():
            for axis, owner in of_input.items():
                if owner == symbol:
                    short[name] = short[name].take(range(-(-length // 2)), axis)
        yield symbol, length, short


class _Comparison:
    """Collects the differences between two networks' outputs, batch by batch."""

    def __init__(self) -> None:
        self.errors: dict[str, list[np.ndarray]] = {}
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.same: list[np.ndarray] = []  # whether the largest logit is the same one
        self.margins: list[np.ndarray] = []  # between the reference's two largest logits
        self.cosines: list[float] = []
        self.broken: list[str] = []

    def add(self, want: Mapping[str, Any], got: Mapping[str, Any], where: str) -> None:
        if want.keys() != got.keys():
            raise ValueError(f"Both networks must have the same outputs, but got {sorted(want)} and {sorted(got)}.")
        for name in want:
            a, b = np.asarray(want[name]), np.asarray(got[name])
            if a.shape != b.shape:
                self.broken.append(f"output `{name}` has shape {b.shape} instead of {a.shape} {where}")
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            with np.errstate(invalid="ignore"):  # infinities on both sides are equal, and their difference is not used
                self.errors.setdefault(name, []).append(np.where(a == b, 0.0, np.abs(a - b)).ravel())
            self.low[name] = min(self.low.get(name, np.inf), float(a.min(initial=np.inf)))
            self.high[name] = max(self.high.get(name, -np.inf), float(a.max(initial=-np.inf)))
            self.cosines += _cosines(a, b)
            if a.ndim >= 2 and a.shape[1] > 1 and name == next(iter(want)):
                self.same.append((a.argmax(1) == b.argmax(1)).ravel())
                best = np.sort(a, axis=1)[:, -2:]
                self.margins.append((best[:, 1] - best[:, 0]).ravel())

    def result(self, engine: str, samples: int, batch_sizes: dict[int, int], tolerance: Tolerance) -> Verification:
        spans = {name: max(self.high[name] - self.low[name], 1e-30) for name in self.errors}
        shares = [np.concatenate(parts) / spans[name] for name, parts in self.errors.items()]
        errors = np.concatenate(shares) if shares else np.array([np.inf])
        errors = np.where(np.isfinite(errors), errors, np.inf)
        shown = {f"{share:.1%}": float(np.quantile(errors, share, method="higher")) for share in _SHARES}
        result = Verification(
            engine=engine,
            samples=samples,
            batch_sizes=batch_sizes,
            median_error=float(np.quantile(errors, 0.5, method="lower")),
            p99_error=float(np.quantile(errors, 0.99, method="higher")),
            max_error=float(errors.max()),
            agreement=float(np.concatenate(self.same).mean()) if self.same else None,
            tolerance=tolerance,
            distribution=shown,
            cosine=min(self.cosines, default=None),
            failures=list(self.broken),
        )
        if self.same:
            same, margin = np.concatenate(self.same), np.concatenate(self.margins) / spans[next(iter(self.errors))]
            clear = margin > 2 * min(result.p99_error, tolerance.p99)
            result.decided = float(clear.mean())
            result.agreement_decided = float(same[clear].mean()) if clear.any() else None
        return result


def _cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Cosine between the outputs of each sample; none for a sample whose reference is all zeros."""
    if not a.ndim or not a.size:
        return []
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    used = (norms[0] > 0) & np.isfinite(norms[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(1)[used] / (norms[0] * norms[1])[used]
    return np.where(np.isfinite(cosines), np.clip(cosines, -1.0, 1.0), -1.0).tolist()


def _judged(result: Verification, lengths: dict[str, list[int]], check_agreement: bool) -> Verification:
    """Hold the numbers against their limits."""
    tolerance = result.tolerance
    result.lengths = lengths
    limits = [
        ("the median error", result.median_error, tolerance.median),
        ("the 99th percentile of the error", result.p99_error, tolerance.p99),
        ("the largest error", result.max_error, tolerance.maximum),
    ]
    for what, value, limit in limits:
        if not value <= limit:
            result.failures.append(f"{what} is {value:.2e} of the output range, above {limit:.0e}")
    agreement = result.agreement_decided
    if check_agreement and agreement is not None and agreement < tolerance.agreement:
        result.failures.append(
            f"predictions agree on {agreement:.2%} of the samples that are decided by more than the error "
            f"({result.decided:.0%} of all), below {tolerance.agreement:.2%}"
        )
    return result
