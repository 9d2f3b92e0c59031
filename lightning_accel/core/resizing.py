"""Keep optimizer state and the DDP wrapper consistent after parameters are resized."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from lightning_accel.core.packages import both
from lightning_accel.errors import InvalidArgumentError, RunError


def kept_slice(tensor: torch.Tensor, cuts: Iterable[Sequence[Any]]) -> torch.Tensor:
    """Slice the kept part of a tensor; the memory format (channels last) is preserved.

    Args:
        tensor: any shape.
        cuts: ``(dimension, size before, kept indices)`` of each dimension that shrinks.

    Raises:
        InvalidArgumentError: a dimension doesn't have the size that it should shrink from.

    Example:
        >>> kept_slice(torch.arange(6).reshape(2, 3), [(1, 3, [0, 2])])
        tensor([[0, 2],
                [3, 5]])
    """
    result = tensor
    for dim, size, kept in cuts:
        if result.shape[dim] != size:
            raise InvalidArgumentError(
                f"A tensor to shrink from {size} entries in dimension {dim} must have them, but got the shape {tuple(result.shape)}."
            )
        result = result.index_select(dim, torch.tensor(kept, dtype=torch.long, device=result.device))
    last = torch.channels_last
    if tensor.ndim == 4 and tensor.is_contiguous(memory_format=last) and not tensor.is_contiguous():
        result = result.contiguous(memory_format=last)
    return result


def resize_(parameter: nn.Parameter, data: torch.Tensor) -> None:
    """Replace the data of a parameter by data of another shape; optimizers, hooks and tied layers keep referring to the same object."""
    parameter.grad = None
    # A gradient accumulator that somebody holds keeps the old shape; a change of dtype makes autograd forget it.
    other = torch.float32 if parameter.dtype == torch.float64 else torch.float64
    parameter.data = torch.empty(0, dtype=other, device=parameter.device)
    parameter.data = data


def optimizer_state_follows(
    optimizers: Iterable[torch.optim.Optimizer], module: nn.Module, cuts: Mapping[str, Sequence[Sequence[Any]]]
) -> Callable[[], None]:
    """Slice the optimizer state (momentum, moments, factored moments) of parameters that are about to shrink.

    Args:
        optimizers: after zero or more steps.
        module: whose parameters they update; not resized yet.
        cuts: by parameter name, as for :func:`kept_slice`.

    Returns:
        A function to call once the parameters have their new shapes; nothing changes before.

    Raises:
        RunError: a tensor of an optimizer's state doesn't have the parameter's shape.
    """
    names = {id(p): name for name, p in module.named_parameters()}
    sliced: list[tuple[dict[str, Any], str, torch.Tensor]] = []
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            name = names.get(id(parameter), "")
            for key, value in state.items():
                if name in cuts and isinstance(value, torch.Tensor) and value.numel() > 1:
                    fits = [_cut(value, parameter, cut) for cut in cuts[name]]
                    if value.ndim != parameter.ndim or None in fits:
                        raise RunError(
                            f"Optimizer state must have its parameter's shape for channels to be removed, but got `{key}` of "
                            f"{type(optimizer).__name__} with shape {tuple(value.shape)} for `{name}` with shape "
                            f"{tuple(parameter.shape)}. Use another optimizer (SGD, Adam, AdamW, ...)."
                        )
                    sliced.append((state, key, kept_slice(value, [cut for cut in fits if cut])))

    def follow() -> None:
        for state, key, value in sliced:
            state[key] = value

    return follow


def _cut(value: torch.Tensor, parameter: torch.Tensor, cut: Sequence[Any]) -> Sequence[Any] | None:
    """The cut as it applies to a tensor of state; empty where that has one entry for the whole dimension."""
    if value.ndim != parameter.ndim or value.shape[cut[0]] not in (1, parameter.shape[cut[0]]):
        return None
    return cut if value.shape[cut[0]] == parameter.shape[cut[0]] else ()


def rewrap(trainer: L.Trainer) -> None:
    """Rebuild the DDP wrapper, whose buckets and hooks are those of the old shapes. Collective."""
    strategy = trainer.strategy
    if isinstance(strategy, both(DDPStrategy)) and isinstance(strategy.model, DistributedDataParallel):
        strategy.model._remove_autograd_hooks()
        strategy.model = trainer.lightning_module
        strategy.configure_ddp()
