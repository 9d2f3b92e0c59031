"""Rewind weights to an earlier state after pruning (https://arxiv.org/abs/1903.01611)."""

import torch
from torch import nn

from lightning_accel.errors import InvalidArgumentError


def snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copy all parameters and buffers of a module to the CPU, by name; tied ones once."""
    named = [*module.named_parameters(), *module.named_buffers()]
    return {name: tensor.detach().to("cpu", copy=True) for name, tensor in named}


def rewind_(module: nn.Module, state: dict[str, torch.Tensor], *optimizers: torch.optim.Optimizer) -> None:
    """Restore a snapshot in place, and clear the optimizers' state (momentum, moments).

    Args:
        module: parameters and buffers keep their objects.
        state: from :func:`snapshot` of the same module.
        optimizers: their learning rates and schedules are not changed.

    Raises:
        InvalidArgumentError: the snapshot has other names or shapes.
    """
    named = dict([*module.named_parameters(), *module.named_buffers()])
    if {n: t.shape for n, t in named.items()} != {n: t.shape for n, t in state.items()}:
        differ = sorted(named.keys() ^ state.keys()) or [n for n in named if named[n].shape != state[n].shape]
        raise InvalidArgumentError(
            f"Argument `state` must be a snapshot of this module, but got other names or shapes: {differ[:4]}."
        )
    with torch.no_grad():
        for name, tensor in named.items():
            tensor.copy_(state[name])
    for optimizer in optimizers:
        optimizer.state.clear()
