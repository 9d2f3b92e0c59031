"""Checkpoint state of a distillation: adapters and an averaged teacher."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from lightning_accel.core.structure import CHECKPOINT_KEY
from lightning_accel.distillation.runtime import Distillation

_ENTRY = "distillation"


def save_state(distillation: Distillation, checkpoint: dict[str, Any], *, gradients: bool) -> None:
    """Write adapters and an averaged teacher into a checkpoint, beside the student's ``state_dict``.

    Args:
        distillation: distillation of the module that is saved.
        checkpoint: changed in place if there is state to save.
        gradients: whether gradients are being accumulated over batches and belong to the state.
    """
    state: dict[str, Any] = {}
    if distillation.adapters:
        state["adapters"] = {key: adapter.state_dict() for key, adapter in distillation.adapters.items()}
    if distillation.adapters and gradients:
        state["gradients"] = {
            key: [p.grad for p in adapter.parameters()] for key, adapter in distillation.adapters.items()
        }
    ema = distillation.ema
    if ema is not None and ema.network is not None:
        state["ema"] = ema.network.state_dict()
    if state:
        checkpoint.setdefault(CHECKPOINT_KEY, {})[_ENTRY] = state


def load_state(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of :func:`save_state` in a checkpoint; empty if there is none."""
    return dict(checkpoint.get(CHECKPOINT_KEY, {}).get(_ENTRY, {}))


def average_gradients_(adapters: Mapping[str, nn.Module], ranks: int) -> None:
    """Average gradients over ranks. DDP handles registered parameters of the student only."""
    if ranks == 1:
        return
    for parameter in (p for adapter in adapters.values() for p in adapter.parameters()):
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        torch.distributed.all_reduce(parameter.grad)
        parameter.grad /= ranks
