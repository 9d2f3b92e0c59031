"""Signal-to-noise ratio of a quantized network against the float one. No torch needed."""

import math
from collections.abc import Iterator, Mapping

import numpy as np

from lightning_accel.core.decibels import decibels
from lightning_accel.verification.compare import Feeds, Network

_SAMPLES, _BATCH = 64, 16


def signal_to_noise(network: Network, reference: Network, samples: Feeds) -> dict[str, float]:
    """Power of each floating-point output of the reference, divided by that of the difference, in dB.

    Args:
        network: the quantized network, a function of samples.
        reference: the same weights in float32.
        samples: inputs, each ``(S, ...)``; at most 64 samples are used.

    Returns:
        ``{output: dB}``; infinite where nothing differs, and not a number where the reference is 0 throughout.

    Example:
        >>> tenth = lambda feeds: {"y": feeds["x"] * 1.1}
        >>> round(signal_to_noise(tenth, lambda feeds: {"y": feeds["x"]}, {"x": np.ones((4, 3), np.float32)})["y"], 2)
        20.0
    """
    power: dict[str, float] = {}
    noise: dict[str, float] = {}
    for found, wanted in _runs(network, reference, samples, _SAMPLES):
        for name, want in wanted.items():
            if np.asarray(want).dtype.kind != "f":
                continue
            exact = np.asarray(want, np.float64)
            power[name] = power.get(name, 0.0) + float(np.square(exact).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(np.asarray(found[name], np.float64) - exact).sum())
    return {name: decibels(power[name], noise[name]) for name in power}


def same_predictions(network: Network, reference: Network, samples: Feeds) -> tuple[int, int] | None:
    """How many predictions of the first output, the largest along axis 1, are equal, and of how many; ``None`` if it has no such axis.

    Args:
        network: the quantized network, a function of samples.
        reference: the same weights in float32.
        samples: inputs, each ``(S, ...)``.
    """
    same = total = 0
    for found, wanted in _runs(network, reference, samples, len(next(iter(samples.values())))):
        equal = equal_predictions(next(iter(found.values())), next(iter(wanted.values())))
        if equal is None:
            return None
        same, total = same + int(equal.sum()), total + equal.size
    return same, total


def equal_predictions(one: np.ndarray, other: np.ndarray) -> np.ndarray | None:
    """Whether the largest of each row of logits ``(N, C, ...)`` is the same: booleans ``(N, ...)``; ``None`` if there are no classes."""
    if one.ndim < 2 or one.shape[1] < 2 or one.dtype.kind != "f":
        return None
    result: np.ndarray = one.argmax(1) == other.argmax(1)
    return result


def _runs(
    network: Network, reference: Network, samples: Feeds, limit: int
) -> Iterator[tuple[Mapping[str, np.ndarray], Mapping[str, np.ndarray]]]:
    count = min(len(next(iter(samples.values()))), limit)
    for start in range(0, count, _BATCH):
        feeds = {name: array[start : min(start + _BATCH, count)] for name, array in samples.items()}
        yield network(feeds), reference(feeds)


def poorest(ratios: Mapping[str, float]) -> tuple[str, float] | None:
    """The output with the most noise and its ratio; ``None`` if no ratio is finite."""
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    return min(finite.items(), key=lambda item: item[1]) if finite else None
