"""Numbers that follow a schedule: alpha, a temperature, the weight of a loss."""

import math
from collections.abc import Iterable
from typing import Any

import lightning as L

from lightning_accel.core.arguments import checked
from lightning_accel.core.clock import first_step_of_epoch, step_of, timeline_of
from lightning_accel.core.schedules import Timeline, check_position, check_schedule, fraction
from lightning_accel.core.trainers import is_fast_dev_run
from lightning_accel.errors import InvalidArgumentError


class Scheduled:
    """A number that changes from ``first`` to ``last`` on a schedule, for ``alpha``, a temperature or a loss's weight.

    It depends on the optimizer step and the epoch only, so a resumed run continues with the same values.

    Args:
        first: value before ``start``.
        last: value from ``end`` on.
        schedule: ``"constant"``, ``"linear"``, ``"cubic"``, ``"cosine"`` or ``"exponential"``.
        start: epoch (int) or share of the run (float) at which it begins to change.
        end: epoch or share at which ``last`` is reached.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> alpha = Scheduled(0.9, 0.1, "linear")
        >>> alpha.move(step=50, timeline=Timeline(steps_per_epoch=10, total_steps=100))
        >>> round(float(alpha), 3)
        0.5
    """

    @checked()
    def __init__(
        self, first: float, last: float, schedule: str = "linear", start: int | float = 0, end: int | float = 1.0
    ) -> None:
        check_schedule(schedule)
        check_position("start", start)
        check_position("end", end)
        if type(start) is type(end) and end < start:
            raise InvalidArgumentError(f"Argument `end` must be at or after `start` ({start}), but got {end}.")
        self.first, self.last, self.schedule, self.start, self.end = first, last, schedule, start, end
        self._value = float(first)

    def __float__(self) -> float:
        """Value at the present step; ``first`` outside of a run."""
        return self._value

    def move(self, step: int, timeline: Timeline) -> None:
        """Set the value to that of an optimizer step.

        Between two epochs it counts in epochs, so that epochs of different length have the same share.

        Raises:
            InvalidArgumentError: in the first epoch: ``start`` or ``end`` lies outside of the run, or after the other.
        """
        start, end = timeline.estimate(self.start), timeline.estimate(self.end)
        if timeline.epoch == 0:  # later estimates may move
            start, end = timeline.step("start", self.start), timeline.step("end", self.end)
            if end < start:
                raise InvalidArgumentError(
                    f"Argument `end` must be at or after `start` ({self.start}), but got {self.end}."
                )
        progress = Timeline.progress(step, start, end)
        if isinstance(self.start, int) and isinstance(self.end, int):
            now = timeline.epoch_at(step)
            progress = Timeline.progress(timeline.epoch if math.isinf(now) else now, self.start, self.end)
        passed = fraction(self.schedule, progress)
        self._value = self.first + (self.last - self.first) * passed

    def __repr__(self) -> str:
        return f"Scheduled({self.first}, {self.last}, {self.schedule!r}, start={self.start}, end={self.end})"


Number = float | Scheduled


def bounds(number: Number) -> tuple[float, float]:
    """Smallest and largest value of a number."""
    if isinstance(number, Scheduled):
        return min(number.first, number.last), max(number.first, number.last)
    return number, number


def move_all(numbers: Iterable[Scheduled], trainer: L.Trainer) -> None:
    """Set the values to those of the Trainer's present step; unchanged in a fast_dev_run."""
    if not is_fast_dev_run(trainer):
        timeline = timeline_of(trainer, (trainer.current_epoch, first_step_of_epoch(trainer, within=True)))
        for number in numbers:
            number.move(step_of(trainer), timeline)


def find_scheduled(*owners: Any) -> dict[str, Scheduled]:
    """Find the :class:`Scheduled` attributes of objects by name, also of a wrapped ``loss``."""
    found: dict[str, Scheduled] = {}
    for owner in owners:
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, Scheduled):
                found[name] = value
            elif name == "loss":
                found |= find_scheduled(value)
    return found
