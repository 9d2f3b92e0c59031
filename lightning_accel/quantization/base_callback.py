"""Base of the quantizing callbacks: capture before training, checks, and state."""

from dataclasses import replace
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.compile import to_uncompiled
from typing_extensions import override

from lightning_accel.calls.batches import InputsFunction
from lightning_accel.calls.contexts import builds_layers_late, has_forward
from lightning_accel.calls.discovery import chosen_path, owner_and_call
from lightning_accel.core import structure
from lightning_accel.core.callback import CompressionCallback
from lightning_accel.core.packages import counterpart
from lightning_accel.core.strategies import prepares_early, shards
from lightning_accel.core.trainers import callbacks_of
from lightning_accel.errors import CaptureError, InvalidArgumentError
from lightning_accel.quantization.arithmetic.targets import Target, target_names
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantize_change, quantized_forwards
from lightning_accel.quantization.settings import QuantizationSettings, check_apart


class QuantizingCallback(CompressionCallback):
    """Base of the callbacks that put fake-quantization into ``forward``.

    Args:
        settings: parts of the network, target, and calibration.
        name: the state's name in the checkpoint.
        start: epoch (int) or share of the run (float) at which fake-quantization begins.
    """

    captures = True
    trains = True  # whether training runs with fake-quantization, so that its steps must call what is quantized

    def __init__(self, settings: QuantizationSettings, *, name: str, start: int | float) -> None:
        super().__init__(name=name, start=start)
        self.settings = settings
        self._prepared: dict[str, QuantizedForward] = {}  # planned before training, put in place at `start`
        self._placed: dict[str, QuantizedForward] = {}

    @property
    def target(self) -> Target:
        """The arithmetic that the network is quantized for."""
        return self.settings.arithmetic

    @property
    def paths(self) -> list[str]:
        """Paths of the submodules that are quantized; ``[""]`` for the whole module."""
        return self.settings.paths

    @property
    def names_batch(self) -> bool:
        """Whether the arguments say which axes are the batch."""
        return self.settings.names_batch

    @property
    def inputs(self) -> InputsFunction | None:
        """Maps a batch to the arguments of ``forward``."""
        return self.settings.inputs

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        # The callback may be reused for another module, e.g. in a cross-validation.
        parts = dict(pl_module.named_modules())
        self._prepared = {p: f for p, f in self._prepared.items() if f.module is parts.get(p)}
        self.structure_replayed(pl_module)
        if stage != "fit":
            return
        who = type(self).__name__
        if self.settings.target is None:
            rank_zero_info(
                f"{who}: quantizes for `{self.target.name}`, which this machine can run. Pass `target` to choose another: "
                f"{', '.join(target_names())}."
            )
        check_apart("module", [p for c in callbacks_of(trainer, QuantizingCallback) for p in c.paths])
        if trainer.precision in ("16-true", "bf16-true", "64-true", "transformer-engine"):
            raise InvalidArgumentError(
                f"Argument `precision` must keep float32 weights with {who}, but got {trainer.precision!r}. "
                'Use "32-true", "bf16-mixed" or "16-mixed".'
            )
        if getattr(pl_module, "_compiler_ctx", None) is not None:
            counterpart(to_uncompiled, pl_module)(pl_module)
            rank_zero_warn(f"{who} quantizes while `forward` runs: the module runs without torch.compile in this fit.")
        if prepares_early(trainer, pl_module, who) or not builds_layers_late(pl_module):
            self.prepare(trainer, pl_module)

    @property
    def quantizing(self) -> bool:
        """Whether fake-quantization is active."""
        return bool(self._placed) and all(forward.bank.active for forward in self._placed.values())

    @override
    def structure_changed(self, pl_module: L.LightningModule, change: structure.Change) -> None:
        self._prepared = {}  # planned with the old shapes

    @override
    def structure_replayed(self, pl_module: L.LightningModule) -> None:
        self.settings.adopt(structure.record_of(pl_module), self.state_key)
        self._placed = {p: f for p, f in quantized_forwards(pl_module).items() if p in self.paths}
        for forward in self._placed.values():
            wanted = (self.target.name, self.settings.includes, self.settings.excludes)
            if (forward.target.name, forward.include, forward.exclude) != wanted:
                raise InvalidArgumentError(
                    f"Arguments `target`, `include` and `exclude` must be those that the network was quantized with "
                    f"({forward.target.name!r}, {list(forward.include)}, {list(forward.exclude)}), but got "
                    f"{self.target.name!r}, {list(self.settings.includes)}, {list(self.settings.excludes)}."
                )
        record = structure.record_of(pl_module)
        for i, change in enumerate(record):
            if change.kind == "quantize" and change.args["module"] in self._placed:
                record[i] = replace(change, owner=self.state_key)  # owner of the ranges from now on
        self._prepared = {p: f for p, f in self._prepared.items() if p not in self._placed}

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        self.prepare(trainer, pl_module)

    def prepare(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, QuantizedForward]:
        """Capture the untrained network, so that errors occur before the run.

        Returns:
            Quantized forwards by path, in place now or from ``start`` on. A second call does nothing.
        """
        if self.trains or not has_forward(pl_module):
            self.settings.choose(lambda: chosen_path(pl_module, trainer, type(self).__name__))
        for path in self.paths:
            if path in self._placed or path in self._prepared:
                continue
            owner, call = owner_and_call(pl_module, path, trainer, self.inputs)
            try:
                forward = self.settings.prepare(owner, call, path)
            except CaptureError as error:
                if path and not has_forward(pl_module):
                    error.add_note(
                        f"`{type(pl_module).__name__}` has no `forward`, so `{path}` was called with the batch itself. If `training_step` "
                        "calls it with something else, write a `forward` that does so, too."
                    )
                if shards(trainer):
                    error.add_note(
                        "It is captured before its tensors are sharded: build all layers in `__init__`, and only call `fully_shard` in "
                        "`configure_model`."
                    )
                raise
            self._prepared[path] = forward
            if forward.caches:
                rank_zero_info(
                    f"{type(self).__name__}: a {forward.caches[0]} isn't an output of the exported network, which computes each call anew."
                )
            for operator, reason in forward.kept_float.items():
                rank_zero_info(f"{type(self).__name__}: `{operator}` stays float: {reason}.")
        return {**self._prepared, **self._placed}

    @override
    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        lines: dict[str, str] = {}
        for path, forward in {**self._prepared, **self._placed}.items():
            before = f"{path}." if path else ""
            lines |= {f"{before}{name}": f"{self.target.name} int8" for name in forward.quantized}
            lines |= {f"{before}{name}": f"stays float: {reason}" for name, reason in forward.kept_float.items()}
        return lines

    def int8_weights(self, pl_module: L.LightningModule) -> list[str]:
        """Names of the parameters that are exported as integers."""
        stored: set[int] = set()
        for path, forward in {**self._prepared, **self._placed}.items():
            part = dict((pl_module.get_submodule(path) if path else pl_module).named_modules())
            weights = (getattr(part.get(name), "weight", None) for name in forward.quantized)
            stored |= {id(weight) for weight in weights if isinstance(weight, torch.Tensor)}
        return [name for name, parameter in pl_module.named_parameters() if id(parameter) in stored]

    @override
    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        record = structure.record_of(pl_module)
        for path, forward in self._placed.items():
            if forward.follow():
                index = next(i for i, c in enumerate(record) if c.kind == "quantize" and c.args["module"] == path)
                record[index] = quantize_change(forward, self.state_key)

    def place(self, pl_module: L.LightningModule) -> None:
        """Quantize in ``forward`` from now on, and record the change."""
        for path, forward in self._prepared.items():
            forward.follow()  # Python that `forward` reads may have changed since `setup`
            forward.take_over(pl_module.get_submodule(path))
            structure.record_of(pl_module).append(quantize_change(forward, self.state_key))
        self._placed, self._prepared = self._prepared, {}

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
            raise InvalidArgumentError(
                f"Argument `module` must name what was quantized, {sorted(lost)}, but got {self.paths}."
            )
        for path, ranges in state_dict["ranges"].items():
            self._placed[path].bank.load_state_dict(ranges)


class AllRanks:
    """Reductions over the ranks of a distributed run, so that every rank learns the same ranges."""

    def extremes(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Smallest ``low`` and largest ``high`` of all ranks."""
        both = torch.cat([-low, high])
        torch.distributed.all_reduce(both, torch.distributed.ReduceOp.MAX)
        return -both[: len(low)], both[len(low) :]

    def mean(self, values: torch.Tensor) -> torch.Tensor:
        """Mean over all ranks."""
        total = values.clone()
        torch.distributed.all_reduce(total)
        return total / torch.distributed.get_world_size()


def ranks_of(trainer: L.Trainer) -> AllRanks | None:
    """Reductions over the ranks of a run; ``None`` for a single process."""
    return AllRanks() if trainer.world_size > 1 else None
