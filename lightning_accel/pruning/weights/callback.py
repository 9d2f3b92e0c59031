"""Callback that zeroes weights under masks, on a schedule."""

from collections.abc import Callable, Mapping
from math import isinf, isnan
from typing import Any
from zlib import crc32

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_accel.calls.contexts import builds_layers_late
from lightning_accel.calls.copies import parameter_count
from lightning_accel.core.arguments import NOT_EMPTY, at_least, checked
from lightning_accel.core.callback import CompressionCallback
from lightning_accel.core.clock import step_of, timeline_of
from lightning_accel.core.finite import nan_weight
from lightning_accel.core.globs import as_patterns
from lightning_accel.core.optimizers import Ownership, after_steps, ownership_of, release
from lightning_accel.core.resizing import kept_slice
from lightning_accel.core.schedules import Timeline, check_schedule, fraction
from lightning_accel.core.shards import any_rank, group_of_all, local, reshard, rows_of, sharded_as, whole
from lightning_accel.core.strategies import Capability, shards
from lightning_accel.core.structure import Change, average_models, resized
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.pruning.criterion import Criterion
from lightning_accel.pruning.weights.criteria import weight_criterion
from lightning_accel.pruning.weights.granularity import granularity_of
from lightning_accel.pruning.weights.layers import ADAPTER, WeightKind, weight_kinds
from lightning_accel.pruning.weights.masks import (
    apply_masks_,
    check_reachable,
    check_scope,
    check_sharded,
    measured_sparsity,
    prune_masks,
    sparsity_by_name,
)
from lightning_accel.pruning.weights.rewind import rewind_, snapshot
from lightning_accel.pruning.weights.targets import FROZEN, SparsityTargets, outputs_first, summary

_UPDATES = 100  # default number of mask updates in a phase; more updates don't improve the result
_NEARLY_EMPTY = 0.95  # share of zeros in a single tensor that is warned of
_MEMORY = 0.9  # weight of the earlier steps in the moving average of scores that need gradients
_UNOWNED = "no optimizer updates it"
_WORTH = {
    "weight": "smaller when compressed; no speed-up in dense engines",
    "2:4": "up to 2x in TensorRT's sparse kernels on GPUs that have them; no speed-up elsewhere",
}


class WeightPruning(CompressionCallback):
    """Zero the least important weights during training (https://arxiv.org/abs/1710.01878).

    The share of zeros follows ``schedule`` from 0 at ``start`` to ``sparsity`` at ``end`` and stays there. Masks live in
    this callback's state; the module gets neither hooks nor parametrizations. Logged: ``sparsity`` of the pruned weights together and
    of each, and ``sparsity/total`` of all parameters of the module, counted on the tensors. A warning names each tensor of which more
    than 95 % became zero, unless that is its target.

    Pruned are the weights of layers: linear, convolutional (transposed, too), bilinear, recurrent and attention layers, their
    subclasses, and Hugging Face's ``Conv1D``. Embeddings, class tokens, tables of positions, layer scales, norms and other
    parameters are pruned only if a glob in ``include`` names them. Frozen weights stay as they are; those that thaw later
    (``BackboneFinetuning``) are pruned to the share of the schedule from their first step on. Low-rank adapters (LoRA) over frozen
    weights are refused: their zeros are lost when they are merged.

    Effect: NVIDIA's sparse tensor cores run 2:4 patterns faster. Other patterns improve the compression of files, but don't speed up
    dense engines. To reduce operations use :class:`~lightning_accel.ChannelPruning`.

    Args:
        sparsity: share of zeros among the chosen weights at the end, in [0, 1); or one for each name glob,
            ``{"layer4.*": 0.9, "head.*": 0.5}``; ``None`` for the share of an N:M pattern.
        criterion: ``"l1"`` (``"magnitude"``), ``"l2"``, ``"taylor"`` (weight times gradient, averaged over steps),
            ``"random"``, a :class:`~lightning_accel.pruning.criterion.Criterion`, a function ``(name, parameter, grad) -> scores``, or
            the import path of either.
        granularity: ``"weight"``; ``"2:4"`` and other N:M (N of M *kept*); ``"4x4"`` blocks of output by input channels;
            ``"channel"`` or ``"input_channel"``: masks of whole channels, tensors keep their size.
        scope: ``"global"`` compares all chosen weights with each other, ``"layer"`` prunes the same share of each.
        schedule: ``"cubic"``, ``"linear"``, ``"cosine"``, ``"exponential"``, ``"constant"`` (one-shot at ``start``), or a
            function from progress to a fraction.
        start: epoch (int) or share of the run (float) at which pruning begins.
        end: epoch or share at whose first step the target is reached; ``None``: half of the run after ``start``,
            ``start`` itself for ``"constant"``.
        include: name globs of parameters; ``None`` means the weights of layers that divide into units. A glob selects the weights of layers
            that it matches; if it matches none of them, the other parameters with two or more dimensions that it matches, such as
            ``"*.pos_embed"``.
        exclude: name globs; takes precedence over ``include``.
        every: optimizer steps between two mask updates; ``None``: a hundredth of the phase.
        rewind: epoch to whose start all weights are reset at each mask update, 0 for the initialization (lottery ticket,
            https://arxiv.org/abs/1803.03635); the optimizer's state is cleared, the learning rate schedule continues.
        name: the state's name in the checkpoint; needed if two are used.

    Raises:
        InvalidArgumentError: an argument is out of its range; in ``setup``, a glob that matches nothing, or a module of which only adapters
            train; before the first step, a target below the present share of zeros, or weights that another WeightPruning prunes.

    Example:
        >>> WeightPruning(sparsity=0.8, end=8).sparsity
        0.8
        >>> WeightPruning(granularity="2:4").sparsity
        0.5
    """

    wants_low_rate = False
    prunes_weights = True
    needs = Capability.ROWS

    @checked(name=NOT_EMPTY, include=NOT_EMPTY, every=at_least(1))
    def __init__(
        self,
        sparsity: float | dict[str, float] | None = None,
        criterion: str | Criterion | Callable[..., Any] = "l1",
        granularity: str = "weight",
        scope: str = "global",
        schedule: str | Callable[..., Any] = "cubic",
        start: int | float = 0,
        end: int | float | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        every: int | None = None,
        rewind: int | None = None,
        name: str = "weights",
    ) -> None:
        super().__init__(name=name, start=start, end=end)
        self.targets = SparsityTargets(
            sparsity, granularity, as_patterns("include", include), as_patterns("exclude", exclude)
        )
        self.sparsity = self.targets.shares if isinstance(sparsity, dict) else self.targets.shares["*"]
        check_scope(scope)
        if every is not None and every < 1:
            raise InvalidArgumentError(f"Argument `every` must be a number of steps >= 1, but got {every}.")
        if rewind is not None and (isinstance(rewind, bool) or not isinstance(rewind, int) or rewind < 0):
            raise InvalidArgumentError(f"Argument `rewind` must be an epoch >= 0, but got {rewind!r}.")
        if rewind is not None and every is None and schedule != "constant":
            raise InvalidArgumentError(
                "Argument `every` must be the steps of a round with `rewind`, but got None: weights would go back a hundred times."
            )
        self.criterion, self.granularity, self.scope = criterion, granularity, scope
        self._method = weight_criterion(criterion)
        self.schedule, self.every, self.rewind = check_schedule(schedule), every, rewind
        self._clear()
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._frozen: dict[str, torch.nn.Parameter] = {}  # pruned once they train
        self._kinds: dict[str, WeightKind] = {}
        self._hooks: list[Any] = []  # on the optimizers
        self._ownership = Ownership([])
        self._module: L.LightningModule | None = None

    def _clear(self) -> None:
        self.masks: dict[str, torch.Tensor] = {}
        self.reached = 0.0  # progress of the masks towards the targets, in [0, 1]
        self._chosen: list[str] = []
        self._importance: dict[str, torch.Tensor] = {}
        self._rewound: dict[str, torch.Tensor] = {}
        self._loaded_targets: dict[str, float] = {}
        self._last_step = -1
        self._last_state: dict[str, Any] | None = None  # at the end of a run whose tensors are sharded
        self._last_shares: dict[str, float] | None = None
        self._nearly_empty: set[str] = set()  # tensors that a warning has named

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            self._ownership, self._last_state, self._last_shares = Ownership([]), None, None
            if shards(trainer):
                self._check_shardable()
            if self._module is not pl_module:  # reused for another module, e.g. in a cross-validation
                self._clear()
            self._module = pl_module
        early = stage == "fit" and not builds_layers_late(pl_module)
        if early and not any(map(is_lazy, pl_module.parameters())):
            self._choose(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._ownership = ownership_of(trainer)
        self._choose(trainer, pl_module, started=True)  # layers may have been created since setup
        self._check_zeros()
        if not self.masks:
            self._report_choice(pl_module)
        self.masks = {n: rows_of(mask.to(self._weights[n].device), self._weights[n]) for n, mask in self.masks.items()}
        self._importance = {
            n: rows_of(t.to(self._weights[n].device), self._weights[n]) for n, t in self._importance.items()
        }
        # Directly after the update, before other callbacks (EMA, checkpoints) read the weights.
        self._hooks = after_steps(trainer.optimizers, self._after_step)
        if self.rewind is not None and not self._begun and not is_fast_dev_run(trainer):
            back = timeline_of(trainer, self._epoch).step("rewind", self.rewind)
            if self.rewind > self.start if isinstance(self.start, int) else back > self._start_step:
                raise InvalidArgumentError(
                    f"Argument `rewind` must be at or before `start` ({self.start}), but got {self.rewind}."
                )
        if self._placed_epoch == trainer.current_epoch or is_fast_dev_run(trainer):  # what an epoch brings is known
            self._enter_epoch(trainer, pl_module)

    @override
    def _place_phase(self, trainer: L.Trainer, timeline: Timeline, check: bool) -> None:
        ended = self._end_step if self.reached >= 1.0 and not check else None
        super()._place_phase(trainer, timeline, check)
        if ended is not None:  # the step that it ended at, whatever becomes of the rest of the run
            self._end_step = ended
        elif self.end is None and self.schedule != "constant":
            last = timeline.step("end", 1.0) if check else timeline.total_steps
            self._end_step = last if isinf(last) else self._start_step + (last - self._start_step + 1) // 2

    @override
    def _enter_epoch(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._remember(trainer, pl_module)
        self._update(trainer, trainer.current_epoch)  # the epoch before may have been shorter than expected

    @override
    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._thaw()
        if not self._method.needs_gradients or (self.reached == 1.0 and self.masks.keys() >= self._weights.keys()):
            return
        # Of several optimizers each sees the gradients that it steps with; those of the others may be of an earlier batch.
        for name in self._ownership.names(getattr(optimizer, "_optimizer", optimizer), self._weights):
            weight = self._weights[name]
            if weight.grad is not None:
                score = self._method.scores(name, local(weight), local(weight.grad))
                known = self._importance.get(name)
                if known is not None:
                    score = local(known).lerp_(score, 1.0 - _MEMORY)
                self._importance[name] = sharded_as(score, weight)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if step_of(trainer) != self._last_step:  # gradient accumulation: no step in this batch
            self._update(trainer, trainer.current_epoch + int(trainer.is_last_batch))
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        for name, share in self.sparsity_of(pl_module).items():
            key = self._log_name if name == "all" else f"{self._log_name}/{name}"
            pl_module.log(key, share, sync_dist=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply()  # EMA may have copied its average into the module
        release(self._hooks)
        if shards(trainer):  # from here on there are no exchanges between ranks any more
            self._last_shares, self._last_state = self.sparsity_of(pl_module), self.state_dict()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        release(self._hooks)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        release(self._hooks)

    @override
    def unfinished(self) -> str:
        if self._frozen and not self._weights:
            return f"WeightPruning({self.name!r}) pruned nothing: {summary(list(self._frozen))} are still frozen"
        if self.reached >= 1.0:
            return ""
        if not isinstance(self.sparsity, dict):
            return (
                f"WeightPruning({self.name!r}) reached sparsity {self.reached * self.sparsity:.3f} of {self.sparsity:g}"
            )
        return f"WeightPruning({self.name!r}) reached {self.reached:.1%} of its targets"

    @override
    def state_dict(self) -> dict[str, Any]:
        if self._last_state is not None:
            return self._last_state
        return {
            "masks": {name: whole(mask).cpu() for name, mask in self.masks.items()},
            "chosen": list(self._weights),
            "reached": self.reached,
            "importance": {name: whole(score).cpu() for name, score in self._importance.items()},
            "rewound": self._rewound,
            "targets": self.targets.shares,
            "last_step": self._last_step,
            **self.phase_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self.masks, self.reached = dict(state_dict["masks"]), state_dict["reached"]
        self._chosen, self._last_step = list(state_dict["chosen"]), state_dict["last_step"]
        self._loaded_targets = dict(state_dict["targets"])
        self._importance, self._rewound = dict(state_dict["importance"]), dict(state_dict["rewound"])

    def sparsity_of(self, module: torch.nn.Module) -> dict[str, float]:
        """Share of zeros of each pruned weight in ``module``, of these together (``"all"``), and of all parameters (``"total"``)."""
        if self._last_shares is not None and module is self._module:
            return self._last_shares
        reshard(module)
        named = dict(module.named_parameters())
        chosen = self._chosen or list(self._weights)
        if not chosen or not named.keys() >= set(chosen):  # before a run, or another module than the run's
            chosen = list(self.targets.selected(module))
        shares = sparsity_by_name({name: named[name] for name in chosen})
        return {**shares, "total": measured_sparsity(named.values())}

    @override
    def measured(self, pl_module: L.LightningModule) -> dict[str, dict[str, Any]]:
        shares = self.sparsity_of(pl_module)
        return {"sparsity": {"all parameters of the module" if n == "total" else n: s for n, s in shares.items()}}

    @override
    def layer_shares(self, pl_module: L.LightningModule) -> tuple[str, dict[str, float]]:
        shares = self.sparsity_of(pl_module)
        return "share of zeros", {name: share for name, share in shares.items() if name != "total"}

    @override
    def structure_changed(self, pl_module: L.LightningModule, change: Change) -> None:
        cuts = resized(change)
        self._importance = {name: kept_slice(score, cuts.get(name, ())) for name, score in self._importance.items()}
        if self.granularity != "weight":  # removed channels shift units: masks are recomputed at the next update
            self.masks, self.reached = {}, 0.0
            return
        self.masks = {name: kept_slice(mask, cuts.get(name, ())) for name, mask in self.masks.items()}
        if self.masks:  # removed weights may have been sparser than the others: corrected by the next update
            self.reached = min([self.reached, *self._pruned_shares().values()])

    @property
    @override
    def benefit(self) -> str:
        return _WORTH["2:4" if self.granularity == "2:4" else "weight"]

    @override
    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        lines = {}
        units = {"weight": "weights", "channel": "output channels", "input_channel": "input channels"}.get(
            self.granularity, f"{self.granularity} units"
        )
        for share, names in self.targets.groups(self._weights):
            for name in names:
                where = "" if self.scope == "layer" or len(names) == 1 else f", with {len(names) - 1} others together"
                lines[name] = f"{share:.0%} of its {units} become zero{where}"
        return lines | {name: f"stays dense: {reason}" for name, reason in self._left_dense(pl_module).items()}

    def _left_dense(self, pl_module: L.LightningModule) -> dict[str, str]:
        """Reasons why weights that the globs match are not pruned, by name."""
        unowned = {name: _UNOWNED for name, parameter in self._frozen.items() if parameter.requires_grad}
        return {**self.targets.left_dense(pl_module), **unowned}

    @property
    def _log_name(self) -> str:
        return "sparsity" if self.name == "weights" else f"sparsity/{self.name}"

    def _trains(self, parameter: torch.Tensor) -> bool:
        """Whether a parameter is trained: once there are optimizers, by one of them."""
        known = self._ownership.optimizers
        return parameter.requires_grad and (not known or self._ownership.of(parameter) is not None)

    def _choose(self, trainer: L.Trainer, pl_module: L.LightningModule, started: bool = False) -> None:
        """Determine the weights to prune; after a resume those of the checkpoint, since frozen parameters may have changed.

        Args:
            trainer: of the run.
            pl_module: its module.
            started: whether the optimizers exist.
        """
        reshard(pl_module)
        named = dict(pl_module.named_parameters())
        if lazy := [name for name, parameter in named.items() if is_lazy(parameter)]:
            raise InvalidArgumentError(
                f"Argument `model` must have initialized layers to choose weights from, but got lazy ones: {summary(lazy)}. Run the module "
                "on a batch before `fit`."
            )
        selected = self.targets.selected(pl_module)
        if unknown := set(self._chosen) - named.keys():
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must hold masks of this module's weights, but got masks of {sorted(unknown)}. "
                "Resume with the same `include` and `exclude`."
            )
        chosen = self._chosen or [name for name, parameter in selected.items() if self._trains(parameter)]
        if started and not chosen and any(p.requires_grad for p in selected.values()):
            raise InvalidArgumentError(
                f"Argument `include` must choose weights that an optimizer updates, but got {summary(list(selected))}, and none of them is "
                "in an optimizer of `configure_optimizers`. Add them to one, or choose others."
            )
        self._weights = {name: named[name] for name in chosen}
        self._frozen = {name: p for name, p in selected.items() if name not in self._weights}
        self._kinds = weight_kinds(pl_module)
        self._check_shapes({**self._weights, **self._frozen})
        self._check_resizing(trainer)
        for other in callbacks_of(trainer, WeightPruning):
            mine, others = ({**c._weights, **c._frozen} for c in (self, other))
            if other is not self and (both := mine.keys() & others.keys()):
                raise InvalidArgumentError(
                    f"Argument `include` must choose weights that no other WeightPruning does, but got {sorted(both)[:3]} twice. "
                    "Use globs that don't overlap, or one callback with a dict of targets."
                )

    def _check_shapes(self, weights: Mapping[str, torch.Tensor]) -> None:
        """Raise unless the targets are reachable."""
        normed = {name: len(weights[name]) for name in weights if self._kinds[name].normed}
        for share, names in self.targets.groups(weights):
            shapes = {name: weights[name].shape for name in names}
            shapes = {n: outputs_first(shape) if self._kinds[n].inputs_first else shape for n, shape in shapes.items()}
            check_reachable(shapes, share, self.granularity, self.scope, {n: normed[n] for n in names if n in normed})

    def _report_choice(self, pl_module: L.LightningModule) -> None:
        """Report which share of the parameters is pruned, and which weights are not and why."""
        count, total = sum(p.numel() for p in self._weights.values()), parameter_count(pl_module)
        rank_zero_info(
            f"WeightPruning: {len(self._weights)} tensors with {count:,} of the module's {total:,} parameters are pruned."
        )
        dense: dict[str, list[str]] = {}
        for name, reason in self._left_dense(pl_module).items():
            dense.setdefault(reason, []).append(name)
        for reason, names in dense.items():
            verb, until = ("stays", "it trains") if len(names) == 1 else ("stay", "they train")
            then = f" Pruned once {until}." if reason in (FROZEN, _UNOWNED) else ""
            rank_zero_info(f"WeightPruning: {summary(names)} {verb} dense: {reason}.{then}")
        if not self._weights:
            rank_zero_warn(
                f"WeightPruning({self.name!r}) prunes nothing as long as {summary(list(self._frozen))} are frozen. Set `requires_grad`, "
                "or use a callback that thaws them."
            )
        if adapters := [name for name in self._weights if self._kinds[name].reason == ADAPTER]:
            rank_zero_warn(
                f"WeightPruning({self.name!r}) prunes low-rank adapters ({summary(adapters)}): their zeros are lost when they are merged."
            )

    def _thaw(self) -> None:
        """Prune weights that were frozen so far and are trained from this step on."""
        thawed = {name: p for name, p in self._frozen.items() if self._trains(p)}
        if thawed:
            self._weights |= thawed
            self._frozen = {name: p for name, p in self._frozen.items() if name not in thawed}
            self._chosen = list(self._weights)
            rank_zero_info(f"WeightPruning: {summary(list(thawed))} are trained from now on, and pruned.")

    def _check_resizing(self, trainer: L.Trainer) -> None:
        """Raise unless tensors divide into units after another callback resized them."""
        for other in callbacks_of(trainer, CompressionCallback):
            if not other.resizes:
                continue
            who = type(other).__name__
            if self.rewind is not None:
                raise InvalidArgumentError(
                    f"Argument `rewind` must be None beside {who}, but got {self.rewind}: earlier weights have other shapes."
                )
            for size in granularity_of(self.granularity).block or ():
                if other.resizes % size:
                    raise InvalidArgumentError(
                        f"Argument `round_to` of {who} must be a multiple of {size} beside granularity {self.granularity!r}, but got "
                        f"{other.resizes}: the remaining channels must divide into units."
                    )

    def _check_zeros(self) -> None:
        """Raise if a target is below the present share of zeros, or below a checkpoint's masks."""
        if self.masks and self._loaded_targets == self.targets.shares:
            return  # resumed with the same targets; after a channel pruning weights may be sparser
        for share, names in self.targets.groups(self._weights):
            for part in [names] if self.scope == "global" else [[name] for name in names]:
                held: list[torch.Tensor] = [self.masks.get(name, self._weights[name]) for name in part]
                zeros = measured_sparsity(held)
                if zeros > share + 0.5 / sum(w.numel() for w in held) + 1e-9 and not self._coarse:
                    where = "" if self.scope == "global" else f" in `{part[0]}`"
                    raise InvalidArgumentError(
                        f"Argument `sparsity` must be at least the present share of zeros{where}, {zeros:.4g}, but got {share:g}. "
                        "Exclude weights that are initialized to zero, or raise it."
                    )
        if self.masks:  # resumed with other targets: continue from the masks
            self.reached = min([1.0, *self._pruned_shares().values()])

    def _pruned_shares(self) -> dict[float, float]:
        """Progress of the present masks towards each target."""
        groups = [(share, names) for share, names in self.targets.groups(self.masks) if share]
        return {share: measured_sparsity(self.masks[name] for name in names) / share for share, names in groups}

    @property
    def _coarse(self) -> bool:
        """Whether masks of whole units may exceed a target by part of a unit."""
        return bool(self.masks) and self.granularity != "weight" and ":" not in self.granularity

    def _remember(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Store the weights at the start of epoch ``rewind``."""
        if self.rewind is not None and not self._rewound and trainer.current_epoch == self.rewind:
            self._rewound = snapshot(pl_module)

    def _update(self, trainer: L.Trainer, epoch: int) -> None:
        """Update the masks to the schedule at the next optimizer step, which belongs to ``epoch``, if an update is due."""
        step = self._last_step = step_of(trainer)
        progress = self._progress(trainer, epoch)
        share, span = fraction(self.schedule, progress), self._end_step - self._start_step
        every = self.every or (1 if isinf(span) or isnan(span) else max(1, int(span) // _UPDATES))
        due = progress >= 1.0 or (progress >= 0.0 and (step - self._start_step) % every == 0)
        thawed = bool(self.masks) and not self.masks.keys() >= self._weights.keys()
        if not self._weights or ((share <= self.reached or not due) and not thawed):
            return
        share = max(share, self.reached)
        gradients = self._method.needs_gradients
        if gradients and not self._importance:
            raise InvalidArgumentError(
                f"Argument `start` must leave a step before the first pruning with criterion {self.criterion!r}, but got {self.start}: "
                "there is no gradient yet."
            )
        criterion = self.criterion if not gradients else self._averaged
        self._check_numbers(step)
        generator = torch.Generator().manual_seed(crc32(f"{self.name} {step}".encode()))  # the same on every rank
        for target, names in self.targets.groups(self._weights):
            self.masks |= prune_masks(
                {name: self._weights[name] for name in names},
                target * share,
                criterion=criterion,
                granularity=self.granularity,
                scope=self.scope,
                masks=self.masks,
                generator=generator,
                kinds=self._kinds,
            )
        self.reached = share
        if progress >= 1.0:
            self._end_step = step
        self._warn_of_empty_tensors()
        if self._rewound and step > 0 and self._module is not None:
            rewind_(self._module, self._rewound, *trainer.optimizers)
            rank_zero_info(
                f"WeightPruning: step {step}: weights and buffers were reset to the start of epoch {self.rewind}."
            )
        self._apply()
        for average in average_models(trainer):
            named = dict(average.named_parameters())
            apply_masks_({name: named[name] for name in self.masks}, self.masks)

    def _check_numbers(self, step: int) -> None:
        """Raise if a weight isn't a number: on every rank, if one has found that."""
        reshard(self._module) if self._module is not None else None
        found = "" if self._module is None else nan_weight(self._module)
        if any_rank(bool(found), group_of_all(self._weights.values())):
            raise RunError(
                f"Weights must be numbers to be compared, but at step {step} {found or 'another rank found NaN'}: training has diverged. "
                "Lower the learning rate, or clip gradients."
            )

    def _averaged(self, name: str, weight: torch.Tensor, grad: torch.Tensor | None) -> torch.Tensor:
        """Averaged score of a weight; 0 if the loss doesn't depend on it."""
        found = self._importance.get(name)
        return torch.zeros_like(weight, dtype=torch.float32) if found is None else local(found)

    _averaged.single = True  # type: ignore[attr-defined]  # what it averages is

    def _warn_of_empty_tensors(self) -> None:
        """Warn once of each tensor that is nearly all zeros although its target is lower."""
        shares = sparsity_by_name(self.masks)
        for target, names in self.targets.groups(self.masks):
            limit = max(_NEARLY_EMPTY, target)
            empty = [n for n in names if shares[n] > limit + 1 / self.masks[n].numel() and n not in self._nearly_empty]
            if empty:
                self._nearly_empty |= set(empty)
                few = ", ".join(f"`{name}` ({shares[name]:.1%})" for name in empty[:5])
                more = f" and {len(empty) - 5} more" if len(empty) > 5 else ""
                rank_zero_warn(
                    f"WeightPruning({self.name!r}) has zeroed nearly all of {few}{more}, at a target of {target:.0%}: their scores are "
                    'small beside those of the other weights. Use scope="layer", or exclude them.'
                )

    def _apply(self) -> None:
        apply_masks_(self._weights, self.masks)

    def _check_shardable(self) -> None:
        """Raise unless the arguments can be followed where each rank holds rows of the tensors."""
        check_sharded(self.criterion, self.granularity)
        if self.rewind is not None:
            raise InvalidArgumentError(
                f"Argument `rewind` must be None where each rank holds rows of the tensors (FSDP2), but got {self.rewind}: it keeps a copy "
                "of all weights. Train with DDP."
            )

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Zero what an optimizer has updated; with several optimizers its own weights only."""
        if len(self._ownership.optimizers) == 1:
            self._apply()
        else:
            names = self._ownership.names(optimizer, {name: self._weights[name] for name in self.masks})
            apply_masks_(self._weights, {name: self.masks[name] for name in names})
