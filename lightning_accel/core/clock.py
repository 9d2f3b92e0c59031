"""The step clock: what a run's steps are, how many were taken, and how many an epoch and the run have.

With automatic optimization a step is an optimizer step. With manual optimization it is a training batch, however often and on however many
optimizers the user's ``training_step`` steps: ``Trainer.global_step`` counts each of these, so phases placed by it would end early.
"""

import math
from dataclasses import replace
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_accel.core.schedules import Timeline
from lightning_accel.core.trainers import callbacks_of


def is_manual(trainer: L.Trainer) -> bool:
    """Whether the run's module makes its optimizer steps itself (``automatic_optimization = False``)."""
    return not trainer.lightning_module.automatic_optimization


def step_of(trainer: L.Trainer) -> int:
    """Number of steps that the run has taken: optimizer steps, or training batches with manual optimization."""
    if not is_manual(trainer):
        return trainer.global_step
    progress: Any = trainer.fit_loop.epoch_loop.batch_progress
    return int(progress.total.processed)


def first_step_of_epoch(trainer: L.Trainer, within: bool = False) -> int:
    """Step at which the present epoch began.

    Args:
        trainer: of the run.
        within: whether a batch of the epoch is being trained; otherwise one may just have ended.
    """
    if trainer.is_last_batch and not within:
        return step_of(trainer)
    loop: Any = trainer.fit_loop.epoch_loop
    if is_manual(trainer):
        return step_of(trainer) - int(loop.batch_progress.current.processed)
    return trainer.global_step - int(loop.automatic_optimization.optim_progress.optimizer.step.current.completed)


def timeline_of(trainer: L.Trainer, epoch: tuple[int, int] | None = None) -> Timeline:
    """Length of the run in steps; the training loader must be set up (``on_train_start`` or later).

    Args:
        trainer: of the run.
        epoch: an epoch and the step at which it began; by default the present one.

    Returns:
        What is known at the beginning of that epoch. Loaders without a length are expected to be as long as they were on average.
    """
    present, first = epoch or (trainer.current_epoch, first_step_of_epoch(trainer))
    batches = trainer.num_training_batches
    schedulers = callbacks_of(trainer, GradientAccumulationScheduler)
    changes = max((max(s.epochs) for s in schedulers), default=0)

    def length(at: int) -> float:
        if math.isinf(batches):
            return first / present if present and first else math.inf
        each = schedulers[0].get_accumulate_grad_batches(at) if schedulers else trainer.accumulate_grad_batches
        return math.ceil(batches / each)

    epochs = math.inf if trainer.max_epochs in (None, -1) else trainer.max_epochs
    lengths = tuple(length(at) for at in range(present, max(present, changes) + 1))
    line = Timeline(lengths[0], math.inf, present, first, lengths, epochs)
    total = math.inf if math.isinf(epochs) else line.estimate(int(epochs))
    return replace(line, total_steps=total if trainer.max_steps == -1 else min(total, _step_of_max_steps(trainer)))


def _step_of_max_steps(trainer: L.Trainer) -> float:
    """Step at which ``max_steps`` ends the run.

    With manual optimization it counts the steps of every optimizer. How many a batch takes isn't known before the first one: each optimizer
    is expected to step once, and from then on as often as it did on average.
    """
    if not is_manual(trainer):
        return trainer.max_steps
    taken, stepped = step_of(trainer), trainer.global_step
    each = stepped / taken if taken and stepped else len(trainer.optimizers) or 1
    return math.ceil(trainer.max_steps / each)
