"""Callback for training with weights on an integer grid."""

from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_accel.core import structure
from lightning_accel.core.callback import CompressionCallback
from lightning_accel.core.globs import as_patterns
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import KIND, quantize_change, select_layers
from lightning_accel.quantization.weight_only.targets import WeightOnlyTarget, weight_only_target


class WeightOnlyQuantization(CompressionCallback):
    """Train with weights on an integer grid with a scale per group of inputs; the shipped integers equal the trained ones.

    From ``start`` on, the linear layers (``nn.Linear`` and the ``Conv1D`` of transformers) compute with rounded weights, with a
    straight-through gradient. Activations stay float, so no ranges are learned and no graph is captured: any ``forward`` works. The
    parameters and their names stay as they are. ``QuantizationAwareTraining(target="int4")`` returns this callback.

    Args:
        target: ``"int4"`` or ``"int8-weights"``.
        start: epoch (int) or share of the run (float) from which weights are rounded.
        group: neighbouring inputs of a layer that share a scale.
        include: globs of layers; ``None`` means all linear ones. A glob also matches the end of a name: ``"lm_head"`` means
            ``"model.lm_head"``, too.
        exclude: globs of layers that stay float.
        name: the state's name in the checkpoint.

    Raises:
        InvalidArgumentError: an argument is out of its range; in ``setup``, a glob that matches nothing, or a group that doesn't divide
            the inputs of a layer.

    Example:
        >>> WeightOnlyQuantization("int4", start=1, exclude="lm_head").grid
        GroupGrid(bits=4, group=32)
    """

    def __init__(
        self,
        target: str | WeightOnlyTarget = "int4",
        start: int | float = 0.5,
        group: int = 32,
        include: str | list[str] | None = None,
        exclude: str | list[str] | None = None,
        name: str = "weight_only",
    ) -> None:
        super().__init__(name=name, start=start)
        self.target = weight_only_target(target)
        self.grid = GroupGrid(self.target.bits, group)
        self.include, self.exclude = as_patterns("include", include), as_patterns("exclude", exclude)
        self.layers: list[str] = []
        self.kept_float: dict[str, str] = {}
        self._rounds = False

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        super().setup(trainer, pl_module, stage)
        self.structure_replayed(pl_module)
        if stage != "fit":
            return
        if trainer.precision in ("16-true", "bf16-true", "64-true", "transformer-engine"):
            raise InvalidArgumentError(
                f"Argument `precision` must keep float32 weights with {type(self).__name__}, but got {trainer.precision!r}. "
                'Use "32-true", "bf16-mixed" or "16-mixed".'
            )
        self.layers, self.kept_float = select_layers(pl_module, self.grid.group, self.include, self.exclude)
        for layer, reason in self.kept_float.items():
            rank_zero_info(f"{type(self).__name__}: `{layer}` stays float: {reason}.")

    @override
    def structure_replayed(self, pl_module: L.LightningModule) -> None:
        wanted = {"bits": self.grid.bits, "group": self.grid.group}
        found = [c for c in structure.record_of(pl_module) if c.kind == KIND and c.owner == self.state_key]
        for change in found:
            if {key: change.args[key] for key in wanted} != wanted:
                raise InvalidArgumentError(
                    f"Arguments `target` and `group` must be those that the network was quantized with ({change.args['bits']} bits, group "
                    f"{change.args['group']}), but got {self.grid.bits} bits, group {self.grid.group}."
                )
        self._rounds = bool(found)

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
        if not self._rounds and self._begins(trainer):
            structure.apply(pl_module, quantize_change(self.layers, self.grid, self.state_key))
            self._rounds = True

    @override
    def unfinished(self) -> str:
        start = "" if self._rounds else f"it starts at {self.start}"
        return f"{type(self).__name__}({self.name!r}) hasn't rounded weights yet: {start}" if start else ""

    @property
    @override
    def benefit(self) -> str:
        return f"{self.grid.bits}-bit weights with a scale for each {self.grid.group} inputs"

    @override
    def plan(self, trainer: L.Trainer, pl_module: L.LightningModule) -> dict[str, str]:
        what = f"{self.target.name}, group {self.grid.group}"
        return dict.fromkeys(self.layers, what) | {n: f"stays float: {why}" for n, why in self.kept_float.items()}

    @override
    def state_dict(self) -> dict[str, Any]:
        return self.phase_state()
