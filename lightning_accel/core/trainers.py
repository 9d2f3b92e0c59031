"""Typed access to attributes of a Trainer that Lightning doesn't annotate."""

from typing import TypeVar

import lightning as L

from lightning_accel.core.packages import both

_Callback = TypeVar("_Callback", bound=L.Callback)


def callbacks_of(trainer: L.Trainer, kind: type[_Callback]) -> list[_Callback]:
    """The Trainer's callbacks of a class, in the Trainer's order."""
    return [c for c in trainer.callbacks if isinstance(c, both(kind))]  # type: ignore[attr-defined]  # set by a connector


def is_fast_dev_run(trainer: L.Trainer) -> bool:
    """Whether the Trainer runs a few batches only, to try everything at once."""
    return bool(trainer.fast_dev_run)  # type: ignore[attr-defined]  # set by a function
