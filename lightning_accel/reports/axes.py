"""Axes of a plot: map values to coordinates, and choose round tick values."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Axis:
    """One axis of a plot.

    Args:
        low: value at its beginning.
        high: value at its end.
        start: coordinate of ``low``.
        end: coordinate of ``high``; smaller than ``start`` for an axis that points up.
        log: whether equal steps are equal factors.
    """

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """Coordinate of a value."""
        low, high, value = (math.log(v) if self.log else v for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def ticks(self, count: int = 5) -> list[float]:
        """About ``count`` round values within the range of the axis.

        Example:
            >>> Axis(0, 10.4, 0, 100).ticks()
            [0.0, 5.0, 10.0]
        """
        if self.log:
            first, last = math.floor(math.log10(self.low)), math.ceil(math.log10(self.high))
            values = [digit * 10.0**power for power in range(first, last + 1) for digit in (1, 2, 5)]
            inside = [value for value in values if self.low <= value <= self.high]
            return inside if len(inside) <= count + 1 else [v for v in inside if f"{v:.0e}".startswith("1")]
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [round(i * step, 10) for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def axis_of(values: list[float], start: float, end: float, *, zero: bool = False, log: bool = False) -> Axis:
    """An axis that contains all values with a margin.

    Args:
        values: at least one; above 0 if ``log``.
        start: coordinate of its beginning.
        end: coordinate of its end.
        zero: begin at 0.
        log: see :class:`Axis`.
    """
    low, high = min(values), max(values)
    if log:
        return Axis(low / 1.5, high * 1.5, start, end, log=True)
    margin = 0.08 * (high - low) or 0.1 * abs(high) or 1.0
    return Axis(0.0 if zero else low - margin, high + (0.12 * high if zero and high > 0 else margin), start, end)


def short(value: float) -> str:
    """A number for an axis: at most four digits.

    Example:
        >>> [short(v) for v in (0, 0.0001, 0.25, 12.5, 1200, 250000, 3e6)]
        ['0', '1e-4', '0.25', '12.5', '1,200', '250k', '3M']
    """
    if value == 0:
        return "0"
    for unit, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= unit * (10 if letter == "k" else 1):
            return f"{value / unit:.3g}{letter}"
    if abs(value) < 0.001:
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _round_step(step: float) -> float:
    power = 10.0 ** math.floor(math.log10(step))
    return float(next(digit * power for digit in (1, 2, 5, 10) if digit * power >= step * 0.999))
