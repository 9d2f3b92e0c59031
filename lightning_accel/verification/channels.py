"""Errors of each channel of an output, relative to that channel's own spread.

A detector's boxes in pixels and its scores below 1 lie in one output ``(N, 4 + C, A)``. As shares of the output's range, scores that
are all zero are no error at all, so each channel is judged by itself. The axis that holds channels isn't known: axis 1 (images,
feature maps) and the last (tokens, boxes) are both compared.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_accel.verification.significance import smallest_range, too_many
from lightning_accel.verification.tolerances import Tolerance

FACTOR = 2.0  # what an engine may differ by, in multiples of the network's own null divergence; docs/verification.md says why
PEAK = 8.0  # the same for the largest error of a single sample, which no share of samples speaks for
_CONSTANT = 5e-3  # of a channel's largest value: below this its spread is within reach of the rounding of a few layers
_VALUES = 2**24  # samples times channels that are kept; beyond it fewer samples are judged by channel


@dataclass(frozen=True)
class ChannelErrors:
    """Largest error of each sample in each channel along one axis of an output.

    Args:
        output: name of the output.
        axis: the axis.
        errors: ``(S, C)``, absolute; of a sample that was compared several times the largest.
        unit: ``(C,)``, what they are shares of: the spread of the channel in the reference.
        drawn: comparisons of a sample, over all of them.
    """

    output: str
    axis: int
    errors: np.ndarray
    unit: np.ndarray
    drawn: int

    @property
    def typical(self) -> np.ndarray:
        """Median over samples, ``(C,)``, absolute."""
        return np.asarray(np.median(self.errors, axis=0))

    @property
    def largest(self) -> np.ndarray:
        """Largest over samples, ``(C,)``, absolute."""
        return np.asarray(self.errors.max(axis=0))


class AxisErrors:
    """Collects the errors along one axis, batch by batch.

    Args:
        axis: the axis, not the first.
        size: its number of channels.
        samples: samples that will be compared.
    """

    def __init__(self, axis: int, size: int, samples: int) -> None:
        self.axis, self.size = axis, size
        kept = max(1, min(samples, _VALUES // max(size, 1)))
        self.errors = np.zeros((kept, size), np.float32)
        self.low, self.high = np.full(size, np.inf), np.full(size, -np.inf)
        self.sums, self.squares, self.values, self.drawn = np.zeros(size), np.zeros(size), 0, 0

    def add(self, reference: np.ndarray, off: np.ndarray, start: int) -> None:
        """Add a batch.

        Args:
            reference: values of the reference, ``(N, ...)``.
            off: absolute errors, of the same shape; infinite where only one side is a number.
            start: number of the first sample.
        """
        others = tuple(i for i in range(1, reference.ndim) if i != self.axis)
        rows = self.errors[start : start + len(off)]
        if len(rows):
            np.maximum(rows, off.max(axis=others)[: len(rows)], out=rows, casting="same_kind")
            self.drawn += len(rows)
        whole = (0, *others)
        low, high = reference.min(axis=whole), reference.max(axis=whole)
        numbers = reference
        if not (np.isfinite(low).all() and np.isfinite(high).all()):
            finite = np.isfinite(reference)
            low = np.where(finite, reference, np.inf).min(axis=whole)
            high = np.where(finite, reference, -np.inf).max(axis=whole)
            numbers = np.where(finite, reference, 0.0)
        self.low, self.high = np.minimum(self.low, low), np.maximum(self.high, high)
        axes = "abcdefghijkl"[: reference.ndim]
        self.sums = self.sums + numbers.sum(axis=whole)
        self.squares = self.squares + np.einsum(f"{axes},{axes}->{axes[self.axis]}", numbers, numbers)
        self.values += reference.size // max(self.size, 1)

    @property
    def spread(self) -> np.ndarray:
        """Range of each channel, ``(C,)``; 0 for one without numbers."""
        return np.where(self.high >= self.low, self.high - np.minimum(self.low, self.high), 0.0)

    @property
    def between(self) -> float:
        """Share of the variance that lies between channels (η²): large where the axis tells classes or features apart."""
        means = self.sums / max(self.values, 1)
        total = float(self.squares.sum() / max(self.values * self.size, 1) - means.mean() ** 2)
        return float(means.var()) / total if total > 0.0 else 0.0

    def result(self, output: str, span: float) -> ChannelErrors:
        """The errors of an output whose range over all channels is ``span``."""
        return ChannelErrors(output, self.axis, self.errors, self._unit(span), self.drawn)

    def _unit(self, span: float) -> np.ndarray:
        spread, size = (
            self.spread,
            np.where(self.high >= self.low, np.maximum(np.abs(self.low), np.abs(self.high)), 0.0),
        )
        varying = spread[spread > 0.0]
        usual = float(np.median(varying)) if varying.size else span
        # A few values cover a part of a channel's range; then it is taken as wider, but not as wider than channels usually are.
        covered = max(smallest_range(self.values, self.size), 1e-30)
        wide = np.minimum(spread / covered, np.maximum(spread, usual))
        # A constant channel is held against a narrow one of the same output, not against the range of boxes in pixels.
        constant = float(np.quantile(varying, 0.25)) if varying.size else span
        unit = np.where(spread > 0.0, wide, constant)
        found: np.ndarray = np.maximum.reduce([unit, size * _CONSTANT, np.full_like(unit, span * 1e-6)])
        return found


@dataclass(frozen=True)
class ChannelFault:
    """The channel that differs most along one axis.

    Args:
        channel: where, e.g. ``"channel 4 of output y, axis 1"``.
        share: its typical error as a share of its spread.
        excess: by how much it exceeds its limit, as a ratio; above 1 it is a fault.
        says: the fault as a sentence.
    """

    channel: str
    share: float
    excess: float
    says: str


def judge_channels(
    found: Mapping[str, ChannelErrors], nulls: Sequence[Mapping[str, ChannelErrors]], tolerance: Tolerance
) -> list[ChannelFault]:
    """Compare each channel with its limits: the tolerance, or the null divergence in the same channel where that is larger.

    1. *Typical*: the median over samples, at most ``FACTOR`` times the null divergence's.
    2. *Often*: the number of samples whose error exceeds ``FACTOR`` times the largest of the null divergence, below what chance allows over
       all channels, see :func:`~lightning_accel.verification.significance.too_many`.
    3. *Once*: the largest error of one sample, at most ``PEAK`` times the largest of the null divergence there, or in nine tenths of
       the channels.

    Args:
        found: the errors by output and axis.
        nulls: those of the network and itself; without any, only the tolerance counts, and 2 isn't judged.
        tolerance: limits as shares of the channel's spread.

    Returns:
        For each axis the worst channel.
    """
    tests = sum(len(errors.unit) for errors in found.values())
    faults = []
    for name, errors in found.items():
        same = [null[name] for null in nulls if name in null and null[name].unit.shape == errors.unit.shape]
        if len(errors.unit):
            faults.append(_worst(errors, same, tolerance, tests))
    return faults


def _worst(errors: ChannelErrors, nulls: Sequence[ChannelErrors], tolerance: Tolerance, tests: int) -> ChannelFault:
    typical = np.nan_to_num(errors.typical, nan=np.inf, posinf=np.inf)
    largest = np.nan_to_num(errors.largest, nan=np.inf, posinf=np.inf)
    own, peak = _most((null.typical for null in nulls), typical), _most((null.largest for null in nulls), typical)
    # The largest of few values may be small by chance in one of many channels: there it is taken as in nine tenths of them.
    usual = np.maximum(peak, float(np.quantile(peak / errors.unit, 0.9)) * errors.unit)
    limits = {
        "typical": np.maximum(tolerance.maximum * errors.unit, FACTOR * own),
        "often": np.maximum(max(tolerance.p99, tolerance.maximum / 4) * errors.unit, FACTOR * peak),
        "once": np.maximum(tolerance.maximum * errors.unit, PEAK * usual),
    }
    seen = (~(errors.errors <= limits["often"])).sum(0)
    needed = too_many(errors.drawn, min((len(null.errors) for null in nulls), default=1), tests) if nulls else np.inf
    excess = {"typical": typical / limits["typical"], "often": seen / needed, "once": largest / limits["once"]}
    # The count reaches what chance allows with the number that is too many; the others exceed their limit.
    excess["often"] = np.where(
        seen >= needed, np.nextafter(1.0, 2.0) + excess["often"] - 1.0, np.minimum(excess["often"], 1.0)
    )
    kind = max(excess, key=lambda k: float(excess[k].max()))
    channel = int(excess[kind].argmax())
    place = f"channel {channel} of output {errors.output}, axis {errors.axis}"
    limit, unit = limits[kind][channel] / errors.unit[channel], errors.unit[channel]
    others = int((np.maximum.reduce(list(excess.values())) > 1.0).sum()) - 1
    count = len(errors.errors)
    says = {
        "typical": f"{place}, is off by {typical[channel] / unit:.1e} of its own spread, above {limit:.1e}",
        "often": f"{place}, is off by more than {limit:.1e} of its own spread in {seen[channel]} of {count} samples",
        "once": f"{place}, is off by {largest[channel] / unit:.1e} of its own spread in a sample, above {limit:.1e}",
    }[kind]
    more = f" (as are {others} others of its {len(errors.unit)})" if others > 0 else ""
    return ChannelFault(place, float(typical[channel] / unit), float(excess[kind][channel]), says + more)


def _most(parts: Iterable[np.ndarray], like: np.ndarray) -> np.ndarray:
    most = np.zeros_like(like, dtype=np.float64)
    for part in parts:
        most = np.maximum(most, np.nan_to_num(part, posinf=0.0))
    return most
