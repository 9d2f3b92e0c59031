"""Differences of one output of two networks, collected batch by batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_accel.verification.channels import AxisErrors
from lightning_accel.verification.memberships import Classes, Membership, Positives

LOGITS, MIXED, EMBEDDING, VALUES, INTEGERS = "logits", "mixed scales", "embedding", "values", "integers"
_PROBABILITY, _LOGIT = 0.5, 0.0  # thresholds that scores are commonly held against
_SCALES = 30.0  # ratio of spreads beyond which channels aren't classes
_NO_CLASSES = ("box", "embed", "feature", "hidden", "pooler", "keypoint", "landmark", "offset")


@dataclass(frozen=True)
class Predictions:
    """Agreement on the largest logit of one output.

    Args:
        agreement: share of samples with the same one.
        decided: share of samples whose two largest reference logits are further apart than twice the error.
        agreement_decided: agreement on those; ``None`` if there are none.
    """

    agreement: float
    decided: float
    agreement_decided: float | None


class OutputErrors:
    """The differences of one output.

    Args:
        name: of the output.
        samples: samples that will be compared.
    """

    def __init__(self, name: str, samples: int) -> None:
        self.name, self.samples = name, samples
        self.errors: list[np.ndarray] = []
        self.cosines: list[float] = []
        self.low, self.high = np.inf, -np.inf
        self.counted, self.equal = 0, 0  # integers and booleans
        self.elements, self.turned = 0, {_LOGIT: 0, _PROBABILITY: 0}
        self.classes = Classes()
        self.axes: dict[int, AxisErrors] = {}
        self.positives: dict[int, Positives] = {}
        self.predicted: dict[int, list[tuple[np.ndarray, np.ndarray]]] = {}  # axis -> same argmax, margin
        self.summing: dict[int, bool] = {}  # axis -> whether values along it sum to 1
        self.normed = True  # whether the last axis has length 1
        self.varying: set[int] = set()  # axes whose size varies hold no channels

    def add(self, reference: np.ndarray, other: np.ndarray, start: int) -> None:
        """Add a batch, both of the same shape, whose first sample has the number ``start``."""
        if not np.issubdtype(reference.dtype, np.floating):
            self.counted += reference.size
            self.equal += int((reference == other).sum())
            self.classes.add(reference, other)
            return
        a, b = reference.astype(np.float64), other.astype(np.float64)
        with np.errstate(invalid="ignore"):  # infinities on both sides are equal, and their difference is not used
            off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
        off = np.where(np.isfinite(off), off, np.inf)
        self.errors.append(off.ravel())
        finite = a[np.isfinite(a)]
        self.low = min(self.low, float(finite.min(initial=np.inf)))
        self.high = max(self.high, float(finite.max(initial=-np.inf)))
        self.elements += a.size
        for threshold in self.turned:
            self.turned[threshold] += int(((a > threshold) != (b > threshold)).sum())
        self.cosines += _cosines(a, b)
        if a.ndim and a.size:
            self._add_axes(a, b, off, start)

    def _add_axes(self, a: np.ndarray, b: np.ndarray, off: np.ndarray, start: int) -> None:
        if a.ndim == 1:  # one value for each sample is one channel
            a, b, off = a[:, None], b[:, None], off[:, None]
        if self.normed:
            with np.errstate(invalid="ignore", over="ignore"):
                self.normed = a.shape[-1] > 1 and bool(np.all(np.abs(np.einsum("...i,...i->...", a, a) - 1.0) < 1e-3))
        for axis in {1, a.ndim - 1} - self.varying:
            size = a.shape[axis]
            if axis in self.axes and self.axes[axis].size != size:
                self.varying.add(axis)
                continue
            if axis not in self.axes:
                self.axes[axis] = AxisErrors(axis, size, max(self.samples, len(a)))
                self.positives[axis] = Positives(axis, size, _PROBABILITY)
            self.axes[axis].add(a, off, start)
            if self.positives[axis].possible(self.axes[axis]):
                self.positives[axis].add(a, b)
            if self.summing.get(axis, True):
                with np.errstate(invalid="ignore"):
                    self.summing[axis] = bool(self.low >= 0.0 and np.all(np.abs(a.sum(axis) - 1.0) < 1e-3))
            if size > 1 and (axis == 1 or a.ndim == 3 or self.summing[axis]):  # where classes may lie
                best = np.partition(a, -2, axis=axis).take([-2, -1], axis)
                margin = best.take(1, axis) - best.take(0, axis)
                same = a.argmax(axis) == b.argmax(axis)
                self.predicted.setdefault(axis, []).append((same.ravel(), margin.ravel()))

    @property
    def span(self) -> float:
        """The output's range."""
        return max(self.high - self.low, 1e-30)

    @property
    def kind(self) -> str:
        """What it holds, as far as its name and values tell: ``"logits"`` only if the largest along an axis is a prediction."""
        if self.counted:
            return INTEGERS
        axis = self.class_axis
        if axis is None or any(word in self.name.lower() for word in _NO_CLASSES):
            return VALUES
        if self.summing.get(axis):
            return LOGITS
        if self.normed:
            return EMBEDDING
        spread = self.axes[axis].spread
        spread = spread[spread > 0.0]
        if spread.size < 2:
            return LOGITS
        narrow, usual = np.quantile(spread, 0.1, method="lower"), np.median(spread)
        return MIXED if spread.max() > _SCALES * usual or usual > _SCALES * narrow else LOGITS

    @property
    def class_axis(self) -> int | None:
        """The axis that classes lie along if this output has any: the one whose values sum to 1, or that separates its values most."""
        axes = {axis: errors for axis, errors in self.axes.items() if errors.size > 1 and axis not in self.varying}
        for axis in axes:
            if self.summing.get(axis):
                return axis
        if set(axes) >= {1, 2} and len(axes) == 2:  # (N, C, T) or (N, T, C); others have their classes along axis 1
            return max(axes, key=lambda axis: axes[axis].between)
        return 1 if 1 in axes else None

    @property
    def same_side(self) -> float | None:
        """Share of values on the same side of the threshold that such an output has; ``None`` if it has none."""
        if self.low < _LOGIT < self.high:
            return 1.0 - self.turned[_LOGIT] / self.elements
        if 0.0 <= self.low < _PROBABILITY < self.high <= 1.0:
            return 1.0 - self.turned[_PROBABILITY] / self.elements
        return None

    def predictions(self, p99: float) -> "Predictions | None":
        """Agreement of the largest values along the class axis; ``None`` where they aren't predictions.

        Args:
            p99: 99th percentile of the error, as a share of the output's range.
        """
        axis = self.class_axis
        if self.kind != LOGITS or axis is None or axis not in self.predicted:
            return None
        same, margin = (np.concatenate(parts) for parts in zip(*self.predicted[axis], strict=True))
        clear = margin / self.span > 2 * p99
        decided = float(same[clear].mean()) if clear.any() else None
        return Predictions(float(same.mean()), float(clear.mean()), decided)

    def memberships(self) -> Mapping[str, Membership]:
        """Elements above 0.5 of the channels that hold probabilities, by axis; or of each class of an integer output."""
        if self.counted:
            found = self.classes.result(self.name)
            return {} if found is None else {self.name: found}
        scores = {
            axis: np.flatnonzero((errors.low >= 0.0) & (errors.high <= 1.0) & (self.positives[axis].either > 0))
            for axis, errors in self.axes.items()
            if axis not in self.varying
        }
        return {
            f"{self.name}, axis {axis}": self.positives[axis].result(self.name, channels)
            for axis, channels in scores.items()
            if channels.size
        }

    def summary(self) -> dict[str, Any]:
        """Its kind, and errors as shares of its own range or the share of equal values, for a report."""
        if self.counted:
            return {"kind": self.kind, "equal": self.equal / self.counted}
        errors = np.concatenate(self.errors) / self.span if self.errors else np.zeros(0)
        if not errors.size:
            return {"kind": self.kind}
        median, p99 = (float(np.quantile(errors, q, method="higher")) for q in (0.5, 0.99))
        side = {} if self.same_side is None else {"same_side": self.same_side}
        return {"kind": self.kind, "median": median, "p99": p99, "maximum": float(errors.max()), **side}


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
