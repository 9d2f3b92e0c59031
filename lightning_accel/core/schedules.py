"""Schedules (progress to fraction) and positions in a run (epochs or shares to optimizer steps).

Everything here is pure: numbers in, numbers out.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

from lightning_accel.errors import InvalidArgumentError

Schedule = Callable[[float], float]


def constant(progress: float) -> float:
    """The whole fraction from the first step on (one-shot)."""
    return 1.0


def linear(progress: float) -> float:
    """Proportional to progress."""
    return progress


def cubic(progress: float) -> float:
    """``1 - (1 - t)^3``: fast while much is redundant, slow near the end (https://arxiv.org/abs/1710.01878, eq. 1)."""
    return 1.0 - (1.0 - progress) ** 3


def cosine(progress: float) -> float:
    """``(1 - cos(pi t)) / 2``: slow at both ends."""
    return (1.0 - math.cos(math.pi * progress)) / 2.0


def exponential(progress: float) -> float:
    """``(1 - e^(-5 t)) / (1 - e^(-5))``: as cubic, with more of it early."""
    return (1.0 - math.exp(-5.0 * progress)) / (1.0 - math.exp(-5.0))


SCHEDULES: dict[str, Schedule] = {f.__name__: f for f in (constant, linear, cubic, cosine, exponential)}


def fraction(schedule: str | Schedule, progress: float) -> float:
    """Fraction of the target at a progress.

    Args:
        schedule: a key of ``SCHEDULES``, or a function that :func:`check_schedule` has checked.
        progress: share of the phase that has passed; values outside [0, 1] are clamped.

    Returns:
        0 before the phase, 1 from its end on.

    Example:
        >>> fraction("cubic", 0.5)
        0.875
    """
    if progress < 0.0:
        return 0.0
    if progress >= 1.0:
        return 1.0
    return (schedule if callable(schedule) else SCHEDULES[check_schedule(schedule)])(progress)  # type: ignore[index]


def check_schedule(schedule: str | Schedule) -> str | Schedule:
    """Return ``schedule`` if it is known, or a function that never falls, from 0 or more at 0 to 1 at 1.

    Raises:
        InvalidArgumentError: it is neither.
    """
    if not callable(schedule):
        if schedule not in SCHEDULES:
            raise InvalidArgumentError(
                f"Argument `schedule` must be one of {sorted(SCHEDULES)} or a function of progress, but got {schedule!r}."
            )
        return schedule
    try:
        values = [float(schedule(i / 100)) for i in range(101)]
    except Exception as error:  # whatever the function raises
        raise InvalidArgumentError(
            f"Argument `schedule` must be a function of progress in [0, 1] that returns a number, but got {schedule!r}, which raises "
            f"{type(error).__name__}: {error}."
        ) from error
    if values[0] < 0 or abs(values[-1] - 1.0) > 1e-9 or any(b < a for a, b in pairwise(values)):
        raise InvalidArgumentError(
            "Argument `schedule` must never fall, from 0 or more at progress 0 to 1 at progress 1, but got a function with "
            f"{values[0]:g} at 0, {values[50]:g} at 0.5 and {values[-1]:g} at 1."
        )
    return schedule


def check_position(argument: str, value: float | None) -> None:
    """Check a position in a run: an int is an epoch, a float a share of the run.

    Raises:
        InvalidArgumentError: a negative epoch or a share outside [0, 1].
    """
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidArgumentError(
            f"Argument `{argument}` must be an epoch (int) or a share of the run (float), but got {value!r}."
        )
    if isinstance(value, int) and value < 0:
        raise InvalidArgumentError(f"Argument `{argument}` must be an epoch >= 0, but got {value}.")
    if isinstance(value, float) and not 0.0 <= value <= 1.0:
        raise InvalidArgumentError(
            f"Argument `{argument}` must be a share of the run in [0, 1], but got {value}. "
            "A float is a share; write an int for an epoch."
        )


@dataclass(frozen=True)
class Timeline:
    """Length of a run in optimizer steps, as far as it is known at the beginning of one of its epochs.

    Epochs that are over have the length that they had; the present one and those to come are estimates, which a loader that grows or
    shrinks corrects at the next epoch.

    Args:
        steps_per_epoch: optimizer steps in the present epoch; ``inf`` if unknown.
        total_steps: optimizer steps in the run; ``inf`` if unknown.
        epoch: the present epoch.
        first_step: optimizer step at which the present epoch began.
        lengths: optimizer steps in the present epoch and in those that follow; the last one holds for all others.
        max_epochs: epochs in the run; ``inf`` if it doesn't end by them.
    """

    steps_per_epoch: float
    total_steps: float
    epoch: int = 0
    first_step: int = 0
    lengths: tuple[float, ...] = ()
    max_epochs: float = math.inf

    def step(self, argument: str, value: float) -> float:
        """Optimizer step (0-based) at a position: an int counts epochs, a float is a share of the run.

        Returns:
            The step, or ``inf`` for a position that a later epoch makes known.

        Raises:
            InvalidArgumentError: the run is too short for it, or its length never becomes known.
        """
        step = self.estimate(value)
        if isinstance(value, float) and math.isinf(step) and not 1 < self.max_epochs < math.inf:
            raise InvalidArgumentError(
                f"Argument `{argument}` must be 0 or an epoch (int) in a run of unknown length, but got {value}. Set `max_steps` and, for "
                "loaders without a length, `limit_train_batches` on the Trainer."
            )
        if self.total_steps < step < math.inf:
            raise InvalidArgumentError(
                f"Argument `{argument}` must lie within the run, but got {value}, which is step {step:g} of a run of "
                f"{self.total_steps:g} steps ({self.epochs:g} epochs). Train longer or start earlier."
            )
        return step

    def estimate(self, value: float) -> float:
        """Optimizer step at a position by what is known now; ``inf`` if it isn't, or if it lies behind an epoch of unknown length."""
        if value == 0:
            return 0
        if isinstance(value, float):
            return math.inf if math.isinf(self.total_steps) else round(value * self.total_steps)
        if value <= self.epoch:
            return round(self.first_step * value / self.epoch)  # its length isn't remembered
        known = (self.lengths or (self.steps_per_epoch,))[: value - self.epoch]
        rest = value - self.epoch - len(known)
        return self.first_step + sum(known) + (rest * known[-1] if rest else 0)

    @property
    def epochs(self) -> float:
        """Epochs in the run, with the begun part of its last one; ``inf`` if unknown."""
        return min(self.max_epochs, self.epoch_at(self.total_steps))

    def epoch_at(self, step: float) -> float:
        """Position of an optimizer step in epochs; ``inf`` if it lies behind an epoch of unknown length."""
        if step < self.first_step:
            return self.epoch * step / self.first_step
        epoch, begins = self.epoch, float(self.first_step)
        while epoch < self.epoch + len(self.lengths) and begins + self._length(epoch) <= step < math.inf:
            begins += self._length(epoch)
            epoch += 1
        length = self._length(epoch)
        if step == begins:
            return epoch
        return math.inf if math.isinf(length) or math.isinf(step) else epoch + (step - begins) / length

    def _length(self, epoch: int) -> float:
        """Optimizer steps in the present epoch or a later one."""
        lengths = self.lengths or (self.steps_per_epoch,)
        return lengths[min(epoch - self.epoch, len(lengths) - 1)]

    @staticmethod
    def progress(step: float, start: float, end: float) -> float:
        """Share of a phase that has passed before ``step``; negative before it. A phase without length is over at once."""
        if step < start:
            return -1.0
        return 1.0 if step >= end else (step - start) / (end - start)


def passed(value: float | None, at_step: float, epoch: int, step: int) -> bool:
    """Whether a position in a run is reached.

    Args:
        value: an int is an epoch, and reached with it, however long epochs are; a share of the run and ``None`` are reached by their
            step.
        at_step: estimated optimizer step of the position.
        epoch: epoch of the next optimizer step.
        step: number of the next optimizer step.

    Example:
        >>> passed(2, at_step=10, epoch=1, step=12), passed(0.5, at_step=10, epoch=1, step=12)
        (False, True)
    """
    return epoch >= value if isinstance(value, int) else step >= at_step
