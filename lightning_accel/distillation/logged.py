"""Log the metrics of every training step at low cost."""

from collections.abc import Mapping
from typing import Any

import lightning as L
from torch import Tensor

from lightning_accel.core.packages import counterpart


def log_step(module: L.LightningModule, values: Mapping[str, Tensor | float]) -> None:
    """``self.log`` for each value, in ``training_step``.

    ``self.log`` inspects signatures and builds what describes the metric anew in each call: a quarter of a millisecond, which
    shows in the step of a small network. Once a metric of this epoch is there its value alone is moved on.

    Args:
        module: in the middle of a training step.
        values: scalars by name.
    """
    trainer = module._trainer
    lightning = (
        getattr(module.log, "__func__", None) is counterpart(L.LightningModule, module).log
    )  # and not the user's own way
    if trainer is None or not lightning:
        for name, value in values.items():
            module.log(name, value)
        return
    results: Any = trainer._results
    anew = results is None or trainer._logger_connector.should_reset_tensors("training_step")
    for name, value in values.items():
        key = f"training_step.{name}"
        if anew or key not in results or results[key].has_reset or not isinstance(value, Tensor):
            module.log(name, value)
        else:
            results.update_metrics(key, value, 1)
