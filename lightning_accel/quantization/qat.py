"""Callback for quantization-aware training."""

import inspect
import math
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from typing_extensions import override

from lightning_accel.calls.batches import InputsFunction
from lightning_accel.core.arguments import NOT_EMPTY, checked
from lightning_accel.core.callback import compression_callbacks
from lightning_accel.core.clock import is_manual, step_of, timeline_of
from lightning_accel.core.optimizers import after_steps, part_owners, release
from lightning_accel.core.schedules import Timeline, check_position, passed
from lightning_accel.core.strategies import Capability
from lightning_accel.core.trainers import is_fast_dev_run
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.targets import Target
from lightning_accel.quantization.base_callback import QuantizingCallback, ranks_of
from lightning_accel.quantization.call_watch import CallWatch
from lightning_accel.quantization.settings import QuantizationSettings
from lightning_accel.quantization.weight_only.callback import WeightOnlyQuantization
from lightning_accel.quantization.weight_only.targets import WEIGHT_ONLY, is_weight_only

_FREEZES = (2 / 3, 5 / 6)  # shares of the phase after which batch norm and ranges are frozen
_STEP_RATE = 1e-3  # learning rate of Adam for the logarithm of learned scales


class QuantizationAwareTraining(QuantizingCallback):
    """Train with fake-quantization in a target's arithmetic; the exported integers equal the trained ones.

    From ``start`` on, operands, results and weights are quantized while the module's own ``forward`` (or that of the named submodules)
    runs: whatever Python it reads is read in each step. A graph is captured to plan this, and to export.
    Ranges are learned from the first training batches in float, then activations and weights are rounded as on the target
    (https://arxiv.org/abs/1712.05877). Towards the end of the run the statistics of batch norm are frozen, then the ranges.
    After ``fit`` the module computes the quantized network.

    Args:
        target: ``"tensorrt"``, ``"onnxruntime"``, ``"openvino"``, ``"portable"``, or a ``Target`` of your own; ``None``: what this
            machine can run, ``"onnxruntime"`` on one without a GPU. The choice is printed. With ``"int4"`` or
            ``"int8-weights"`` the result is a :class:`WeightOnlyQuantization`, which takes ``start``, ``group``, ``include``,
            ``exclude`` and ``name``.
        start: epoch (int) or share of the run (float) at which fake-quantization begins.
        module: dotted path(s) of the submodules to quantize; ``None`` means what ``training_step`` calls: the
            LightningModule's ``forward``, or else the largest network that the step calls, which a message names.
        include: globs of operators to quantize (module paths); ``None`` means all.
        exclude: globs of operators that stay float.
        calibration_batches: number of training batches to learn ranges from before the first step with fake-quantization.
        ranges: ``"moving_average"`` and ``"min_max"`` are updated until ranges are frozen; ``"percentile"`` and ``"mse"`` are fixed
            by the calibration; ``"lsq"`` learns the step by gradient (https://arxiv.org/abs/1902.08153).
        freeze_batch_norm: epoch or share of the run at which the statistics of batch norm are frozen; ``None``: after two thirds of
            the phase, once the learning rate has fallen to a tenth of its peak (training at a high rate needs the statistics of
            the batch); ``1.0``: never.
        freeze_ranges: epoch or share of the run at which ranges are frozen; ``None``: after five sixths of the phase;
            ``1.0``: never.
        lr_scale: factor on the learning rate from ``start`` on; the scheduler is not modified.
        inputs: maps a batch to the arguments of ``forward``; needed only if the module's own steps don't show them.
        dynamic: axes beyond the batch that may change, ``{input: {axis: name}}``, e.g. ``{"input_ids": {1: "time"}}``.
        batch: ``"dynamic"``, or ``"fixed"`` for a network that takes one batch size only, for instance of streaming audio.
        batch_axis: axis of the batch of inputs where it isn't the first one, e.g. ``{"state": 1}`` of an LSTM's state
            ``(1, B, H)``; ``None`` for an input without a batch.
        name: the state's name in the checkpoint.
        group: neighbouring inputs that share a scale; weight-only targets have it, with a default of 32.

    Raises:
        InvalidArgumentError: an argument is out of its range; in ``setup``, a glob or path that matches nothing.
        CaptureError: in ``setup``, a ``forward`` that ``torch.export`` can't capture.

    Example:
        >>> QuantizationAwareTraining(target="portable", start=0.5).target.weight_max
        63
    """

    needs = Capability.ROWS

    @classmethod
    @override
    def instead(cls, *args: Any, **kwargs: Any) -> Any:
        if is_weight_only(args[0] if args else kwargs.get("target")):
            return _weight_only(inspect.signature(cls.__init__).bind(None, *args, **kwargs).arguments)
        return None

    @checked(name=NOT_EMPTY, include=NOT_EMPTY, module=NOT_EMPTY)
    def __init__(
        self,
        target: str | Target | None = None,
        start: int | float = 0.5,
        module: str | list[str] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        calibration_batches: int = 8,
        ranges: str = "moving_average",
        freeze_batch_norm: int | float | None = None,
        freeze_ranges: int | float | None = None,
        lr_scale: float = 1.0,
        inputs: InputsFunction | None = None,
        dynamic: dict[str, dict[int, str]] | None = None,
        name: str = "qat",
        group: int | None = None,
        batch: str = "dynamic",
        batch_axis: dict[str, int | None] | None = None,
    ) -> None:
        if group is not None:
            raise InvalidArgumentError(
                f"Argument `group` must be None unless `target` is weight-only ({sorted(WEIGHT_ONLY)}), but got {group!r} with {target!r}."
            )
        settings = QuantizationSettings(
            target,
            calibration_batches,
            ranges,
            module,
            include,
            exclude,
            inputs,
            dynamic,
            batch=batch,
            batch_axis=batch_axis,
        )
        super().__init__(settings, name=name, start=start)
        self.freezes = {"freeze_batch_norm": freeze_batch_norm, "freeze_ranges": freeze_ranges}
        for argument, value in self.freezes.items():
            check_position(argument, value)
            if value is not None and type(value) is type(start) and value < start:
                raise InvalidArgumentError(
                    f"Argument `{argument}` must be at or after `start` ({start}), but got {value}."
                )
        if not (isinstance(lr_scale, int | float) and 0 < lr_scale < math.inf):
            raise InvalidArgumentError(f"Argument `lr_scale` must be above 0, but got {lr_scale!r}.")
        self.lr_scale = float(lr_scale)
        self._freeze_steps: dict[str, float] = {}
        self._watch: CallWatch | None = None
        self._checked = False
        self._called: set[str] = set()  # modules that training steps have called, as long as that is checked
        self._waited = False  # whether a warning said so
        self._stepped = 0  # step at the last update of learned scales
        self._owners: list[torch.optim.Optimizer] = []  # the optimizers that update what is quantized
        self._peak = 0.0  # highest learning rate so far
        self._hooks: list[Any] = []

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._checked, self._peak, self._waited, self._called = False, 0.0, False, set()

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._owners = part_owners(trainer, pl_module, self.paths, type(self).__name__) or trainer.optimizers
        if is_fast_dev_run(trainer):
            total = timeline_of(trainer).total_steps
            self._freeze_steps = {name: share * total for name, share in zip(self.freezes, _FREEZES, strict=True)}
        self._stepped = step_of(trainer)
        for optimizer in self._owners:
            self._scale_rate(optimizer)
        if is_manual(trainer) and self.settings.ranges == "lsq":
            self._hooks += after_steps(trainer.optimizers, lambda optimizer: self._learn_scales(trainer, optimizer))

    def _learn_scales(self, trainer: L.Trainer, optimizer: torch.optim.Optimizer) -> None:
        """Update learned scales with the step of the optimizer that updates their weights.

        Gradients that another one's loss has left in them (a discriminator's, of generated samples) aren't theirs to follow.
        """
        own = any(optimizer is owner for owner in self._owners)
        for forward in self._placed.values():
            if own:
                forward.bank.learn_steps(_STEP_RATE, ranks_of(trainer))
            else:
                forward.bank.forget_gradients()

    @override
    def _place_phase(self, trainer: L.Trainer, timeline: Timeline, check: bool) -> None:
        super()._place_phase(trainer, timeline, check)
        if check and timeline.total_steps <= self._start_step < math.inf:
            raise InvalidArgumentError(
                f"Argument `start` must lie before the end of the run, but got {self.start}, which is step {self._start_step:g}."
            )
        at = timeline.step if check else lambda argument, value: timeline.estimate(value)
        length = timeline.total_steps - self._start_step
        for (argument, value), share in zip(self.freezes.items(), _FREEZES, strict=True):
            # The end of a run of unknown length isn't seen coming: then nothing is frozen by default.
            early = math.inf if math.isinf(timeline.total_steps) else self._start_step + share * length
            never = isinstance(value, float) and value == 1.0  # also if the run becomes longer than expected
            self._freeze_steps[argument] = early if value is None else math.inf if never else at(argument, value)

    def _freezes(self, argument: str, trainer: L.Trainer) -> bool:
        """Whether ``"freeze_batch_norm"`` or ``"freeze_ranges"`` is reached at the next optimizer step."""
        value, step = self.freezes[argument], step_of(trainer)
        return passed(
            None if is_fast_dev_run(trainer) else value, self._freeze_steps[argument], trainer.current_epoch, step
        )

    def _scale_rate(self, optimizer: torch.optim.Optimizer) -> None:
        """Scale the learning rate during each optimizer step only, so that schedulers and loggers see the original one."""
        own: list[list[float]] = []  # nested: a subclass whose `step` calls its base's runs the hooks twice

        def before(*_: Any) -> None:
            own.append([group["lr"] for group in optimizer.param_groups])
            if len(own) == 1 and self._placed:
                for group in optimizer.param_groups:
                    group["lr"] = group["lr"] * self.lr_scale

        def after(*_: Any) -> None:
            for group, lr in zip(optimizer.param_groups, own.pop(), strict=True):
                group["lr"] = lr

        if self.lr_scale != 1.0:
            self._hooks += [optimizer.register_step_pre_hook(before), optimizer.register_step_post_hook(after)]

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._placed and self._begins(trainer) and not self._waits(trainer):
            self.prepare(trainer, pl_module)
            self.place(pl_module)
        rate = max((group["lr"] for optimizer in self._owners for group in optimizer.param_groups), default=0.0)
        self._peak = max(self._peak, rate)
        settled = self.freezes["freeze_batch_norm"] is not None or rate <= 0.1 * self._peak
        for forward in self._placed.values():
            bank = forward.bank
            if bank.active:  # ranges must be learned before they are frozen
                bank.norms_frozen = bank.norms_frozen or (settled and self._freezes("freeze_batch_norm", trainer))
                bank.frozen = bank.frozen or self._freezes("freeze_ranges", trainer)
            bank.learning = True
        self._unwatch()  # a skipped batch ends without `on_train_batch_end`
        if not self._checked:
            called = self._called if is_manual(trainer) else set()  # where steps may take turns
            self._watch = CallWatch(pl_module, self.paths, called)

    def _waits(self, trainer: L.Trainer) -> bool:
        """Whether channels still have to leave, because epochs aren't as long as expected."""
        resizing = [c for c in compression_callbacks(trainer) if c.resizes and c.unfinished()]
        if resizing and not self._waited:
            self._waited = True
            rank_zero_warn(
                f"QuantizationAwareTraining({self.name!r}) waits beyond `start` ({self.start}) for the network's final shapes: "
                f"{resizing[0].unfinished()}."
            )
        return bool(resizing)

    def fake_quant_step(self, trainer: L.Trainer) -> float:
        """First optimizer step with fake-quantization; available after the start of training."""
        return self._start_step + math.ceil(self.settings.calibration_batches / trainer.accumulate_grad_batches)

    def settles(self) -> dict[str, float]:
        """Optimizer steps at which ranges and batch norm are frozen; available after the start of training."""
        fixed = self.settings.ranges in ("mse", "percentile")  # fixed by the calibration
        settled = {"ranges": float(self._start_step) if fixed else self._freeze_steps["freeze_ranges"]}
        if self.freezes["freeze_batch_norm"] is not None:  # otherwise it also depends on the learning rate
            settled["batch norm's statistics"] = self._freeze_steps["freeze_batch_norm"]
        return settled

    @override
    def conflicts(self, trainer: L.Trainer) -> list[str]:
        if is_fast_dev_run(trainer):
            return []
        timeline = timeline_of(trainer)
        found = []
        for pruning in (c for c in compression_callbacks(trainer) if c.prunes_weights):
            end = pruning.steps[1]
            late = {what: step for what, step in self.settles().items() if step < end < math.inf}
            if late:
                what, step = min(late.items(), key=lambda item: item[1])
                found.append(
                    f"{type(pruning).__name__}({pruning.name!r}) ends in epoch {timeline.epoch_at(end):g}, after {what} became final in "
                    f"epoch {timeline.epoch_at(step):.4g}: they belong to a network that still had more weights. End it by epoch "
                    f"{max(math.floor(timeline.epoch_at(step)), 0)}, or start QuantizationAwareTraining later."
                )
        if self._beyond(trainer, timeline.total_steps) >= 0:
            found.append(self._too_late(trainer, timeline.total_steps))
        return found

    @override
    def out_of_reach(self, trainer: L.Trainer) -> str:
        total = timeline_of(trainer).total_steps
        never = not is_fast_dev_run(trainer) and self._beyond(trainer, total) > 0
        return self._too_late(trainer, total) if never else ""

    def _beyond(self, trainer: L.Trainer, total: float) -> float:
        """Steps from the end of a run to the first step with fake-quantization; ``-inf`` if either isn't known."""
        begins = self.fake_quant_step(trainer)
        return -math.inf if self.quantizing or math.isinf(total) or math.isinf(begins) else begins - total

    def _too_late(self, trainer: L.Trainer, total: float) -> str:
        return (
            f"QuantizationAwareTraining({self.name!r}) trains no step with fake-quant: it starts at step {self.steps[0]:g}, observes "
            f"{self.settings.calibration_batches} batches until step {self.fake_quant_step(trainer):g}, and the run ends at step "
            f"{total:g}. Start it earlier, lower `calibration_batches`, or use PostTrainingQuantization, which needs no training."
        )

    @override
    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        total, calibrated = timeline_of(trainer).total_steps, self.fake_quant_step(trainer)
        batches = self.settings.calibration_batches
        phases = [f"calibration to step {calibrated:g}", f"fake-quant from step {calibrated:g}"]
        if math.isinf(calibrated):
            where = f"epoch {self.start}" if isinstance(self.start, int) else f"{self.start:.0%} of the run"
            phases = [f"calibration from {where}, fake-quant {batches} batches later"]
        for argument, what in (("freeze_batch_norm", "batch norm frozen"), ("freeze_ranges", "ranges final")):
            step, value = self._freeze_steps[argument], self.freezes[argument]
            low = ", once the learning rate is a tenth of its highest" if argument == "freeze_batch_norm" else ""
            automatic = low if value is None else ""
            if math.isinf(step):
                phases += [f"{what} from epoch {value}"] if isinstance(value, int) else []
            else:
                phases += [f"{what} from step {math.ceil(step)}{automatic}"] if step < total else []
        return {"(phases)": "; ".join(phases), **super().plan(trainer, pl_module)}

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        watch = self._unwatch()
        settled = watch is not None and (watch.complete or trainer.is_last_batch or not is_manual(trainer))
        if (
            watch is not None and settled and outputs is not None and not self._checked
        ):  # a step that returned None may have called nothing
            watch.check()
            self._checked = True
        stepped, self._stepped = self._stepped != step_of(trainer), step_of(trainer)
        for forward in self._placed.values():
            forward.bank.learning = False
            forward.bank.update(ranks_of(trainer))
            if stepped and not is_manual(trainer):
                forward.bank.learn_steps(_STEP_RATE, ranks_of(trainer))
            if not forward.bank.active and forward.bank.batches >= self.settings.calibration_batches:
                forward.bank.activate()
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._release()
        for forward in self._placed.values():
            forward.bank.learning = False
            forward.bank.forget()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._release()
        super().on_train_end(trainer, pl_module)

    def _release(self) -> None:
        self._unwatch()
        release(self._hooks)

    def _unwatch(self) -> CallWatch | None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.remove()
        return watch

    @override
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "peak": float(self._peak)}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._peak = state_dict["peak"]

    @override
    def unfinished(self) -> str:
        if self.quantizing:
            return ""
        seen = min((f.bank.batches for f in self._placed.values()), default=0)
        return (
            f"QuantizationAwareTraining({self.name!r}) hasn't trained with fake-quant yet: it starts at {self.start} and has "
            f"seen {seen} of {self.settings.calibration_batches} calibration batches"
        )


def _weight_only(given: Mapping[str, Any]) -> WeightOnlyQuantization:
    """The callback of a weight-only target, from the arguments of :class:`QuantizationAwareTraining`.

    Raises:
        InvalidArgumentError: an argument is about activations, which stay float.
    """
    taken = ("target", "start", "group", "include", "exclude", "name")
    defaults = {name: p.default for name, p in inspect.signature(QuantizationAwareTraining.__init__).parameters.items()}
    other = [name for name, value in given.items() if name not in ("self", *taken) and value != defaults[name]]
    if other:
        raise InvalidArgumentError(
            f"Argument `{other[0]}` must be left out with the weight-only target {given['target']!r}, but got {given[other[0]]!r}: "
            "activations stay float."
        )
    return WeightOnlyQuantization(**{k: v for k, v in given.items() if k in taken and not (k == "group" and v is None)})
