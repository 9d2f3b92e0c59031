"""Dry run of ``fit``: report the changes of each callback to each layer, without training."""

import copy
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import lightning as L
from lightning.pytorch.utilities.exceptions import _TunerExitException
from typing_extensions import override

from lightning_accel.calls.contexts import has_forward
from lightning_accel.calls.copies import count_macs, parameter_count, skeleton
from lightning_accel.calls.discovery import owner_and_call
from lightning_accel.core.arguments import checked
from lightning_accel.core.callback import CompressionCallback, compression_callbacks
from lightning_accel.core.clock import is_manual, timeline_of
from lightning_accel.core.packages import TrainerCallback, check_one_package, counterpart
from lightning_accel.core.schedules import Timeline
from lightning_accel.distillation.conflicts import conflicts
from lightning_accel.errors import RunError
from lightning_accel.quantization.base_callback import QuantizingCallback

_HIGH = 0.1  # share of the peak learning rate above which quantization starts too early
_LOW = 0.01  # share of the peak learning rate below which the network hardly recovers from pruning
_BYTES = "bytes of weights"
_LONGEST = 500_000  # largest number of steps for which learning rates are simulated


@dataclass
class Phase:
    """Phase of one callback.

    Args:
        callback: its class and name.
        steps: first and last optimizer step; ``inf`` if loaders have no length and only a later epoch shows it.
        epochs: the same in epochs; ``None`` if unknown.
        lr: learning rate of the first parameter group at the first step; ``None`` if unknown.
        lr_share: the same as a share of the run's highest.
        benefit: effect on the deployed network; may be empty.
        layers: layer or weight -> its change, or the reason why it isn't changed.
    """

    callback: str
    steps: tuple[float, float]
    epochs: tuple[float | None, float | None]
    lr: float | None
    lr_share: float | None
    benefit: str
    layers: dict[str, str]


@dataclass
class Plan:
    """Result of a dry run of ``fit``.

    Args:
        steps_per_epoch: optimizer steps.
        total_steps: of the run.
        sizes: parameters, MACs of one sample and bytes of weights, at present and predicted for the end.
        phases: phases in chronological order.
        warnings: settings that may be unintended.
        conflicts: phases that counteract each other, and fixes.
    """

    steps_per_epoch: float
    total_steps: float
    sizes: dict[str, dict[str, int]]
    phases: list[Phase] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    conflicts: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def __str__(self) -> str:
        total, each = (
            f"{n:g}" if n < math.inf else "an unknown number of" for n in (self.total_steps, self.steps_per_epoch)
        )
        lines = [f"{total} optimizer steps, {each} an epoch"]
        for what, size in self.sizes.items():
            lines.append(f"{what}: " + ", ".join(f"{number:,} {unit}" for unit, number in size.items()))
        for phase in self.phases:
            begin, end = (_where(*at) for at in zip(phase.epochs, phase.steps, strict=True))
            until = f" to {end}" if end != begin else ""
            rate = "" if phase.lr is None else f", learning rate {phase.lr:.3g} ({phase.lr_share:.0%} of the highest)"
            lines += ["", f"{phase.callback}: from {begin}{until}{rate}"]
            lines += [f"  brings: {phase.benefit}"] if phase.benefit else []
            width = max((len(name) for name in phase.layers), default=0)
            lines += [f"  {name:<{width}}  {what}" for name, what in phase.layers.items()]
        remarks = [*(f"conflict: {text}" for text in self.conflicts), *(f"warning: {text}" for text in self.warnings)]
        lines += ["", *remarks] if remarks else []
        return "\n".join(lines)


@checked()
def plan(
    trainer: L.Trainer,
    model: L.LightningModule,
    train_dataloaders: Any = None,
    val_dataloaders: Any = None,
    datamodule: L.LightningDataModule | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> Plan:
    """Run ``fit`` up to the first training step, and predict the changes of the callbacks from there.

    All checks before training run. Nothing is trained, logged or written. Called as ``trainer.fit`` is:
    ``plan(trainer, model, train_loader, val_loader)`` or ``plan(trainer, model, datamodule=datamodule)``.

    Args:
        trainer: Trainer with the callbacks.
        model: as for ``fit``.
        train_dataloaders: as for ``fit``; a datamodule may stand here, too.
        val_dataloaders: as for ``fit``.
        datamodule: as for ``fit``.
        ckpt_path: checkpoint to plan the rest of a run from.
        weights_only: as for ``fit``.

    Returns:
        The plan; ``print`` it.

    Raises:
        InvalidArgumentError: as ``fit`` would raise before its first step.
    """
    check_one_package(trainer, model=model, train_dataloaders=train_dataloaders, datamodule=datamodule)
    stop = _BeforeTheFirstStep()
    callbacks, loggers = trainer.callbacks, trainer.loggers  # type: ignore[attr-defined]
    sanity, trainer.num_sanity_val_steps = trainer.num_sanity_val_steps, 0
    trainer.callbacks, trainer.loggers = [_NoEnd(), *callbacks, stop], []  # type: ignore[attr-defined]
    try:
        trainer.fit(model, train_dataloaders, val_dataloaders, datamodule, ckpt_path, weights_only)
    finally:
        trainer.callbacks, trainer.loggers = callbacks, loggers  # type: ignore[attr-defined]
        trainer.num_sanity_val_steps = sanity
    if stop.plan is None:
        raise RunError("The run must have a first training step to be planned, but `fit` ended without one.")
    return stop.plan


class _NoEnd(TrainerCallback):
    """Ends a run without a training step before other callbacks export it."""

    @override
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        raise counterpart(_TunerExitException, trainer)


class _BeforeTheFirstStep(TrainerCallback):
    """Creates the plan once loaders, optimizers and schedulers exist, then ends the run."""

    def __init__(self) -> None:
        self.plan: Plan | None = None

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.plan = _plan(trainer, pl_module)
        raise counterpart(
            _TunerExitException, trainer
        )  # Lightning's exception for the end of a dry run, which isn't reported as a failure


def _conflicts(trainer: L.Trainer, pl_module: L.LightningModule) -> list[str]:
    """Phases that counteract each other, and fixes; errors that prevent a run are raised in ``setup``."""
    found = [text for callback in compression_callbacks(trainer) for text in callback.conflicts(trainer)]
    distillation = getattr(pl_module, "_distillation", None)
    return found if distillation is None else [*found, *conflicts(distillation)]


def _plan(trainer: L.Trainer, pl_module: L.LightningModule) -> Plan:
    timeline = timeline_of(trainer)
    callbacks = compression_callbacks(trainer)
    rates = _learning_rates(trainer, timeline)
    sizes = {"today": {"parameters": parameter_count(pl_module), **_macs(trainer, pl_module, callbacks)}}
    sizes |= {f"after {type(c).__name__}": size for c in callbacks if (size := c.predicted(pl_module))}
    sizes |= {f"after {type(c).__name__}": {} for c in callbacks if isinstance(c, QuantizingCallback)}
    _add_bytes(sizes, pl_module, callbacks)
    made = Plan(timeline.steps_per_epoch, timeline.total_steps, sizes, conflicts=_conflicts(trainer, pl_module))
    for callback in sorted(callbacks, key=lambda c: c.steps[0]):
        first, last = callback.steps
        end = callback.end if callback.end is not None else callback.start if last == first else None
        epochs = _epoch(timeline, callback.start, first), _epoch(timeline, end, last)
        who = type(callback).__name__ + (
            f" {callback.name!r}" if len(callbacks) > len({type(c) for c in callbacks}) else ""
        )
        rate = rates[int(min(first, len(rates) - 1))] * callback.lr_scale if rates else None
        share = rate / max(rates) if rate is not None and max(rates) > 0 else None
        share_at_end = rates[int(min(last, len(rates) - 1))] / max(rates) if share is not None else None
        layers = callback.plan(trainer, pl_module)
        made.phases.append(Phase(who, (first, last), epochs, rate, share, callback.benefit, layers))
        # Pruning needs a high rate, to recover.
        if callback.wants_low_rate and share is not None and share > _HIGH:
            made.warnings.append(
                f"{who} starts at {share:.0%} of the highest learning rate; train with fake-quantization below {_HIGH:.0%}."
            )
        if not callback.wants_low_rate and share_at_end is not None and share_at_end < _LOW:
            made.warnings.append(
                f"{who} ends at {share_at_end:.1%} of the highest learning rate; the network must recover from pruning, so the "
                "learning rate must still be high. End it earlier."
            )
    return made


def _epoch(timeline: Timeline, value: float | None, step: float) -> float | None:
    """Position in epochs; ``None`` if it isn't known."""
    at = timeline.epoch_at(step)
    if at < math.inf:
        return at
    return float(value) if isinstance(value, int) else None


def _where(epoch: float | None, step: float) -> str:
    """A position in words."""
    if epoch is None:
        return f"step {step:g}" if step < math.inf else "a later epoch"
    return f"epoch {epoch:g} (step {step:g})" if step < math.inf else f"epoch {epoch:g}"


def _add_bytes(
    sizes: dict[str, dict[str, int]], pl_module: L.LightningModule, callbacks: Sequence[CompressionCallback]
) -> None:
    """Add the size of the weights in a file: 4 bytes for each parameter, 1 byte for int8."""
    for size in sizes.values():
        if "parameters" in size:
            size[_BYTES] = 4 * size["parameters"]
    entries = {name: p.numel() for name, p in pl_module.named_parameters()}
    for callback in callbacks:  # channels are removed first
        after = callback.predicted_entries(pl_module)
        entries = {name: min(count, after.get(name, count)) for name, count in entries.items()}
    for callback in callbacks:
        if isinstance(callback, QuantizingCallback):
            integers = sum(entries[name] for name in callback.int8_weights(pl_module))
            sizes[f"after {type(callback).__name__}"][_BYTES] = 4 * sum(entries.values()) - 3 * integers


def _macs(trainer: L.Trainer, pl_module: L.LightningModule, callbacks: Sequence[CompressionCallback]) -> dict[str, int]:
    """MACs of one sample of the ``forward`` that the callbacks use; empty if there is none."""
    looking = [
        (getattr(c, "module", None) or getattr(c, "paths", [""])[0], c.inputs)
        for c in callbacks
        if hasattr(c, "inputs")
    ]
    path, inputs = looking[0] if looking else ("", None)
    if not path and not has_forward(pl_module):
        return {}
    _, call = owner_and_call(pl_module, path, trainer, inputs)
    empty, shapes = skeleton(pl_module, path, call)
    return {"MACs a sample": count_macs(empty.get_submodule(path), shapes)}


def _learning_rates(trainer: L.Trainer, timeline: Timeline) -> list[float]:
    """Learning rate of the first parameter group before each optimizer step; empty if unpredictable."""
    configs = trainer.lr_scheduler_configs
    total = timeline.total_steps
    if (
        is_manual(trainer)
        or len(trainer.optimizers) != 1
        or total > _LONGEST
        or any(config.reduce_on_plateau for config in configs)
    ):
        return []
    kept = {id(p): p for group in trainer.optimizers[0].param_groups for p in group["params"]}
    optimizer, schedulers = copy.deepcopy((trainer.optimizers[0], [c.scheduler for c in configs]), dict(kept))
    last = 0 if math.isinf(timeline.epochs) else int(timeline.epochs)  # epochs of unknown length end nowhere
    ends = {timeline.estimate(epoch): epoch for epoch in range(timeline.epoch + 1, last + 1)}
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no optimizer step precedes the scheduler's
        for step in range(trainer.global_step, int(total)):
            rates.append(float(optimizer.param_groups[0]["lr"]))
            for config, scheduler in zip(configs, schedulers, strict=True):
                due = step + 1 if config.interval == "step" else ends.get(step + 1)
                if due is not None and due % config.frequency == 0:
                    scheduler.step()
    return [rates[0]] * trainer.global_step + rates if rates else []
