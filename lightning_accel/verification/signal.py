"""Signal-to-noise ratio of a quantized network against the float one. No torch needed."""

import math
from collections.abc import Mapping

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
    count = min(len(next(iter(samples.values()))), _SAMPLES)
    power: dict[str, float] = {}
    noise: dict[str, float] = {}
    for start in range(0, count, _BATCH):
        feeds = {name: array[start : min(start + _BATCH, count)] for name, array in samples.items()}
        found = network(feeds)
        for name, want in reference(feeds).items():
            if np.asarray(want).dtype.kind != "f":
                continue
            exact = np.asarray(want, np.float64)
            power[name] = power.get(name, 0.0) + float(np.square(exact).sum())
            noise[name] = noise.get(name, 0.0) + float(np.square(np.asarray(found[name], np.float64) - exact).sum())
    return {name: decibels(power[name], noise[name]) for name in power}


def poorest(ratios: Mapping[str, float]) -> tuple[str, float] | None:
    """The output with the most noise and its ratio; ``None`` if no ratio is finite."""
    finite = {name: ratio for name, ratio in ratios.items() if math.isfinite(ratio)}
    return min(finite.items(), key=lambda item: item[1]) if finite else None
