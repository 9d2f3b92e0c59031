"""Compare the outputs of two implementations of a network on real batches, at several batch sizes.

Only numpy is needed, so an engine can be compared with its file on the machine it runs on.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from lightning_accel.errors import InvalidArgumentError, VerificationError
from lightning_accel.verification.tolerances import FLOAT, Tolerance

Feeds = Mapping[str, np.ndarray]
Network = Callable[[Feeds], Mapping[str, np.ndarray]]

_SHARES = (0.5, 0.9, 0.99, 0.999, 1.0)
FACTOR = 2.0  # what an engine may differ by, in multiples of the network's own null divergence; docs/verification.md says why
_Z = 3.29  # of the upper bound of a share that was counted on few samples: passed by chance once in 2,000 times
_CHANNELS = 2**24  # values of samples times channels that are kept; beyond it an output is compared as a whole
_PROBABILITY, _LOGIT = 0.5, 0.0  # thresholds that scores are commonly held against


@dataclass
class Verification:
    """Result of comparing two implementations of a network.

    Errors are absolute differences as shares of the reference's output range, over all outputs and samples.

    Args:
        engine: name of the implementation that was compared with the reference.
        samples: compared samples.
        batch_sizes: batch size -> samples compared at it.
        median_error: median error.
        p99_error: 99th percentile.
        max_error: largest.
        agreement: share of samples with the same largest logit; ``None`` where outputs aren't logits.
        tolerance: limits for the errors.
        distribution: error below which a share of all errors lies, by that share.
        cosine: smallest cosine between the outputs of a sample, over all outputs; ``None`` if all are zero.
        lengths: symbol of a dynamic axis beyond the batch -> sizes compared.
        decided: share of samples whose two largest reference logits are further apart than twice the 99th percentile of
            the error (of the tolerated one, if that is smaller). Only these count for the limit: on the rest an
            error within tolerance can change the order.
        agreement_decided: agreement on those.
        failures: exceeded limits, as sentences; empty if it passed.
        limits: limits that were applied: the tolerance, or more where the null divergence is larger.
        null: null divergence of the network, ``{variant: {"median": ..., "p99": ..., "maximum": ..., ...}}``.
        worst_channel: the channel that differs most of its own spread, and by how much: the median over samples.
        equal: share of equal integers and booleans; ``None`` where there are none.
        same_side: share of values on the same side of a threshold: 0 where the output has both signs, 0.5 for probabilities.
        metric: the user's metrics, reference and engine, by name.
        first_divergence: first node whose output differs on the same inputs, if it was looked for.
        note: measurements that were not possible, and why.
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
    limits: dict[str, float] = field(default_factory=dict)
    null: dict[str, dict[str, float]] = field(default_factory=dict)
    worst_channel: str = ""
    equal: float | None = None
    same_side: float | None = None
    metric: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_divergence: str = ""
    note: str = ""
    broken: list[str] = field(default_factory=list, repr=False)  # what no limit is asked about: shapes
    channels: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def passed(self) -> bool:
        """Whether no limit was exceeded."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("broken", "channels")}
        return {
            **values,
            "tolerance": dict(vars(self.tolerance)),
            "passed": self.passed,
            "batch_sizes": {str(k): v for k, v in self.batch_sizes.items()},
        }

    def against(self, nulls: Mapping[str, "Verification"]) -> "Verification":
        """The same measurements with the null divergence as limits, where it exceeds the tolerance.

        Args:
            nulls: comparisons of the network with itself, by the change: rounding, order of summation.
        """
        nulls = {
            name: null for name, null in nulls.items() if math.isfinite(null.max_error)
        }  # no yardstick where noise overflows
        known = {**self.null, **{name: null.own_numbers() for name, null in nulls.items()}}
        channels = [null.channels for null in nulls.values()]
        return _judged(replace(self, null=known), self.lengths, True, channels)

    def own_numbers(self) -> dict[str, float]:
        """The numbers that serve as limits for another comparison."""
        found = {
            "median": self.median_error,
            "p99": self.p99_error,
            "maximum": self.max_error,
            "agreement": self.agreement,
            "agreement_decided": self.agreement_decided,
            "equal": self.equal,
            "same_side": self.same_side,
        }
        return {name: value for name, value in found.items() if value is not None}

    def raise_if_failed(self, repeat: str = "") -> None:
        """Raise if a limit was exceeded.

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
    """Compare two implementations of a network on the same samples, at several batch sizes and lengths.

    Args:
        reference: named arrays in, named arrays out; the correct one.
        network: the implementation to check, with the same interface, e.g. ``runner.run``.
        samples: inputs, each ``(S, ...)`` with the samples along the first dimension.
        engine: name for the result.
        batch_sizes: the largest is run over all samples, the others over ``few``.
        tolerance: limits.
        few: samples for the smaller batch sizes and for the shorter lengths.
        check_agreement: apply the limit for the agreement; the largest logits of an untrained network are ties.
        axes: dynamic axes beyond the batch, ``{input: {axis: symbol}}``: samples are also cut to half of each length.

    Returns:
        The measurements; ``failures`` lists exceeded limits, for which nothing is raised.

    Raises:
        InvalidArgumentError: samples of different numbers, or none; networks with different outputs.

    Example:
        >>> twice = lambda feeds: {"y": feeds["x"] * 2}
        >>> verify(twice, twice, {"x": np.ones((4, 3), np.float32)}, batch_sizes=(1, 4)).max_error
        0.0
    """
    sizes = {name: len(array) for name, array in samples.items()}
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) == 0:
        raise InvalidArgumentError(
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
            raise InvalidArgumentError(
                f"Argument `samples` must have one length along `{symbol}`, but got {sorted(lengths)}."
            )
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
        self.outputs: dict[str, _Output] = {}
        self.same: list[np.ndarray] = []  # whether the largest logit is the same one
        self.margins: list[np.ndarray] = []  # between the reference's two largest logits
        self.cosines: list[float] = []
        self.broken: list[str] = []

    def add(self, want: Mapping[str, Any], got: Mapping[str, Any], where: str) -> None:
        if want.keys() != got.keys():
            raise InvalidArgumentError(
                f"Both networks must have the same outputs, but got {sorted(want)} and {sorted(got)}."
            )
        for name in want:
            a, b = np.asarray(want[name]), np.asarray(got[name])
            if a.shape != b.shape:
                self.broken.append(f"output `{name}` has shape {b.shape} instead of {a.shape} {where}")
                continue
            self.outputs.setdefault(name, _Output()).add(a, b)
            if not np.issubdtype(a.dtype, np.floating):
                continue
            a, b = a.astype(np.float64), b.astype(np.float64)
            self.cosines += _cosines(a, b)
            if a.ndim >= 2 and a.shape[1] > 1 and name == next(iter(want)):
                self.same.append((a.argmax(1) == b.argmax(1)).ravel())
                best = np.partition(a, -2, axis=1)[:, -2:]
                self.margins.append((best[:, 1] - best[:, 0]).ravel())

    def result(self, engine: str, samples: int, batch_sizes: dict[int, int], tolerance: Tolerance) -> Verification:
        floats = {name: output for name, output in self.outputs.items() if output.errors}
        shares = [np.concatenate(output.errors) / output.span for output in floats.values()]
        errors = np.concatenate(shares) if shares else np.zeros(1) if self.outputs else np.array([np.inf])
        errors = np.where(np.isfinite(errors), errors, np.inf)
        shown = {f"{share:.1%}": float(np.quantile(errors, share, method="higher")) for share in _SHARES}
        channels = {
            f"{name}, axis {axis}": shares
            for name, output in floats.items()
            for axis, shares in output.channel_shares().items()
        }
        counted = [output for output in self.outputs.values() if output.counted]
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
            equal=sum(o.equal for o in counted) / sum(o.counted for o in counted) if counted else None,
            same_side=min((side for o in floats.values() if (side := o.same_side) is not None), default=None),
            broken=list(self.broken),
            channels=channels,
        )
        if self.same:
            same, margin = np.concatenate(self.same), np.concatenate(self.margins) / next(iter(floats.values())).span
            clear = margin > 2 * min(result.p99_error, tolerance.p99)
            result.decided = float(clear.mean())
            result.agreement_decided = float(same[clear].mean()) if clear.any() else None
        return result


class _Output:
    """The differences of one output."""

    def __init__(self) -> None:
        self.errors: list[np.ndarray] = []
        self.low, self.high = np.inf, -np.inf
        self.counted, self.equal = 0, 0  # integers and booleans
        self.elements, self.turned = 0, {_LOGIT: 0, _PROBABILITY: 0}
        # By axis: largest error of each sample and channel; and smallest, largest and farthest from 0 of each channel.
        self.channels: dict[int, list[np.ndarray]] = {}
        self.ranges: dict[int, np.ndarray] = {}

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        if not np.issubdtype(a.dtype, np.floating):
            self.counted += a.size
            self.equal += int((a == b).sum())
            return
        a, b = a.astype(np.float64), b.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities on both sides are equal, and their difference is not used
            off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        self.errors.append(off.ravel())
        finite = a[np.isfinite(a)]
        self.low = min(self.low, float(finite.min(initial=np.inf)))
        self.high = max(self.high, float(finite.max(initial=-np.inf)))
        self.elements += a.size
        for threshold in self.turned:
            self.turned[threshold] += int(((a > threshold) != (b > threshold)).sum())
        for axis in {1, a.ndim - 1} if a.ndim > 1 and a.size else ():
            others = tuple(i for i in range(1, a.ndim) if i != axis)
            size = a.shape[axis]
            if axis in self.ranges and self.ranges[axis].shape[1] != size:
                continue  # an axis that varies holds no channels
            low, high = a.min(axis=(0, *others)), a.max(axis=(0, *others))
            before = self.ranges.get(axis, np.stack([np.full(size, np.inf), np.full(size, -np.inf)]))
            self.ranges[axis] = np.stack([np.minimum(before[0], low), np.maximum(before[1], high)])
            kept = self.channels.setdefault(axis, [])
            if (sum(len(part) for part in kept) + len(a)) * size <= _CHANNELS:
                kept.append(off.max(axis=others).astype(np.float32))

    @property
    def span(self) -> float:
        """The output's range."""
        return max(self.high - self.low, 1e-30)

    @property
    def same_side(self) -> float | None:
        """Share of values on the same side of the threshold that such an output has; ``None`` if it has none."""
        if self.low < _LOGIT < self.high:
            return 1.0 - self.turned[_LOGIT] / self.elements
        if 0.0 <= self.low < _PROBABILITY < self.high <= 1.0:
            return 1.0 - self.turned[_PROBABILITY] / self.elements
        return None

    def channel_shares(self) -> dict[int, np.ndarray]:
        """By axis, of each channel the median over samples of its largest error, as a share of the channel's own spread."""
        found = {}
        for axis, parts in self.channels.items():
            low, high = self.ranges[axis]
            with np.errstate(invalid="ignore"):
                spread = np.nan_to_num(high - low, posinf=0.0, nan=0.0)
                # A channel that hardly varies is held against the size of its values; one that doesn't, against the whole output.
                size = np.nan_to_num(np.maximum(np.abs(low), np.abs(high)), posinf=0.0, nan=0.0)
            spread = np.where(
                spread > 0.0,
                np.maximum.reduce([spread, size * 1e-3, np.full_like(spread, self.span * 1e-6)]),
                self.span,
            )
            if parts:
                found[axis] = np.median(np.concatenate(parts), axis=0) / spread
        return found


def _cosines(a: np.ndarray, b: np.ndarray) -> list[float]:
    """Cosine between the outputs of each sample; none for a sample whose reference is all zeros."""
    if not a.ndim or not a.size:
        return []
    a, b = a.reshape(len(a), -1), b.reshape(len(b), -1)
    norms = np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=1)
    used = (norms[0] > 0) & np.isfinite(norms[0])
    with np.errstate(invalid="ignore", divide="ignore"):
        cosines = (a * b).sum(1)[used] / (norms[0] * norms[1])[used]
    result: list[float] = np.where(np.isfinite(cosines), np.clip(cosines, -1.0, 1.0), -1.0).tolist()
    return result


def _judged(
    result: Verification,
    lengths: dict[str, list[int]],
    check_agreement: bool,
    channels: Sequence[Mapping[str, np.ndarray]] = (),
) -> Verification:
    """Compare the numbers with their limits: the tolerance, or the null divergence where that is larger."""
    tolerance, nulls = result.tolerance, list(result.null.values())
    result.lengths, result.failures, result.limits = lengths, list(result.broken), {}

    def limit(name: str) -> float:
        most = max((null[name] for null in nulls if name in null), default=0.0)
        result.limits[name] = max(getattr(tolerance, name), FACTOR * most)
        return result.limits[name]

    errors = {
        "median": ("the median error", result.median_error),
        "p99": ("the 99th percentile of the error", result.p99_error),
        "maximum": ("the largest error", result.max_error),
    }
    for name, (what, value) in errors.items():
        if not value <= limit(name):
            result.failures.append(f"{what} is {value:.2e} of the output range, above {result.limits[name]:.1e}")
    _judge_channels(result, channels)
    _judge_shares(result, check_agreement)
    return result


def _judge_shares(result: Verification, check_agreement: bool) -> None:
    """Judge predictions, integers and thresholds: shares of samples, whose uncertainty on few samples is taken into account."""
    nulls = list(result.null.values())
    shares = [("equal", "integers and booleans are equal on", result.equal, "of them")]
    if check_agreement:
        decided = f"of the samples that are decided by more than the error ({result.decided or 0:.0%} of all)"
        shares.append(("agreement_decided", "predictions agree on", result.agreement_decided, decided))
    if check_agreement and nulls:  # without them nothing says how many samples lie on the edge between two classes
        shares.append(("agreement", "predictions agree on", result.agreement, "of the samples"))
        shares.append(
            ("same_side", "outputs lie on the same side of a threshold for", result.same_side, "of the values")
        )
    for name, what, share, of in shares:
        if share is None:
            continue
        differ = [FACTOR * (1.0 - null[name]) for null in nulls if name in null]
        most = max([1.0 - result.tolerance.agreement, *differ])
        least = result.limits[name] = 1.0 - (_upper(most, result.samples) if nulls else most)
        if share < least:
            result.failures.append(f"{what} {share:.2%} {of}, below {least:.2%}")


def _judge_channels(result: Verification, nulls: Sequence[Mapping[str, np.ndarray]]) -> None:
    """Judge each channel relative to its own spread: an error in a small channel is invisible among all errors."""
    worst = 0.0
    for name, shares in result.channels.items():
        same = [null[name] for null in nulls if name in null and null[name].shape == shares.shape]
        limits = np.maximum.reduce([np.full_like(shares, result.tolerance.maximum), *(FACTOR * own for own in same)])
        excess = np.nan_to_num(shares / limits, nan=np.inf, posinf=np.inf)
        channel = int(excess.argmax())
        if excess[channel] > worst:
            worst = float(excess[channel])
            result.worst_channel = f"channel {channel} of output {name}: {shares[channel]:.1e} of its spread"
            if worst > 1.0:
                result.failures.append(
                    f"channel {channel} of output {name}, is off by {shares[channel]:.1e} of its own spread, above {limits[channel]:.1e}"
                )


def _upper(share: float, samples: int) -> float:
    """Upper end of Wilson's interval (https://doi.org/10.1080/01621459.1927.10502953) of a share."""
    z = _Z**2 / samples
    half = _Z * math.sqrt(share * (1.0 - min(share, 1.0)) / samples + z / (4 * samples)) if share < 1.0 else 0.0
    return min((share + z / 2 + half) / (1 + z), 1.0)
