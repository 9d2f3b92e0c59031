"""QuantizationAwareTraining: trains the network with the integer arithmetic it will ship with."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from typing_extensions import override

from lightning_accel import structure
from lightning_accel.call_shapes import describe_inputs
from lightning_accel.compression import CompressionCallback, check_one_optimizer, timeline_of
from lightning_accel.globs import as_patterns
from lightning_accel.inputs import (
    InputsFunction,
    builds_layers_late,
    owner_and_call,
)
from lightning_accel.quantization.prepare import QuantizedForward, quantize_change, quantized_forwards
from lightning_accel.quantization.targets import target_of


class QuantizationAwareTraining(CompressionCallback):
    """Train with fake-quant of a target's arithmetic, so that the integers that ship are the ones that were trained.

    From ``start`` on, ``forward`` of the module (or of the submodules named) is a captured graph over the same parameters:
    ranges are learned from the first training batches in float, then activations and weights are rounded as the target
    will round them (https://arxiv.org/abs/1712.05877). After ``fit`` the module still computes what ships.

    Args:
        target: ``"tensorrt"``, ``"onnxruntime"`` or ``"portable"``.
        start: epoch (int) or share of the run (float) at which it begins.
        module: dotted path(s) of the submodules to quantize; ``None`` means the LightningModule's ``forward``. Name them
            if ``training_step`` calls them instead of ``forward``.
        include: globs of operators to quantize (module paths); ``None`` means all.
        exclude: globs of operators that stay float.
        calibration_batches: training batches that are only watched before the first fake-quant step.
        inputs: maps a batch to the arguments of ``forward``; needed only where its signature doesn't tell.
        name: the state's name in the checkpoint.

    Raises:
        ValueError: an argument is out of its range; in ``setup``, a glob or path that matches nothing.
        CaptureError: in ``setup``, a ``forward`` that ``torch.export`` can't capture.

    Example:
        >>> QuantizationAwareTraining(target="portable", start=0.5).target.weight_max
        63
    """

    captures = True

    def __init__(
        self,
        target: str = "tensorrt",
        start: int | float = 0.5,
        module: str | list[str] | None = None,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        calibration_batches: int = 8,
        inputs: InputsFunction | None = None,
        name: str = "qat",
    ) -> None:
        super().__init__(name=name, start=start)
        if calibration_batches < 1:
            raise ValueError(f"Argument `calibration_batches` must be at least 1, but got {calibration_batches}.")
        self.target = target_of(target)
        self.paths = list(as_patterns("module", module)) or [""]
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        self.calibration_batches, self.inputs = calibration_batches, inputs
        self._prepared: dict[str, QuantizedForward] = {}  # captured in preflight, placed at `start`
        self._placed: dict[str, QuantizedForward] = {}
        self._watch: _CallWatch | None = None
        self._checked = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # A callback may be used for another module, in a cross-validation, say.
        parts = dict(pl_module.named_modules())
        self._prepared = {p: f for p, f in self._prepared.items() if f.module is parts.get(p)}
        self.structure_replayed(pl_module)
        if stage == "fit":
            _check_apart([c for c in trainer.callbacks if isinstance(c, QuantizationAwareTraining)])  # type: ignore[attr-defined]
            if trainer.precision in ("16-true", "bf16-true", "64-true", "transformer-engine"):
                raise ValueError(
                    f"Argument `precision` must keep float32 weights with QuantizationAwareTraining, but got {trainer.precision!r}. "
                    'Use "32-true", "bf16-mixed" or "16-mixed".'
                )
            if getattr(trainer.strategy, "_layer_sync", None) is not None:
                raise ValueError(
                    "Argument `sync_batchnorm` must be False with QuantizationAwareTraining, but got True."
                )
            if getattr(pl_module, "_compiler_ctx", None) is not None:
                raise ValueError(
                    "Argument `model` must not be a `torch.compile`d module, but got one. Pass the module itself."
                )
            self._checked = False
            if not builds_layers_late(pl_module):
                self.prepare(trainer, pl_module)

    @override
    def structure_changed(self, pl_module: L.LightningModule, change: structure.Change) -> None:
        self._prepared = {}  # captured with the shapes of before: captured again where it is needed

    @override
    def structure_replayed(self, pl_module: L.LightningModule) -> None:
        self._placed = {p: f for p, f in quantized_forwards(pl_module).items() if p in self.paths}
        for forward in self._placed.values():
            wanted = (self.target.name, self.include, self.exclude)
            if (forward.target.name, forward.include, forward.exclude) != wanted:
                raise ValueError(
                    f"Arguments `target`, `include` and `exclude` must be those that the network was quantized with "
                    f"({forward.target.name!r}, {list(forward.include)}, {list(forward.exclude)}), but got "
                    f"{self.target.name!r}, {list(self.include)}, {list(self.exclude)}."
                )
        record = structure.record_of(pl_module)
        for i, change in enumerate(record):
            if change.kind == "quantize" and change.args["module"] in self._placed:
                record[i] = replace(change, owner=self.state_key)  # who keeps the ranges from now on
        self._prepared = {p: f for p, f in self._prepared.items() if p not in self._placed}

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.prepare(trainer, pl_module)

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, QuantizedForward]:
        """Capture the untrained network now: what can't be captured must not fail in the middle of the run.

        Returns:
            The forwards that are, or at ``start`` will be, in place, by path. A second call does nothing.
        """
        for path in self.paths:
            if path in self._placed or path in self._prepared:
                continue
            owner, call = owner_and_call(pl_module, path, trainer, self.inputs)
            forward = QuantizedForward(owner, describe_inputs(*call), self.target, self.include, self.exclude, path)
            self._prepared[path] = forward
            for operator, reason in forward.kept_float.items():
                rank_zero_info(f"QuantizationAwareTraining: `{operator}` stays float: {reason}.")
        return {**self._prepared, **self._placed}

    @override
    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        lines: dict[str, str] = {}
        for path, forward in {**self._prepared, **self._placed}.items():
            before = f"{path}." if path else ""
            lines |= {f"{before}{name}": f"{self.target.name} int8" for name in forward.quantized}
            lines |= {f"{before}{name}": f"stays float: {reason}" for name, reason in forward.kept_float.items()}
        return lines

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        check_one_optimizer(trainer, type(self).__name__)
        if self._start_step >= timeline_of(trainer).total_steps:
            raise ValueError(
                f"Argument `start` must lie before the end of the run, but got {self.start}, which is step {self._start_step}."
            )

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if not self._placed and trainer.global_step >= self._start_step:
            self.prepare(trainer, pl_module)
            self._place(pl_module)
        for forward in self._placed.values():
            forward.bank.learning = True
        self._unwatch()  # a batch that was skipped ended without its hook
        if self._prepared or not self._checked:
            self._watch = _CallWatch(pl_module, self.paths, self._prepared, find=not self._checked)

    @override
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        watch = self._unwatch()
        if watch is not None and outputs is not None and not self._checked:  # a step that returned None says nothing
            watch.check()
            self._checked = True
        for forward in self._placed.values():
            forward.bank.learning = False
            forward.bank.update(_over_ranks(trainer))
            forward.bank.active = forward.bank.active or forward.bank.batches >= self.calibration_batches

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        super().on_exception(trainer, pl_module, exception)
        self._unwatch()
        for forward in self._placed.values():
            forward.bank.learning = False
            forward.bank.forget()

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._unwatch()

    def _unwatch(self) -> "_CallWatch | None":
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.remove()
        return watch

    def _place(self, pl_module: L.LightningModule) -> None:
        for path, forward in self._prepared.items():
            pl_module.get_submodule(path).__dict__["forward"] = forward
            structure.record_of(pl_module).append(quantize_change(forward, self.state_key))
        self._placed, self._prepared = self._prepared, {}

    @override
    def unfinished(self) -> str:
        if self._placed and all(f.bank.active for f in self._placed.values()):
            return ""
        seen = min((f.bank.batches for f in self._placed.values()), default=0)
        return (
            f"QuantizationAwareTraining({self.name!r}) hasn't trained with fake-quant yet: it starts at {self.start} and has "
            f"seen {seen} of {self.calibration_batches} calibration batches"
        )

    @override
    def state_dict(self) -> dict[str, Any]:
        return {
            "ranges": {path: forward.bank.state_dict() for path, forward in self._placed.items()},
            **self.phase_state(),
        }

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        if lost := state_dict["ranges"].keys() - self._placed.keys():
            raise ValueError(f"Argument `module` must name what was quantized, {sorted(lost)}, but got {self.paths}.")
        for path, ranges in state_dict["ranges"].items():
            self._placed[path].bank.load_state_dict(ranges)


def _check_apart(callbacks: list[QuantizationAwareTraining]) -> None:
    """No part of the network is quantized by two callbacks, or twice by one.

    Raises:
        ValueError: one is.
    """
    paths = [path for callback in callbacks for path in callback.paths]
    for i, path in enumerate(paths):
        for other in paths[:i]:
            if not path or not other or path == other or path.startswith(f"{other}.") or other.startswith(f"{path}."):
                raise ValueError(
                    f"Argument `module` must name parts of the network that don't overlap, but got {other or 'the whole forward'!r} "
                    f"and {path or 'the whole forward'!r}. Name each part once."
                )


def _over_ranks(trainer: L.Trainer) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """Ranges over all ranks, so that every rank learns the same ones."""
    if trainer.world_size == 1:
        return None

    def reduce(low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        both = torch.cat([-low, high])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return -both[: len(low)], both[len(low) :]

    return reduce


class _CallWatch:
    """Sees, for one training batch, whether the modules to quantize are called, and with inputs that were captured.

    A call that doesn't fit the graphs fails in the first steps, not when they are placed half a run later.
    """

    def __init__(
        self, pl_module: L.LightningModule, paths: list[str], prepared: Mapping[str, QuantizedForward], find: bool
    ) -> None:
        self._paths, self._prepared = paths, prepared
        self._called: set[str] = set()
        self._undo: list[Callable[[], Any]] = []
        for path in paths:
            self._wrap(path, pl_module.get_submodule(path))
        for name, child in pl_module.named_children() if find else ():
            handle = child.register_forward_pre_hook(lambda *_, name=name: self._called.add(name))
            self._undo.append(handle.remove)

    def _wrap(self, path: str, module: nn.Module) -> None:
        """Replace ``forward`` on the instance: a hook would miss ``self.forward(x)``."""
        taken, forward = module.__dict__.get("forward"), module.forward

        def seen(*args: Any, **kwargs: Any) -> Any:
            self._called.add(path)
            if path in self._prepared:
                self._prepared[path].checked(args, kwargs)
            return forward(*args, **kwargs)

        seen.__wrapped__ = forward  # type: ignore[attr-defined]  # for whoever looks for a captured graph
        module.__dict__["forward"] = seen

        def restore() -> None:
            module.__dict__.pop("forward", None)
            if taken is not None:
                module.__dict__["forward"] = taken

        self._undo.append(restore)

    def remove(self) -> None:
        while self._undo:
            self._undo.pop()()

    def check(self) -> None:
        """Raise if a module wasn't called.

        Raises:
            ValueError: it wasn't; the message names the ones that were.
        """
        for path in self._paths:
            if path not in self._called:
                what = f"`{path}`" if path else "the module's `forward`"
                called = sorted(name for name in self._called if name not in self._paths)
                raise ValueError(
                    f"Argument `module` must name what `training_step` calls, but got {what}, which it did not call. "
                    f"It called: {', '.join(called) or 'no submodule'}. "
                    + (f'Use QuantizationAwareTraining(module="{called[0]}").' if called else "")
                )
