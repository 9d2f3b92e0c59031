"""Signal-to-noise ratios in decibels."""

import math

POOR = 10.0  # a tenth of the signal's power is noise


def decibels(signal: float, noise: float) -> float:
    """Ratio of two powers in dB: infinite without noise, not a number without a signal.

    Example:
        >>> decibels(100.0, 1.0)
        20.0
    """
    if signal == 0.0:
        return math.nan
    return math.inf if noise == 0.0 else 10 * math.log10(signal / noise)
