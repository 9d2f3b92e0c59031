"""Callback that removes channels during training."""

import os
from collections.abc import Callable, Sequence
from math import ceil, inf, isinf
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch._dynamo.eval_frame import OptimizedModule
from typing_extensions import override

from lightning_accel.calls.batches import Call, InputsFunction
from lightning_accel.calls.contexts import builds_layers_late, has_forward
from lightning_accel.calls.copies import parameter_count
from lightning_accel.calls.discovery import chosen_path, owner_and_call
from lightning_accel.core.arguments import NOT_EMPTY, Rule, at_least, checked
from lightning_accel.core.callback import CompressionCallback, change_structure
from lightning_accel.core.clock import step_of
from lightning_accel.core.finite import check_weights, nan_weight
from lightning_accel.core.globs import as_patterns
from lightning_accel.core.optimizers import only_gradients_of
from lightning_accel.core.schedules import Timeline, check_schedule, fraction
from lightning_accel.core.structure import Change
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.engines.registry import engine_named, runs_onnx
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.pruning.channels.criteria import label
from lightning_accel.pruning.channels.equivalence import NOT_RUN
from lightning_accel.pruning.channels.latency import FloatFiles, measure_table, measured_reduction
from lightning_accel.pruning.channels.latency_table import FP32, LatencyTable
from lightning_accel.pruning.channels.latency_target import LatencyTarget
from lightning_accel.pruning.channels.plan import ChannelPlan, ChannelTarget
from lightning_accel.pruning.channels.step_trials import StepTrials
from lightning_accel.pruning.criterion import Criterion

_FACTOR = Rule("a factor above 1", lambda value: value > 1)


class ChannelPruning(CompressionCallback):
    """Remove the least important channels, neurons and attention heads during training (https://arxiv.org/abs/2301.12900).

    Channels that depend on each other are removed together, at the start of an epoch; the optimizer keeps its state for the
    remaining ones. Before training, each group of channels is verified to be removable; other groups are kept, and the reason is
    logged. The output layer is kept. Logged: ``macs`` (multiply-accumulates of one sample) and ``parameters``, counted on the
    tensors.

    Args:
        pruning_ratio: share of the channels of all prunable groups to remove, in (0, 1); or
        macs_reduction: factor by which MACs are reduced, above 1; or
        latency_reduction: factor by which the latency in ``engine`` is reduced, above 1. Exactly one of the three. Before training the
            network is measured with fewer channels in each group, and channels leave where they buy most latency for the least
            importance (https://arxiv.org/abs/2110.10811); what the table foresees is corrected by measuring its choices.
        criterion: ``"group_norm"``, ``"magnitude"``, ``"bn_scale"``, ``"taylor"``, a
            :class:`~lightning_accel.pruning.criterion.Criterion`, a function ``(name, parameter, grad) -> scores``, whose scores are
            added up for each channel, or the import path of either.
        scope: ``"global"`` compares all channels with each other, ``"layer"`` removes the same share from each group.
        schedule: ``"linear"``, ``"cubic"``, ``"cosine"``, ``"exponential"`` or ``"constant"`` (one-shot at ``start``).
        start: epoch (int) or share of the run (float) of the first removal, at an epoch boundary.
        end: epoch or share by which the target is reached; ``None``: half of the run after ``start``, ``start`` itself for
            ``"constant"``.
        round_to: the channels of a pruned group are a multiple of it; 8 suits tensor cores.
        limits: glob of layers -> largest share of a group's channels to remove.
        include: globs of layers whose channels may be removed; ``None`` means all.
        exclude: globs of layers whose channels are kept; takes precedence over ``include``.
        module: dotted path of the submodule that ``training_step`` calls if it doesn't call ``forward``.
        inputs: maps a batch to the arguments of ``forward``; needed only if they can't be derived from its signature.
        name: the state's name in the checkpoint; needed if two are used.
        engine: engine whose latency counts, with ``latency_reduction``.
        batch: samples in a call that it counts for.
        threads: of that engine; ``None``: its default.
        latency_table: file that ``lightning-accel latency-table`` wrote, on another machine or for an int8 network; ``None``: this
            machine is measured, in float32.

    Raises:
        InvalidArgumentError: an argument is out of its range; before training, a glob that matches nothing, a target that can't be
            reached, or nothing to remove.

    Example:
        >>> ChannelPruning(macs_reduction=2.0, end=8).target.macs_reduction
        2.0
    """

    wants_low_rate = False
    sharded_instead = (
        "Remove channels before: `prune_channels_(self, ...)` in front of `fully_shard`. Or train with DDP."
    )

    @checked(
        name=NOT_EMPTY,
        include=NOT_EMPTY,
        macs_reduction=_FACTOR,
        latency_reduction=_FACTOR,
        batch=at_least(1),
        threads=at_least(1),
        latency_table=NOT_EMPTY,
    )
    def __init__(
        self,
        pruning_ratio: float | None = None,
        macs_reduction: float | None = None,
        criterion: str | Criterion | Callable[..., Any] = "group_norm",
        scope: str = "global",
        schedule: str = "linear",
        start: int | float = 0,
        end: int | float | None = None,
        round_to: int = 1,
        limits: dict[str, float] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        module: str | None = None,
        inputs: InputsFunction | None = None,
        name: str = "channels",
        latency_reduction: float | None = None,
        engine: str = "onnxruntime",
        batch: int = 1,
        threads: int | None = None,
        latency_table: str | os.PathLike[str] | None = None,
    ) -> None:
        super().__init__(name=name, start=start, end=end)
        if not runs_onnx(engine_named(engine).name):
            raise InvalidArgumentError(f"Argument `engine` must be one that runs ONNX files, but got {engine!r}.")
        if latency_table is not None and latency_reduction is None:
            raise InvalidArgumentError(
                f"Argument `latency_table` must come with `latency_reduction`, but got {os.fspath(latency_table)!r} without it."
            )
        chosen = as_patterns("include", include), as_patterns("exclude", exclude)
        self.target = ChannelTarget(
            pruning_ratio, macs_reduction, criterion, scope, round_to, dict(limits or {}), *chosen, latency_reduction
        )
        self.engine, self.batch, self.threads, self.latency_table = engine, batch, threads, latency_table
        self._latency: LatencyTarget | None = None
        self.resizes = round_to
        self.schedule, self.module, self.inputs = check_schedule(schedule), module or "", inputs
        self.reached = 0.0  # progress towards the target, in [0, 1]
        self._plan: ChannelPlan | None = None
        self._foreseen: tuple[dict[int, list[int]], dict[str, int]] | None = (
            None  # predicted removal, and sizes afterwards
        )
        self._epochs: tuple[float, float] = (0, 0)  # of the first and the last removal; `inf` if not known yet
        self._collected: dict[str, torch.Tensor] = {}
        self._macs: int | None = None  # of the present module; None: not counted yet
        self._seen: nn.Module | None = None
        self._retargeted = False  # resumed with another target than the checkpoint's

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage != "fit":
            return
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            raise InvalidArgumentError(
                "Argument `model` must not be a `torch.compile`d module, but got one. Pass the module itself."
            )
        self._retargeted = False
        if self._seen is not pl_module:  # reused for another module, e.g. in a cross-validation
            self.reached, self._collected, self._latency = 0.0, {}, None
        self._seen, self._plan, self._foreseen = pl_module, None, None
        if trainer.ckpt_path is None:  # otherwise other weights come
            check_weights(pl_module, "model")
        if not builds_layers_late(pl_module):
            self._prepare(trainer, pl_module)

    @override
    def structure_changed(self, pl_module: L.LightningModule, change: Change) -> None:
        self._macs, self._collected, self._foreseen = None, {}, None
        if self._plan is not None:
            self._plan.follow(change.args)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self._prepare(trainer, pl_module)

    def _prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> ChannelPlan:
        """Find the groups of the network, so that errors occur before the run."""
        if self._plan is None:
            compiled = [f"`{name}`" for name, part in pl_module.named_modules() if isinstance(part, OptimizedModule)]
            if compiled:
                raise InvalidArgumentError(
                    f"Argument `model` must not hold `torch.compile`d modules, whose graphs have fixed widths, but got "
                    f"{', '.join(compiled)}. Compile the network after pruning, or not in `configure_model`."
                )
            if not self.module and not has_forward(pl_module):
                self.module = chosen_path(pl_module, trainer, type(self).__name__)
            _, call = owner_and_call(pl_module, self.module, trainer, self.inputs)
            steps = StepTrials(trainer, pl_module)
            self._plan, self._macs = ChannelPlan(pl_module, self.module, call, self.target, steps), None
            if self.target.latency_reduction is not None:
                self._aim(trainer, pl_module, self._plan, call)
            for group in self._plan.groups:
                if group.kept:
                    rank_zero_info(f"ChannelPruning: the channels of {_and(group.layers)} are kept: {group.kept}.")
        return self._plan

    def _aim(self, trainer: L.Trainer, pl_module: L.LightningModule, plan: ChannelPlan, call: Call) -> None:
        """Set the latency to reach: from the checkpoint, a file, or measurements."""
        assert self.target.latency_reduction is not None
        quantizes = any(c.captures for c in callbacks_of(trainer, CompressionCallback))
        if self._latency is None:
            if trainer.ckpt_path is not None:
                return  # the checkpoint holds it
            table = self._table(trainer, pl_module, plan, call, quantizes)
            self._latency = LatencyTarget(self.target.latency_reduction, table)
            plan.aim(self._latency)
            if self.latency_table is None:
                self._calibrate(pl_module, plan, call)
        else:
            plan.aim(self._latency)

    def _table(
        self, trainer: L.Trainer, pl_module: L.LightningModule, plan: ChannelPlan, call: Call, quantizes: bool
    ) -> LatencyTable:
        units = {g.name: g.units for g in plan.groups if not g.kept}
        if self.latency_table is not None:
            table = LatencyTable.read(os.fspath(self.latency_table))
            table.check(units, "int8" if quantizes else FP32)
            if (table.engine, table.batch) != (self.engine, self.batch):
                raise InvalidArgumentError(
                    f"Argument `latency_table` must be of engine {self.engine!r} and batch {self.batch}, but got one of {table.engine!r} "
                    f"and batch {table.batch}."
                )
            return table
        if quantizes:
            raise InvalidArgumentError(
                "Argument `latency_table` must be given where the network is quantized afterwards, but got None: latency in float32 isn't "
                "that of int8. Record one with `lightning-accel latency-table --target ...`."
            )
        if trainer.world_size > 1:
            raise InvalidArgumentError(
                f"Argument `latency_table` must be given in a run of {trainer.world_size} processes, which would disturb each other's "
                "measurements, but got None. Record one with `lightning-accel latency-table`."
            )
        engine_named(self.engine).require()
        rank_zero_info(f"ChannelPruning: measuring the latency of {len(units)} groups of channels in {self.engine}")
        files = FloatFiles(pl_module, self.module, call, plan.groups, self.batch)
        return measure_table(units, plan.latency_counts(), files, self.engine, self.batch, self.threads)

    def _calibrate(self, pl_module: L.LightningModule, plan: ChannelPlan, call: Call) -> None:
        files = FloatFiles(pl_module, self.module, call, plan.groups, self.batch)
        units = {g.name: g.units for g in plan.groups if not g.kept}
        found = plan.calibrate(
            pl_module, lambda left: measured_reduction(units, {**units, **left}, files, self.engine, self.threads)
        )
        rank_zero_info(
            f"ChannelPruning: with the channels that would leave now, the network is {found:.2f} times as fast in {self.engine}, measured; "
            f"{self.target.latency_reduction:g} was asked for."
        )

    @property
    @override
    def benefit(self) -> str:
        return "fewer operations and smaller tensors; engines that work in blocks of 8 or 16 channels gain less than the MACs say"

    @override
    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        plan = self._prepare(trainer, pl_module)
        chosen, _ = self._foresee(plan, pl_module)
        lines: dict[str, str] = {}
        for i, group in enumerate(plan.groups):
            channels, gone = group.units * group.width, len(chosen.get(i, ())) * group.width
            what = f"channels kept: {group.kept}" if group.kept else f"{channels} channels -> about {channels - gone}"
            lines |= dict.fromkeys(group.layers, what)
        return lines

    @override
    def measured(self, pl_module: L.LightningModule) -> dict[str, dict[str, Any]]:
        if self._plan is None:  # exported from a checkpoint, without a run
            return {}
        original = self._plan.original
        sizes = {"parameters": parameter_count(pl_module), "MACs a sample": self._plan.macs(pl_module)}
        before = {"parameters": original["parameters"], "MACs a sample": original["macs"]}
        rows = {"all": ", ".join(f"{before[what]:,} -> {size:,} {what}" for what, size in sizes.items())}
        for group in self._plan.groups:
            text = f"{group.original * group.width} -> {group.units * group.width}"
            rows |= dict.fromkeys(group.layers, f"kept: {group.kept}" if group.kept else text)
        return {"channels": rows}

    @override
    def layer_shares(self, pl_module: L.LightningModule) -> tuple[str, dict[str, float]]:
        groups = self._plan.groups if self._plan is not None else []
        return "share of channels that left", {n: 1 - g.units / g.original for g in groups for n in g.layers}

    @override
    def predicted(self, pl_module: L.LightningModule) -> dict[str, int]:
        return self._foresee(self._plan, pl_module)[1] if self._plan is not None else {}

    @override
    def predicted_entries(self, pl_module: L.LightningModule) -> dict[str, int]:
        if self._plan is None:
            return {}
        return self._plan.entries_after(pl_module, self._foresee(self._plan, pl_module)[0])

    def _foresee(self, plan: ChannelPlan, pl_module: L.LightningModule) -> tuple[dict[int, list[int]], dict[str, int]]:
        if self._foreseen is None:
            self._foreseen = plan.foresee(pl_module)
        return self._foreseen

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        if any(isinstance(optimizer, torch.optim.LBFGS) for optimizer in trainer.optimizers):
            raise InvalidArgumentError(
                "The optimizer must keep its state by parameter with ChannelPruning, but got LBFGS."
            )
        if self._retargeted:
            self._prepare(trainer, pl_module).check_not_exceeded(pl_module)
        begins = step_of(trainer) == 0 and self._epochs[0] == 0 and not is_fast_dev_run(trainer)
        if self.target.method.needs_gradients and begins:
            raise InvalidArgumentError(
                f'Argument `start` must be at least 1 with criterion "{label(self.target.criterion)}", but got {self.start}: it needs '
                "gradients before the first removal. Start later or choose another criterion."
            )

    @override
    def _place_phase(self, trainer: L.Trainer, timeline: Timeline, check: bool) -> None:
        """Determine the epochs of the first and the last removal, which happen at the start of the epoch.

        Raises:
            InvalidArgumentError: the run has no such epochs, or another callback captures the network before the last removal.
        """
        first, last = self._epochs
        if not self._begun:
            first = self._boundary("start", self.start, timeline, check)
        if self.reached < 1.0 or check:  # otherwise it is over, whatever becomes of the rest of the run
            last = self._last_epoch(first, timeline, check)
        if check and last >= timeline.epochs and not isinf(timeline.epochs):
            raise InvalidArgumentError(
                f"Argument `end` must lie before the end of the run, but got {self.end}, which is epoch {last:g} of {timeline.epochs:g}: "
                "the network has to train after the last removal. Train longer or end earlier."
            )
        self._epochs = first, last
        first_step, last_step = (_first_step(epoch, timeline) for epoch in self._epochs)
        self._start_step = self._start_step if self._begun else first_step
        self._end_step = self._end_step if self.reached >= 1.0 and not check else last_step
        if check:
            self._check_captures(trainer, timeline)
            if isinf(timeline.steps_per_epoch) and self._epochs != (0, 0):
                rank_zero_info(
                    "ChannelPruning: the training data has no length. Channels leave at the beginning of an epoch, which an endless stream "
                    "never reaches again: set `limit_train_batches` for it."
                )

    def _last_epoch(self, first: float, timeline: Timeline, check: bool) -> float:
        """Epoch of the last removal; ``inf`` if that isn't known yet."""
        if self.end is not None:
            return self._boundary("end", self.end, timeline, check)
        if self.schedule == "constant" or isinf(first):
            return first
        if isinf(timeline.max_epochs) and isinf(timeline.total_steps):
            raise InvalidArgumentError("Argument `end` must be given for a run of unknown length, but got None.")
        return first + max(timeline.epochs - first, 0) // 2

    def _boundary(self, argument: str, value: float, timeline: Timeline, check: bool) -> float:
        """First epoch that begins at a position or after it; ``inf`` if that isn't known yet."""
        step = timeline.step(argument, value) if check else timeline.estimate(value)
        return value if isinstance(value, int) else _next_epoch(step, timeline)

    def _check_captures(self, trainer: L.Trainer, timeline: Timeline) -> None:
        """Raise if a callback captures the network before the last removal."""
        for callback in callbacks_of(trainer, CompressionCallback):
            if callback.captures:
                step = timeline.step("start", callback.start)
                begins = callback.start if isinstance(callback.start, int) else _next_epoch(step, timeline)
                if begins < self._epochs[1] or (isinstance(callback.start, float) and step < self._end_step < inf):
                    raise InvalidArgumentError(
                        f"Argument `end` must be at or before the start of {type(callback).__name__} ({callback.start}), but got "
                        f"{self.end}: it needs the final shapes. End earlier or start it later."
                    )

    @override
    def _enter_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        first, last = (0, 0) if is_fast_dev_run(trainer) else self._epochs
        epoch = trainer.current_epoch
        if epoch >= first:
            if not self._begun and not is_fast_dev_run(trainer):
                self._begun, self._start_step = True, step_of(trainer)
            # The last boundary reaches the target, also if it is the only one.
            due = 1.0 if epoch >= last else fraction(self.schedule, (epoch - first + 1) / (last - first + 1))
            if due > self.reached:
                self._remove(trainer, pl_module, due)
        self._collected = {}  # gradients of one epoch only

    def _remove(self, trainer: L.Trainer, pl_module: L.LightningModule, due: float) -> None:
        if found := nan_weight(pl_module):
            raise RunError(
                f"Channels must have numbers as weights to be compared, but in epoch {trainer.current_epoch} {found}: training has "
                "diverged. Lower the learning rate, or clip gradients."
            )
        plan = self._prepare(trainer, pl_module)
        collected = self._collected
        if self.target.method.needs_gradients and not collected:
            if not is_fast_dev_run(trainer):
                raise RunError(
                    f'Criterion "{label(self.target.criterion)}" needs gradients before the first channels are removed, but got none.'
                )
            collected = {g.name: torch.zeros(g.units) for g in plan.groups}
        chosen = trainer.strategy.broadcast(plan.choose(pl_module, due, collected))  # the same choice on every rank
        self.reached = due
        if due >= 1.0:
            self._end_step = step_of(trainer)
        if chosen:
            change_structure(trainer, pl_module, plan.change(pl_module, chosen, self.state_key))

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if not self.target.method.needs_gradients or self.reached >= 1 or self._plan is None:
            return
        if trainer.current_epoch < self._epochs[0] - 1 and not isinf(self._epochs[0]):
            return  # no removal at the end of this epoch
        with only_gradients_of(optimizer, trainer.optimizers, pl_module):
            collected = self._plan.collect(pl_module)
        for name, scores in collected.items():
            self._collected[name] = (
                self._collected[name].to(scores.device) + scores if name in self._collected else scores
            )

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._macs is None:
            self._macs = self._prepare(trainer, pl_module).macs(pl_module)
        suffix = "" if self.name == "channels" else f"/{self.name}"
        pl_module.log(f"macs{suffix}", float(self._macs), sync_dist=True)
        pl_module.log(f"parameters{suffix}", float(parameter_count(pl_module)), sync_dist=True)

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        unseen = [g.name for g in self._plan.groups if g.kept == NOT_RUN] if self._plan is not None else []
        if unseen and self.reached > 0 and isinstance(exception, RuntimeError):
            exception.add_note(
                f"ChannelPruning removed channels, and `forward` doesn't run {_and(unseen)}. If a training step feeds them what left, "
                "exclude the layers that make it."
            )

    @override
    def unfinished(self) -> str:
        if self.reached >= 1:
            return ""
        target = self.target
        wanted = (
            f"pruning ratio {target.pruning_ratio}" if target.pruning_ratio else f"{target.macs_reduction}x fewer MACs"
        )
        if target.latency_reduction is not None:
            wanted = f"{target.latency_reduction}x less latency"
        return f"ChannelPruning({self.name!r}) has gone {self.reached:.0%} of the way to {wanted}"

    @property
    def _targets(self) -> list[float | None]:
        """The targets, for the checkpoint."""
        latency = [] if self.target.latency_reduction is None else [self.target.latency_reduction]
        return [self.target.pruning_ratio, self.target.macs_reduction, *latency]

    @override
    def state_dict(self) -> dict[str, Any]:
        collected = {name: scores.cpu() for name, scores in self._collected.items()}
        state = {"reached": self.reached, "collected": collected, "target": self._targets, "epochs": list(self._epochs)}
        if self._latency is not None:
            state["latency"] = {"table": self._latency.table.to_dict(), "correction": self._latency.correction}
        return {**state, **self.phase_state()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.reached, self._collected = state_dict["reached"], dict(state_dict["collected"])
        if self._begun:  # with the same positions
            self._epochs = tuple(state_dict["epochs"])
        if (latency := state_dict.get("latency")) and self.target.latency_reduction is not None:
            table = LatencyTable.from_dict(latency["table"])
            self._latency = LatencyTarget(self.target.latency_reduction, table, latency["correction"])
            if self._plan is not None:
                self._plan.aim(self._latency)
        if state_dict["target"] != self._targets:
            self.reached, self._retargeted = (
                0.0,
                True,
            )  # targets are absolute: the next boundary continues to the new one


def _next_epoch(step: float, timeline: Timeline) -> float:
    """First epoch that begins at a step or after it; ``inf`` if that isn't known yet."""
    if step <= timeline.first_step:  # an epoch that is over can't be the first any more
        return timeline.epoch
    at = timeline.epoch_at(step)
    return at if isinf(at) else ceil(at - 1e-9)


def _first_step(epoch: float, timeline: Timeline) -> float:
    """Optimizer step at which an epoch begins; ``inf`` if that isn't known yet."""
    return inf if isinf(epoch) else timeline.estimate(int(epoch))


def _and(layers: Sequence[str]) -> str:
    return ", ".join(f"`{layer}`" for layer in layers[:6]) + (f" and {len(layers) - 6} more" if len(layers) > 6 else "")
