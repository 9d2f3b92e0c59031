"""Record logged metrics once per epoch for the report."""

import math
from typing import Any

import lightning as L
import torch

from lightning_accel.core.clock import step_of

_LEFT_OUT = ("sparsity/",)  # one for each weight: the report shows where they ended


class Curves:
    """Logged metrics of each epoch, as plain values that a checkpoint keeps.

    Attributes:
        points: ``epoch`` (0-based), ``step`` (optimizer steps so far) and ``metrics`` (name -> value) of each epoch.
    """

    def __init__(self) -> None:
        self.points: list[dict[str, Any]] = []
        self._seen: dict[str, torch.Tensor] = {}

    def record(self, trainer: L.Trainer) -> None:
        """Record metrics logged since the last call; called on every rank, since reading a metric may reduce it.

        A metric that wasn't logged again, such as that of a validation every second epoch, isn't repeated. Values that aren't finite
        are skipped, and so is the last step's value if the epoch mean is logged too.
        """
        logged = dict(trainer.callback_metrics)
        metrics = {}
        for name, value in logged.items():
            whole = f"{name.removesuffix('_step')}_epoch"
            twice = (name.endswith("_step") and whole in logged) or f"{name}_epoch" in logged
            if self._seen.get(name) is value or twice or name.startswith(_LEFT_OUT) or value.numel() != 1:
                continue
            if math.isfinite(number := float(value)):
                metrics[name.removesuffix("_epoch") if f"{name.removesuffix('_epoch')}_step" in logged else name] = (
                    number
                )
        self._seen = logged
        if len(trainer.optimizers) == 1:
            metrics["learning rate"] = float(trainer.optimizers[0].param_groups[0]["lr"])
        self.points = [p for p in self.points if p["epoch"] < trainer.current_epoch]
        self.points.append({"epoch": trainer.current_epoch, "step": step_of(trainer), "metrics": metrics})
