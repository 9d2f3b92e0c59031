"""WeightPruning: zeroes weights under masks, on a schedule, to an absolute target."""

from collections.abc import Mapping, Sequence
from typing import Any

import lightning as L
import torch
from typing_extensions import override

from lightning_accel.compression import CompressionCallback, check_one_optimizer, timeline_of
from lightning_accel.globs import as_patterns
from lightning_accel.inputs import builds_layers_late
from lightning_accel.pruning.criteria import check_criterion
from lightning_accel.pruning.masks import (
    apply_masks_,
    check_scope,
    check_sparsity,
    measured_sparsity,
    prunable_parameters,
    prune_masks,
)
from lightning_accel.rebinding import kept_slice
from lightning_accel.schedules import Timeline, check_schedule, fraction
from lightning_accel.structure import Change, average_models, resized

_UPDATES = 100  # mask updates in a phase, unless `every` says otherwise: more follows the curve no better


class WeightPruning(CompressionCallback):
    """Zero the least important weights while training goes on (https://arxiv.org/abs/1710.01878).

    The share of zeros follows ``schedule`` from 0 at ``start`` to ``sparsity`` at ``end`` and stays there. Masks live in
    this callback's state; the module gets neither hooks nor parametrizations. Logged: ``sparsity``, counted on the
    tensors.

    Args:
        sparsity: share of zeros among the chosen weights at the end, in [0, 1).
        criterion: ``"magnitude"``.
        scope: ``"global"`` compares all chosen weights with each other, ``"layer"`` prunes the same share of each.
        schedule: ``"cubic"``, ``"linear"``, ``"cosine"``, ``"exponential"`` or ``"constant"`` (one-shot at ``start``).
        start: epoch (int) or share of the run (float) at which pruning begins.
        end: epoch or share at whose first step the target is reached; ``None``: half of the run after ``start``,
            ``start`` itself for ``"constant"``.
        include: name globs of parameters; ``None`` means all weights with two or more dimensions.
        exclude: name globs; wins over ``include``.
        every: optimizer steps between two mask updates; ``None``: a hundredth of the phase.
        name: the state's name in the checkpoint; needed if two are used.

    Raises:
        ValueError: an argument is out of its range; in ``setup``, a glob that matches nothing.

    Example:
        >>> WeightPruning(sparsity=0.8, end=8).sparsity
        0.8
    """

    def __init__(
        self,
        sparsity: float,
        criterion: str = "magnitude",
        scope: str = "global",
        schedule: str = "cubic",
        start: int | float = 0,
        end: int | float | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        every: int | None = None,
        name: str = "weights",
    ) -> None:
        super().__init__(name=name, start=start, end=end)
        check_sparsity(sparsity)
        check_scope(scope)
        if every is not None and every < 1:
            raise ValueError(f"Argument `every` must be a number of steps >= 1, but got {every}.")
        self.sparsity, self.criterion, self.scope = sparsity, check_criterion(criterion), scope
        self.schedule, self.every = check_schedule(schedule), every
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        self.masks: dict[str, torch.Tensor] = {}
        self.reached = 0.0  # share that the masks in force prune; the target is reached when it equals `sparsity`
        self._weights: dict[str, torch.nn.Parameter] = {}
        self._hook: Any = None
        self._module: L.LightningModule | None = None
        self._last_step = -1

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        if stage == "fit":
            if self._module is not pl_module:  # used for another module before, in a cross-validation, say
                self.masks, self.reached, self._last_step = {}, 0.0, -1
            self._module = pl_module
        if stage == "fit" and not builds_layers_late(pl_module):
            self._weights = prunable_parameters(pl_module, self.include, self.exclude)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        check_one_optimizer(trainer, type(self).__name__)
        self._weights = prunable_parameters(pl_module, self.include, self.exclude)  # layers may have come since setup
        if self.end is None and self.schedule != "constant" and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            last = timeline_of(trainer).step("end", 1.0)
            self._end_step = self._start_step + (last - self._start_step + 1) // 2
        if self.reached > self.sparsity:
            raise ValueError(
                f"Argument `sparsity` must be at least what is pruned already, {self.reached:g}, but got {self.sparsity:g}."
            )
        if unknown := self.masks.keys() - self._weights.keys():
            raise ValueError(
                f"Argument `ckpt_path` must hold masks of this module's weights, but got masks of {sorted(unknown)}. "
                "Resume with the same `include` and `exclude`."
            )
        self.masks = {name: mask.to(self._weights[name].device) for name, mask in self.masks.items()}
        # Right after the update, before any other callback (EMA, a checkpoint) sees the weights.
        self._hook = trainer.optimizers[0].register_step_post_hook(lambda *_: self._apply())
        self._update(trainer.global_step, trainer)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._last_step:  # micro-batches of an accumulation end without a step
            self._update(trainer.global_step, trainer)

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pl_module.log(self._log_name, measured_sparsity(self._weights.values()), rank_zero_only=True)

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._apply()  # EMA may have put its average into the module just now
        self._remove_hook()

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._remove_hook()

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().teardown(trainer, pl_module, stage)
        self._remove_hook()

    @override
    def unfinished(self) -> str:
        if self.reached >= self.sparsity:
            return ""
        return f"WeightPruning({self.name!r}) reached sparsity {self.reached:.3f} of {self.sparsity:g}"

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "masks": {name: mask.cpu() for name, mask in self.masks.items()},
            "reached": self.reached,
            "last_step": self._last_step,
            **self.phase_state(),
        }

    @override
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.masks = dict(state_dict["masks"])
        self.reached = state_dict["reached"]
        self._last_step = state_dict["last_step"]

    def sparsity_of(self, module: torch.nn.Module) -> dict[str, float]:
        """Measured share of zeros of each chosen weight in ``module``, and of all together under ``"all"``."""
        weights = prunable_parameters(module, self.include, self.exclude)
        return {n: measured_sparsity([w]) for n, w in weights.items()} | {"all": measured_sparsity(weights.values())}

    @override
    def structure_changed(self, pl_module: L.LightningModule, change: Change) -> None:
        cuts = resized(change)
        self.masks = {name: kept_slice(mask, cuts.get(name, ())) for name, mask in self.masks.items()}
        if self.masks:  # what left may have been sparser than what stayed: the next update makes up for it
            pruned = sum(int((~mask).sum()) for mask in self.masks.values())
            self.reached = min(self.reached, pruned / sum(mask.numel() for mask in self.masks.values()))

    @property
    def _log_name(self) -> str:
        return "sparsity" if self.name == "weights" else f"sparsity/{self.name}"

    def _update(self, step: int, trainer: L.Trainer) -> None:
        """Move the masks to where the schedule is before optimizer step ``step``, if it is time to."""
        self._last_step = step
        share = self.sparsity * fraction(self.schedule, Timeline.progress(step, self._start_step, self._end_step))
        every = self.every or max(1, (self._end_step - self._start_step) // _UPDATES)
        due = step >= self._end_step or (step - self._start_step) % every == 0
        if share > self.reached and due:
            self.masks = prune_masks(
                self._weights, share, criterion=self.criterion, scope=self.scope, masks=self.masks or None
            )
            self.reached = share
            self._apply()
            for average in average_models(trainer):
                named = dict(average.named_parameters())
                apply_masks_({name: named[name] for name in self.masks}, self.masks)

    def _apply(self) -> None:
        apply_masks_(self._weights, self.masks)

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
            self._hook = None


def prune_weights_(
    module: torch.nn.Module,
    sparsity: float,
    *,
    criterion: str = "magnitude",
    scope: str = "global",
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Zero a share of a module's weights in place, once; the callback's work without a Trainer.

    Args:
        module: any module.
        sparsity: share of zeros among the chosen weights, in [0, 1).
        criterion: ``"magnitude"``.
        scope: ``"global"`` or ``"layer"``.
        include: name globs; empty means all weights with two or more dimensions.
        exclude: name globs; wins over ``include``.

    Returns:
        The masks, by parameter name; ``True`` where the weight stays.

    Raises:
        ValueError: an argument is out of its range, or a glob matches nothing.
    """
    weights = prunable_parameters(module, include, exclude)
    masks = prune_masks(weights, sparsity, criterion=criterion, scope=scope)
    apply_masks_(weights, masks)
    return masks
