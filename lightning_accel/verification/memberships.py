"""Agreement on which elements are positive or belong to a class.

A detector with one hit among 8,400 anchors agrees with one that never finds anything on 99.99 % of all scores, and a mask of a few pixels
with an empty one. So only the elements that are in a set for either network count: the share of them that is in it for both is its
intersection over union. A set is a score above 0.5 in one channel, a class of an integer map, or ``True`` in a boolean output.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lightning_accel.verification.channels import FACTOR, AxisErrors
from lightning_accel.verification.significance import upper_share
from lightning_accel.verification.tolerances import Tolerance

_VALUES = 256  # distinct integers beyond which an output holds counts or tokens instead of classes


@dataclass(frozen=True)
class Membership:
    """How far two networks agree on the elements of some sets, e.g. one for each class.

    Args:
        output: name of the output.
        names: of the sets, for messages.
        both: ``(C,)``, elements in the set for both networks.
        either: ``(C,)``, for at least one.
        samples: ``(C,)``, samples with such an element.
        floating: whether these are floating-point values on one side of a threshold, which rounding alone can move.
    """

    output: str
    names: tuple[str, ...]
    both: np.ndarray
    either: np.ndarray
    samples: np.ndarray
    floating: bool

    @property
    def shares(self) -> np.ndarray:
        """Intersection over union, ``(C,)``; 1 for an empty set."""
        return np.where(self.either > 0, self.both / np.maximum(self.either, 1), 1.0)

    def differing(self, names: Sequence[str]) -> np.ndarray:
        """One minus the intersection over union of the sets named, but at least that of all sets together."""
        known = dict(zip(self.names, 1.0 - self.shares, strict=True))
        together = 1.0 - float(self.both.sum()) / max(float(self.either.sum()), 1.0)
        return np.array([max(known.get(name, 0.0), together) for name in names])


class Positives:
    """Collects the elements of each channel of an axis that are above a threshold, batch by batch."""

    def __init__(self, axis: int, size: int, threshold: float) -> None:
        self.axis, self.threshold = axis, threshold
        self.both, self.either, self.samples = (np.zeros(size, np.int64) for _ in range(3))

    @staticmethod
    def possible(errors: AxisErrors) -> bool:
        """Whether a channel of this axis may hold scores: values from 0 to 1."""
        return bool(((errors.low >= 0.0) & (errors.high <= 1.0)).any())

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Add a batch, both ``(N, ...)``."""
        one, two = reference > self.threshold, other > self.threshold
        others = tuple(i for i in range(1, one.ndim) if i != self.axis)
        either = one | two
        self.both += (one & two).sum(axis=(0, *others))
        self.either += either.sum(axis=(0, *others))
        self.samples += either.any(axis=others).sum(0)

    def result(self, output: str, channels: np.ndarray) -> Membership:
        """The channels that hold scores, given as indices."""
        names = tuple(
            f"a score above {self.threshold:g} in channel {c} of output {output}, axis {self.axis}" for c in channels
        )
        return Membership(
            output, names, self.both[channels], self.either[channels], self.samples[channels], floating=True
        )


class Classes:
    """Collects the elements of an integer or boolean output that have each value, batch by batch."""

    def __init__(self) -> None:
        self.found: dict[int, np.ndarray] = {}  # value -> both, either, samples
        self.many = False

    def add(self, reference: np.ndarray, other: np.ndarray) -> None:
        """Add a batch, both ``(N, ...)``."""
        if self.many or not reference.size:
            return
        values = np.union1d(reference, other)
        if len(values) + len(self.found) > _VALUES and len({*self.found, *values.tolist()}) > _VALUES:
            self.many = True
            return
        for value in values:
            one, two = reference == value, other == value
            either = one | two
            present = either.reshape(len(either), -1).any(1).sum() if either.ndim else 1
            counts = np.array([(one & two).sum(), either.sum(), present])
            self.found[value.item()] = self.found.get(value.item(), np.zeros(3, np.int64)) + counts

    def result(self, output: str) -> Membership | None:
        """The classes; ``None`` if there are too many distinct values for classes."""
        if self.many or not self.found:
            return None
        names = tuple(f"the value {value} of output {output}" for value in self.found)
        both, either, samples = np.stack(list(self.found.values()), 1)
        return Membership(output, names, both, either, samples, floating=False)


def judge_memberships(
    found: Mapping[str, Membership], nulls: Sequence[Mapping[str, Membership]], tolerance: Tolerance
) -> Iterator[str]:
    """Compare the agreement on each set with its limit: the tolerance, or more where the null divergence is larger.

    Args:
        found: by output and axis.
        nulls: those of the network and itself; without any, sets of floating-point values aren't judged.
        tolerance: its ``agreement`` is the least intersection over union.

    Yields:
        For each output the set with the largest excess, as a sentence.
    """
    tests = sum(len(sets.names) for sets in found.values())
    for name, sets in found.items():
        if not sets.names or (sets.floating and not nulls):
            continue
        own = [null[name].differing(sets.names) for null in nulls if name in null]
        most = np.minimum(
            np.maximum.reduce([np.full(len(sets.names), 1.0 - tolerance.agreement), *(FACTOR * d for d in own)]), 1.0
        )
        if nulls:
            most = np.array([upper_share(m, max(int(n), 1), tests) for m, n in zip(most, sets.samples, strict=True)])
        excess = (1.0 - sets.shares) - most
        worst = int(excess.argmax())
        if excess[worst] > 1e-12:
            yield (
                f"of the elements with {sets.names[worst]} in either network, {sets.shares[worst]:.2%} have it in both, "
                f"below {1.0 - most[worst]:.2%}"
            )
