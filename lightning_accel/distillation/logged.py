"""Numbers that every training step logs."""

from collections.abc import Mapping

import lightning as L
from torch import Tensor


def log_step(module: L.LightningModule, values: Mapping[str, Tensor | float]) -> None:
    """``self.log`` for each value, in ``training_step``.

    ``self.log`` inspects signatures and builds what describes the metric anew in each call: a quarter of a millisecond, which
    shows in the step of a small network. Once a metric of this epoch is there its value alone is moved on.

    Args:
        module: in the middle of a training step.
        values: scalars by name.
    """
    trainer = module._trainer
    if (
        trainer is None or getattr(module.log, "__func__", None) is not L.LightningModule.log
    ):  # nothing to log to, or the user's own way
        for name, value in values.items():
            module.log(name, value)
        return
    results, connector = trainer._results, trainer._logger_connector
    for name, value in values.items():
        key = f"training_step.{name}"
        fresh = results is not None and key in results and not results[key].has_reset
        if fresh and isinstance(value, Tensor) and not connector.should_reset_tensors("training_step"):
            results.update_metrics(key, value, 1)
        else:
            module.log(name, value)
