"""Trial runs of the user's own steps after a removal: a layer that only a step runs may need channels that ``forward`` can spare."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import lightning as L
from torch import nn

from lightning_accel.calls.contexts import isolated_random
from lightning_accel.calls.learned import seen_step
from lightning_accel.calls.observed import TRAINING, VALIDATION, SeenStep, run_step, trial_copy, users_module
from lightning_accel.pruning.channels.groups import Group
from lightning_accel.pruning.channels.slices import Chosen, removal_of, removed, spread_units

_STEPS = (TRAINING, VALIDATION)


class StepTrials:
    """Runs ``training_step`` and ``validation_step`` on a copy from which channels have left.

    Args:
        trainer: in ``fit``, its module and data attached.
        pl_module: the LightningModule; not changed.
    """

    def __init__(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._trainer, self._pl_module = trainer, pl_module

    def kept(self, groups: Sequence[Group]) -> list[Group]:
        """The groups, those kept without whose channels a step fails.

        A step that fails, or that can't be run on a copy, with all channels says nothing about any of them.
        """
        open_ = [i for i, group in enumerate(groups) if not group.kept]
        seen = [seen_step(self._trainer, self._pl_module, step) for step in _STEPS]
        works = [step for step in seen if step.calls and not step.error]
        if not open_ or not works:
            return list(groups)
        with isolated_random(), suppress(_NotCopiedError):
            return self._failing(list(groups), open_, self._copy(), works)
        return list(groups)

    def _copy(self) -> nn.Module:
        teacher = getattr(self._pl_module, "teacher", None)
        try:
            copy: nn.Module = trial_copy(self._pl_module, self._trainer, [] if teacher is None else [teacher])
        except Exception as error:  # a module may hold anything
            raise _NotCopiedError from error
        return copy

    def _failing(
        self, groups: list[Group], wanted: Sequence[int], copy: nn.Module, steps: Sequence[SeenStep]
    ) -> list[Group]:
        """Keep the groups that fail: all at once, then halves."""
        error = self._error(groups, wanted, copy, steps)
        if not error:
            return groups
        if len(wanted) == 1:
            groups[wanted[0]] = replace(groups[wanted[0]], kept=error)
            return groups
        half = len(wanted) // 2
        for part in (wanted[:half], wanted[half:]):
            groups = self._failing(groups, part, copy, steps)
        left = [i for i in wanted if not groups[i].kept]
        if error := self._error(groups, left, copy, steps):  # none fails by itself
            for i in left:
                groups[i] = replace(groups[i], kept=error)
        return groups

    def _error(self, groups: Sequence[Group], wanted: Sequence[int], copy: nn.Module, steps: Sequence[SeenStep]) -> str:
        """Why a step fails after half of the units of some groups have left; empty if none does."""
        chosen: Chosen = {i: spread_units(groups[i].units, 0.5, i) for i in wanted}
        with removed(copy, removal_of(copy, groups, chosen)):
            for seen in steps:
                module: Any = users_module(copy)
                if error := run_step(module, self._trainer, seen.step, seen.batch).error:
                    return f"`{seen.step}` needs all of its channels: {error}"
        return ""


class _NotCopiedError(Exception):
    """The module can't be copied."""
