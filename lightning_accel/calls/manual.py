"""Trial runs of a ``training_step`` with manual optimization: on a copy, with optimizers of the copy, which make no steps."""

from contextlib import ExitStack, nullcontext
from typing import Any

import lightning as L
import torch
from lightning.pytorch.core.optimizer import _configure_optimizers
from torch.utils import _pytree as pytree

from lightning_accel.core.packages import counterpart
from lightning_accel.core.patching import Patches, swapped

_BATCHES = 1000  # length of the run that schedules of a copy are made for
_MANUAL = ("clip_gradients", "toggle_optimizer", "untoggle_optimizer")


def own_optimizers(module: Any, trainer: L.Trainer | None, patches: Patches) -> None:
    """Let the steps of a copied LightningModule reach optimizers of its own instead of the run's.

    Before training the run has none, and later the step would update, freeze and count: ``toggle_optimizer`` switches ``requires_grad`` of
    the run's parameters.

    Args:
        module: the copy.
        trainer: of the run, which ``configure_optimizers`` may ask; ``None`` outside of one.
        patches: undone after the trial.
    """
    optimizers, schedulers = _configured(module, trainer)

    def backward(loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(*args, **kwargs)

    patches.swap(module, "optimizers", lambda use_pl_optimizer=True: _one_or_all(optimizers))
    patches.swap(module, "lr_schedulers", lambda: _one_or_all(schedulers) if schedulers else None)
    patches.swap(module, "manual_backward", backward)
    for name in _MANUAL:
        patches.swap(module, name, lambda *_, **__: None)


def own_distillation(module: Any, patches: Patches) -> None:
    """Let a step call ``self.distill`` without its teacher: the loss is the step's own, or 0."""
    if not hasattr(type(module), "distill"):
        patches.swap(module, "distill", _no_distillation)


def _no_distillation(batch: Any, outputs: Any, task_loss: torch.Tensor | None = None) -> torch.Tensor:
    if task_loss is not None:
        return task_loss
    tensor = next(leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, torch.Tensor))
    return tensor.float().mean() * 0


def _one_or_all(values: list[Any]) -> Any:
    return values[0] if len(values) == 1 else values


def _configured(module: Any, trainer: L.Trainer | None) -> tuple[list[Any], list[Any]]:
    """Optimizers and schedulers of a copy, from its own ``configure_optimizers``."""
    with ExitStack() as stack:
        if trainer is not None and trainer.fit_loop._combined_loader is None:
            # `estimated_stepping_batches` would set the run's loaders up, before their random state is restored.
            stack.enter_context(swapped(trainer.fit_loop, "setup_data", lambda: None))
            stack.enter_context(swapped(trainer.fit_loop, "max_batches", _BATCHES))
        configured = module.configure_optimizers()
    if configured is None:
        return [], []
    optimizers, schedulers, _ = counterpart(_configure_optimizers, module)(configured)
    plain = [entry["scheduler"] if isinstance(entry, dict) else entry for entry in schedulers]
    return list(map(_Idle, optimizers)), list(map(_Idle, plain))


class _Idle:
    """An optimizer or a scheduler that makes no steps."""

    def __init__(self, original: Any) -> None:
        self._original = original

    def step(self, closure: Any = None, *args: Any, **kwargs: Any) -> Any:
        return closure() if callable(closure) else None

    def toggle_model(self, sync_grad: bool = True) -> Any:
        return nullcontext()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)
