"""Base class of the compression callbacks: state key, position in the run, and checks before training."""

import math
from typing import Any

import lightning as L
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from typing_extensions import override

from lightning_accel.core import resizing, structure
from lightning_accel.core.layer_plot import log_layers
from lightning_accel.core.monitors import restart_monitors, stopped_epochs
from lightning_accel.core.packages import TrainerCallback, both
from lightning_accel.core.schedules import Timeline, check_position
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.errors import InvalidArgumentError, RunError

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
        self._start_step, self._end_step = 0, 0
        self._counting = False  # whether monitors were restarted, with every target reached

    resizes = 0  # what the channels of tensors that the callback resizes stay a multiple of; 0: it resizes none
    wants_low_rate = (
        True  # whether it should start at a small share of the peak learning rate; else only end well above 0
    )
    lr_scale = 1.0  # factor on the learning rate from its start on
    captures = False  # whether the callback records the network's shapes at its start: they must be final by then

    @property
    @override
    def state_key(self) -> str:
        return f"{_PREFIX}{type(self).__name__}.{self.name}"

    def phase_state(self) -> dict[str, Any]:
        """State that every compression callback keeps in a checkpoint: its steps, and targets not reached yet."""
        steps = [self._start_step, self._end_step]
        return {"steps": steps, "unfinished": self.unfinished(), "counting": self._counting}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._counting = state_dict.get("counting", False)

    @property
    def steps(self) -> tuple[int, int]:
        """First and last optimizer step of the phase; known once training has begun."""
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
        if stage == "fit":
            self._counting = False
            check_supported(trainer, pl_module, type(self).__name__)
            for argument, value in (("start", self.start), ("end", self.end)):
                endless = trainer.max_epochs in (None, -1) or is_fast_dev_run(trainer)
                if isinstance(value, int) and not endless and value > trainer.max_epochs:
                    raise InvalidArgumentError(
                        f"Argument `{argument}` must lie within the run's {trainer.max_epochs} epochs, but got {value}. "
                        "Train longer or start earlier."
                    )
        first = callbacks_of(trainer, CompressionCallback)[0]
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
        structure.no_restore(pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_fast_dev_run(trainer):
            self._start_step = self._end_step = 0  # a batch or two: everything is tried at once
            return
        timeline = timeline_of(trainer)
        self._start_step = timeline.step("start", self.start)
        self._end_step = self._start_step if self.end is None else timeline.step("end", self.end)
        if self._end_step < self._start_step:
            raise InvalidArgumentError(
                f"Argument `end` must be at or after `start` ({self.start}, step {self._start_step}), but got {self.end}, "
                f"which is step {self._end_step}."
            )

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
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
        if self._counting or _unfinished(trainer):
            return
        for callback in compression_callbacks(trainer):
            callback._counting = True
        restart_monitors(trainer)

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        stopped = stopped_epochs(trainer)
        marked = any(getattr(c, "incomplete", None) == "mark" for c in callbacks_of(trainer, L.Callback))
        if stopped and not marked and (missing := _unfinished(trainer)):
            raise RunError(
                f"EarlyStopping must leave the run until the targets are reached, but it stopped in epoch {stopped[0]}, and "
                f"{'; '.join(missing)}. The checkpoints are safe. Raise its `patience`, or let the phases end earlier."
            )
        if trainer.is_global_zero:
            title, shares = self.layer_shares(pl_module)
            log_layers(trainer.loggers, f"layers/{self.name}", shares, title, trainer.global_step)

    @override
    def on_save_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        structure.save_record(pl_module, checkpoint)


def compression_callbacks(trainer: L.Trainer) -> list[CompressionCallback]:
    """The run's callbacks that change the network, in the Trainer's order."""
    return callbacks_of(trainer, CompressionCallback)


def _unfinished(trainer: L.Trainer) -> list[str]:
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


def timeline_of(trainer: L.Trainer) -> Timeline:
    """Length of the run in optimizer steps; the training loader must be set up (``on_train_start`` or later)."""
    batches = trainer.num_training_batches
    steps = math.inf if math.isinf(batches) else math.ceil(batches / trainer.accumulate_grad_batches)
    total = math.inf if trainer.max_epochs in (None, -1) else steps * trainer.max_epochs
    return Timeline(steps, total if trainer.max_steps == -1 else min(total, trainer.max_steps))


def check_supported(trainer: L.Trainer, pl_module: L.LightningModule, who: str) -> None:
    """Reject unsupported settings before training.

    Raises:
        InvalidArgumentError: manual optimization, or a strategy that shards or wraps the module.
    """
    if not pl_module.automatic_optimization:
        raise InvalidArgumentError(
            f"Argument `automatic_optimization` must be True with {who}, but got False. Manual optimization isn't supported."
        )
    check_strategy(trainer, who)


def check_strategy(trainer: L.Trainer, who: str) -> None:
    """Reject strategies under which a process doesn't hold the whole module.

    Raises:
        InvalidArgumentError: the Trainer uses one.
    """
    if not isinstance(trainer.strategy, both(SingleDeviceStrategy, DDPStrategy)):
        raise InvalidArgumentError(
            f"Argument `strategy` must be a single device or DDP with {who}, but got {type(trainer.strategy).__name__}. "
            "Strategies that shard parameters aren't supported."
        )


def check_one_optimizer(trainer: L.Trainer, who: str) -> None:
    """Reject several optimizers as soon as they are configured.

    Raises:
        InvalidArgumentError: ``configure_optimizers`` returned several.
    """
    if len(trainer.optimizers) != 1:
        raise InvalidArgumentError(
            f"Method `configure_optimizers` must return one optimizer with {who}, but got {len(trainer.optimizers)}."
        )
