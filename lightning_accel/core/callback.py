"""Base class of the compression callbacks: state key, position in the run, and checks before training."""

import logging
from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lightning_accel.core import resizing, structure
from lightning_accel.core.clock import first_step_of_epoch, is_manual, step_of, timeline_of
from lightning_accel.core.finite import nan_input, nan_weight
from lightning_accel.core.layer_plot import log_layers
from lightning_accel.core.monitors import restart_monitors, stopped_epochs
from lightning_accel.core.packages import TrainerCallback
from lightning_accel.core.schedules import Timeline, check_position, passed
from lightning_accel.core.shards import settle
from lightning_accel.core.strategies import Capability, require
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.errors import InvalidArgumentError, RunError

LOG = logging.getLogger("lightning.pytorch.accel")  # below Lightning's, whose handler prints it
_PREFIX = "lightning_accel."


class CompressionCallback(TrainerCallback):
    """Base of the callbacks that change the network during ``fit``.

    Args:
        name: the callback's state sits under it in the checkpoint, so two of a kind can be used.
        start: epoch (int) or share of the run (float) at which the phase begins.
        end: epoch or share at which its target is reached; ``None``: no end of its own.
    """

    def __init__(self, *, name: str, start: float = 0, end: float | None = None) -> None:
        if not isinstance(name, str) or not name:
            raise InvalidArgumentError(f"Argument `name` must be a non-empty string, but got {name!r}.")
        check_position("start", start)
        check_position("end", end)
        if end is not None and type(start) is type(end) and end < start:
            raise InvalidArgumentError(f"Argument `end` must be at or after `start` ({start}), but got {end}.")
        self.name, self.start, self.end = name, start, end
        self._start_step: float = 0
        self._end_step: float = 0
        self._epoch: tuple[int, int] | None = None  # the present epoch, and the optimizer step at which it began
        self._begun = False  # whether the phase has begun: its start no longer moves
        self._counting = False  # whether monitors were restarted, with every target reached
        self._ended = False  # whether the run came to its end
        self._looks = False  # whether this callback looks at the loss of a step
        self._batch: Any = None  # of the present step, to name what a NaN comes from
        self._told = True  # whether conflicts with other phases were told in this run
        self._placed_epoch = -1  # epoch at whose beginning the phase was placed last

    prunes_weights = False  # whether the callback zeroes weights
    resizes = 0  # what the channels of tensors that the callback resizes stay a multiple of; 0: it resizes none
    wants_low_rate = (
        True  # whether it should start at a small share of the peak learning rate; else only end well above 0
    )
    lr_scale = 1.0  # factor on the learning rate from its start on
    needs = Capability.WHOLE  # what the strategy must offer
    sharded_instead = ""  # what to do under a strategy that shards tensors, if the callback needs whole ones
    captures = False  # whether the callback records the network's shapes at its start: they must be final by then

    @property
    @override
    def state_key(self) -> str:
        return f"{_PREFIX}{type(self).__name__}.{self.name}"

    def phase_state(self) -> dict[str, Any]:
        """State that every compression callback keeps in a checkpoint: its place in the run, and targets not reached yet."""
        return {
            "steps": [self._start_step, self._end_step],
            "positions": [self.start, self.end],
            "epoch": None if self._epoch is None else list(self._epoch),
            "begun": self._begun,
            "unfinished": self.unfinished(),
            "counting": self._counting,
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counting = state_dict.get("counting", False)
        if epoch := state_dict.get("epoch"):
            self._epoch = (epoch[0], epoch[1])
        if state_dict.get("positions") == [self.start, self.end]:  # otherwise the phase is placed anew
            self._start_step, self._end_step = state_dict["steps"]
            self._begun = state_dict["begun"]

    @property
    def steps(self) -> tuple[float, float]:
        """First and last optimizer step of the phase by what is known at the present epoch; ``inf`` if it isn't known yet."""
        return self._start_step, self._end_step

    def unfinished(self) -> str:
        """Reason why the callback's target isn't reached yet; empty once it is."""
        raise NotImplementedError

    @property
    def benefit(self) -> str:
        """Benefit at run time, for the plan and the report."""
        return ""

    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        """Planned change of each layer or weight, by name, or the reason why it stays; available after ``on_train_start``."""
        return {}

    def conflicts(self, trainer: L.Trainer) -> list[str]:
        """Phases of the run that counteract this one, each with its fix; available after ``on_train_start``."""
        return []

    def out_of_reach(self, trainer: L.Trainer) -> str:
        """Why a run of this length can't reach the target, with the fix; empty if it can, or if that isn't known yet."""
        return ""

    def predicted(self, pl_module: L.LightningModule) -> dict[str, int]:
        """Parameters and MACs of the network once the phase is over, if it changes them."""
        return {}

    def predicted_entries(self, pl_module: L.LightningModule) -> dict[str, int]:
        """Entries of each parameter, by name, once the phase is over, if it changes them."""
        return {}

    def measured(self, pl_module: L.LightningModule) -> dict[str, dict[str, Any]]:
        """Values counted on the tensors, for the report: by kind (``"sparsity"``, ``"channels"``), by layer and for ``"all"``."""
        return {}

    def layer_shares(self, pl_module: L.LightningModule) -> tuple[str, dict[str, float]]:
        """Title and removed share of each layer, for the plot in the loggers; empty if there is nothing to plot."""
        return "", {}

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        structure.keep_record(pl_module)
        if stage == "fit":
            self._counting, self._epoch, self._begun, self._ended = False, None, False, False
            self._placed_epoch, self._told = -1, False
            require(trainer, type(self).__name__, self.needs, self.sharded_instead)
            for argument, value in (("start", self.start), ("end", self.end)):
                endless = trainer.max_epochs in (None, -1) or is_fast_dev_run(trainer)
                if isinstance(value, int) and not endless and value > trainer.max_epochs:
                    raise InvalidArgumentError(
                        f"Argument `{argument}` must lie within the run's {trainer.max_epochs} epochs, but got {value}. "
                        "Train longer or start earlier."
                    )
        first = callbacks_of(trainer, CompressionCallback)[0]
        # A gradient scaler skips steps with NaN.
        self._looks = first is self and stage == "fit" and trainer.precision != "16-mixed"
        if first is self:  # the record is the whole module's: once is enough
            structure.before_next_restore(
                trainer, pl_module, lambda checkpoint: _replay(trainer, pl_module, checkpoint, stage)
            )

    def structure_replayed(self, pl_module: L.LightningModule) -> None:
        """Called when the module has got the structure of a checkpoint, before its weights are restored."""

    def structure_changed(self, pl_module: L.LightningModule, change: structure.Change) -> None:
        """Called after parameters of the module were resized, by any callback or on resume."""

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.strategy.restore_checkpoint_after_setup:
            structure.no_restore(pl_module)
        settle(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        structure.no_restore(pl_module)
        between = self._epoch is not None and self._epoch[0] != trainer.current_epoch
        self._place(trainer)
        if between:  # resumed at the end of an epoch: Lightning has yet to ask for the next one's loader
            self._placed_epoch = -1

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._place(trainer)
        self._enter_epoch(trainer, pl_module)
        found = self.conflicts(trainer) if not self._told and trainer.is_global_zero else []
        if not self._told and refuses_incomplete(trainer) and (reason := self.out_of_reach(trainer)):
            raise InvalidArgumentError(f"The run must be long enough for what is to ship, but {reason}")
        self._told = True
        for text in found:
            LOG.warning("Conflict: %s", text)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._batch = batch if self._looks else None
        if self._placed_epoch != trainer.current_epoch and not is_fast_dev_run(trainer):
            self._place(trainer)  # after some resumes Lightning leaves `on_train_epoch_start` out
            self._enter_epoch(trainer, pl_module)

    def _enter_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Called before the first step of an epoch, with the phase placed by what is known at its beginning."""

    @override
    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: torch.Tensor) -> None:
        batch = self._batch
        if not is_manual(trainer):  # otherwise the step may call backward again
            self._batch = None
        if not self._looks:
            return
        # Later losses are read where that costs nothing; on a GPU it would stall the queue in each step.
        self._looks = loss.device.type == "cpu"
        if bool(loss.isnan().any()):  # the step would make all weights NaN, and no importance could be compared
            found = (  # inputs first: the statistics of batch norm have taken them over already
                nan_input(batch) or nan_weight(pl_module) or "weights and inputs are numbers: look at the loss itself"
            )
            raise RunError(
                f"The loss of `training_step` must be a number, but got NaN in step {step_of(trainer)}: {found}."
            )

    def _place(self, trainer: L.Trainer) -> None:
        """Place the phase by what is known of the run at the beginning of an epoch."""
        if is_fast_dev_run(trainer):
            self._start_step = self._end_step = 0  # a batch or two: everything is tried at once
            return
        first, present = self._epoch is None, trainer.current_epoch
        if self._epoch is None:
            self._epoch = (present, first_step_of_epoch(trainer))
        elif self._epoch[0] != present:
            self._epoch = (present, step_of(trainer))
        self._placed_epoch = present
        self._place_phase(trainer, timeline_of(trainer, self._epoch), check=first)

    def _place_phase(self, trainer: L.Trainer, timeline: Timeline, check: bool) -> None:
        """Determine the phase's first and last step.

        Args:
            trainer: of the run.
            timeline: what is known of the run.
            check: whether the positions must lie within the run: at its beginning. Later nothing can be done about them, and what
                isn't reached is reported at the end.

        Raises:
            InvalidArgumentError: they don't.
        """
        at = timeline.step if check else lambda argument, value: timeline.estimate(value)
        if not self._begun:
            self._start_step = at("start", self.start)
        elif self.start == timeline.epoch and isinstance(self.start, int):
            self._start_step = timeline.first_step  # it began with the last step of the epoch before
        self._end_step = self._start_step if self.end is None else at("end", self.end)
        if check and self._end_step < self._start_step:
            raise InvalidArgumentError(
                f"Argument `end` must be at or after `start` ({self.start}, step {self._start_step:g}), but got {self.end}, "
                f"which is step {self._end_step:g}."
            )

    def _begins(self, trainer: L.Trainer, epoch: int | None = None) -> bool:
        """Whether the phase has begun at the next optimizer step.

        Args:
            trainer: of the run.
            epoch: epoch of that step; by default the present one.
        """
        epoch = trainer.current_epoch if epoch is None else epoch
        if not self._begun and passed(self.start, self._start_step, epoch, step_of(trainer)):
            self._begun = not is_fast_dev_run(trainer)
            return True
        return self._begun or is_fast_dev_run(trainer)

    def _progress(self, trainer: L.Trainer, epoch: int) -> float:
        """Share of the phase that has passed before the next optimizer step, which belongs to ``epoch``; negative before the phase.

        Between two epochs it counts in epochs, so that epochs of different length have the same share.
        """
        step = step_of(trainer)
        if not self._begins(trainer, epoch):
            return -1.0
        if is_fast_dev_run(trainer) or passed(self.end, self._end_step, epoch, step):
            return 1.0
        if isinstance(self.start, int) and isinstance(self.end, int) and self._epoch is not None:
            into = 0.0
            if epoch == self._epoch[0]:
                length = timeline_of(trainer, self._epoch).steps_per_epoch
                into = min((step - self._epoch[1]) / length, 1.0)
            return max(epoch + into - self.start, 0.0) / (self.end - self.start)
        return max(Timeline.progress(step, self._start_step, self._end_step), 0.0)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batch = None
        self._count_once_complete(trainer)  # what monitors a training metric may look at it right after

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._count_once_complete(trainer)

    @override
    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._count_once_complete(trainer)

    def _count_once_complete(self, trainer: L.Trainer) -> None:
        """Restart monitors as soon as the last target of the run is reached."""
        if self._counting or unfinished_targets(trainer):
            return
        for callback in compression_callbacks(trainer):
            callback._counting = True
        restart_monitors(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stopped = stopped_epochs(trainer)
        self._ended = not is_fast_dev_run(trainer)
        if stopped and not may_be_incomplete(trainer) and (missing := unfinished_targets(trainer)):
            raise RunError(
                f"EarlyStopping must leave the run until the targets are reached, but it stopped in epoch {stopped[0]}, and "
                f"{'; '.join(missing)}. The checkpoints are safe. Raise its `patience`, or let the phases end earlier."
            )
        if trainer.is_global_zero:
            title, shares = self.layer_shares(pl_module)
            log_layers(trainer.loggers, f"layers/{self.name}", shares, title, trainer.global_step)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        last = self._ended and compression_callbacks(trainer)[-1] is self
        self._ended = False
        if last and trainer.is_global_zero and (missing := unfinished_targets(trainer)):
            # An error, logged after all else: warnings are often filtered, and this isn't the network that was asked for.
            LOG.error(unfinished_line(missing))


def compression_callbacks(trainer: L.Trainer) -> list[CompressionCallback]:
    """The run's callbacks that change the network, in the Trainer's order."""
    return callbacks_of(trainer, CompressionCallback)


def may_be_incomplete(trainer: L.Trainer) -> bool:
    """Whether the user has agreed to a network that hasn't reached its targets: ``ModelExport(incomplete="mark")``."""
    return any(getattr(c, "incomplete", None) == "mark" for c in callbacks_of(trainer, L.Callback))


def refuses_incomplete(trainer: L.Trainer) -> bool:
    """Whether a callback will refuse a network that hasn't reached its targets, as ``ModelExport`` does by default."""
    return any(getattr(c, "incomplete", None) == "refuse" for c in callbacks_of(trainer, L.Callback))


def unfinished_line(missing: Sequence[str]) -> str:
    """The sentence with which a run ends whose targets aren't reached."""
    return f"The run ended before its targets were reached: {'; '.join(missing)}. Train longer, or let the phases end earlier."


def unfinished_targets(trainer: L.Trainer) -> list[str]:
    """Targets that the run's compression callbacks haven't reached yet."""
    return [reason for c in compression_callbacks(trainer) if (reason := c.unfinished())]


def _replay(trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any], stage: str) -> None:
    """Bring the module to the structure of a checkpoint that is about to be restored."""
    callbacks = compression_callbacks(trainer)
    if stage == "fit":
        known = {c.state_key for c in callbacks_of(trainer, L.Callback)}
        lost = [k for k in checkpoint.get("callbacks", {}) if k.startswith(_PREFIX) and k not in known]
        if lost:
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must be resumed with the callbacks that wrote it, but got a checkpoint with state "
                f"of {', '.join(k.removeprefix(_PREFIX) for k in lost)}, for which the Trainer has no callback. "
                "Add it back, with the same `name`."
            )
    changes = structure.load_record(checkpoint)
    made = structure.replay(pl_module, changes)
    resizing = [change for change in changes if structure.resized(change)]
    for average in structure.average_models(trainer):
        structure.replay(average, resizing)
    structure.restore_states(pl_module, checkpoint)
    for callback in callbacks:
        for change in made:
            if change in resizing:
                callback.structure_changed(pl_module, change)
        callback.structure_replayed(pl_module)


def change_structure(trainer: L.Trainer, pl_module: L.LightningModule, change: structure.Change) -> None:
    """Apply a structural change between two epochs and keep everything that holds tensors of the module consistent.

    Optimizers keep their parameters and the surviving entries of their state, averaged copies (EMA, SWA) change in the same way, the
    DDP wrapper is rebuilt, and the other callbacks are notified.

    Args:
        trainer: the running Trainer; on every rank at the same boundary.
        pl_module: its module.
        change: the same on every rank.

    Raises:
        RunError: an optimizer keeps state that can't be resized.
    """
    follow = resizing.optimizer_state_follows(trainer.optimizers, pl_module, structure.resized(change))
    structure.apply(pl_module, change)
    follow()
    for average in structure.average_models(trainer):
        structure.apply(average, change)
    resizing.rewrap(trainer)
    for callback in callbacks_of(trainer, L.Callback):
        if isinstance(callback, CompressionCallback):
            callback.structure_changed(pl_module, change)
    told = getattr(pl_module, "structure_changed", None)
    if callable(told):  # a DistillationModule, whose adapters follow the student's channels
        told(change)
