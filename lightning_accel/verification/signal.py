"""Signal-to-noise ratio of a quantized network against the float one. No torch needed."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_accel.core.decibels import decibels
from lightning_accel.verification.compare import Feeds, Network

_BATCH = 16


@dataclass(frozen=True)
class AgainstFloat:
    """A quantized network held against the float one.

    Args:
        decibels: power of each floating-point output of the float network, divided by that of the difference, in dB; infinite where nothing
            differs, and not a number where the output is 0 throughout.
        same: how many predictions of the first output, the largest along axis 1, are equal, and of how many; ``None`` if there are no
            classes.
    """

    decibels: dict[str, float]
    same: tuple[int, int] | None


def against_float(network: Network, reference: Network, samples: Feeds) -> AgainstFloat:
    """What rounding costs, in one pass over the samples.

    Args:
        network: the quantized network, a function of samples.
        reference: the same weights in float32.
        samples: inputs, each ``(S, ...)``.

    Example:
        >>> tenth = lambda feeds: {"y": feeds["x"] * 1.1}
        >>> found = against_float(tenth, lambda feeds: {"y": feeds["x"]}, {"x": np.ones((4, 3), np.float32)})
        >>> round(found.decibels["y"], 2), found.same
        (20.0, (4, 4))
    """
    power: dict[str, float] = {}
    noise: dict[str, float] = {}
    equal: list[np.ndarray | None] = []
    for start in range(0, len(next(iter(samples.values()))), _BATCH):
        feeds = {name: array[start : start + _BATCH] for name, array in samples.items()}
        found, wanted = network(feeds), reference(feeds)
        first = next(iter(wanted))
        equal.append(equal_predictions(found[first], wanted[first]))
        for name, want in wanted.items():
            if np.asarray(want).dtype.kind != "f":
                continue
            exact = np.asarray(want, np.float64)
            power[name] = power.get(name, 0.0) + float(np.square(exact).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(np.asarray(found[name], np.float64) - exact).sum())
    known = [part for part in equal if part is not None]
    same = (sum(int(part.sum()) for part in known), sum(part.size for part in known)) if known else None
    return AgainstFloat({name: decibels(power[name], noise[name]) for name in power}, same)


def equal_predictions(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Whether the largest of each row of logits ``(N, C, ...)`` is the same: booleans ``(N, ...)``; ``None`` if there are no classes."""
    if one.ndim < 2 or one.shape[1] < 2 or one.dtype.kind != "f":
        return None
    result: np.ndarray = one.argmax(1) == other.argmax(1)
    return result


def poorest(ratios: Mapping[str, float]) -> tuple[str, float] | None:
    """The output with the most noise and its ratio; ``None`` if no ratio is finite."""
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    return min(finite.items(), key=lambda item: item[1]) if finite else None
