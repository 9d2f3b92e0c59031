"""Curves: what a run logged, once an epoch, for the report."""

import math
from typing import Any

import lightning as L
import torch

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
        """Take over what was logged since the last call; on every rank, since a metric may be reduced when it is read.

        A metric that wasn't logged anew, as that of a validation every second epoch, isn't repeated; a value that isn't finite
        is left out, as is the last step's where the epoch's mean is logged too.
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
        self.points.append({"epoch": trainer.current_epoch, "step": trainer.global_step, "metrics": metrics})
