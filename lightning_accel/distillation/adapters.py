"""Adapters: trained 1x1 layers that map student features to the teacher's channels, not exported."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.calls.example import isolated_random
from lightning_accel.core.resizing import kept_slice, resize_
from lightning_accel.errors import InvalidArgumentError

_CONVOLUTIONS = {4: nn.Conv2d, 5: nn.Conv3d}


def channels_of(feature: Tensor) -> int:
    """Channels of ``(N, C, H, W)`` and ``(N, C, D, H, W)``; width of ``(N, T, D)`` and ``(N, D)``."""
    return feature.shape[1 if feature.ndim in _CONVOLUTIONS else -1]


def make_adapter(student: Tensor, teacher: Tensor, dtype: torch.dtype = torch.float32) -> nn.Module:
    """A linear map from student channels to teacher channels, position by position.

    The global random generators go on as if nothing had been drawn, so that adapters change nothing else in a run.

    Args:
        student: a feature ``(N, C, H, W)``, ``(N, T, D)`` or ``(N, D)``; gives device and number of channels.
        teacher: a feature with as many dimensions.
        dtype: of the student's parameters; under autocast features have another.

    Returns:
        ``nn.Conv2d`` with 1x1 kernels or ``nn.Linear``.

    Raises:
        InvalidArgumentError: numbers of dimensions differ.
    """
    if student.ndim != teacher.ndim or student.ndim < 2:
        raise InvalidArgumentError(
            f"Features of student and teacher must have shapes that can be aligned, but got {tuple(student.shape)} and "
            f"{tuple(teacher.shape)}. Choose layers of the same kind with `student_layer` and `teacher_layer`."
        )
    channels = channels_of(student), channels_of(teacher)
    with isolated_random(), torch.inference_mode(False):
        convolution = _CONVOLUTIONS.get(student.ndim)
        adapter = nn.Linear(*channels) if convolution is None else convolution(*channels, 1)
    return adapter.to(student.device, dtype)


def takes(adapter: nn.Module) -> int:
    """Student channels that an adapter was made for."""
    return adapter.weight.shape[1]  # type: ignore[return-value, index]


def keep_channels_(
    adapter: nn.Module, channels: Sequence[int], optimizers: Iterable[torch.optim.Optimizer] = ()
) -> None:
    """Follow a student that lost channels: what the adapter and its optimizer have learned about the others stays.

    Args:
        adapter: made by :func:`make_adapter`; changed in place, its weight stays the same parameter.
        channels: indices of the channels that the student kept, in their order.
        optimizers: whose state for the weight is cut alike.

    Raises:
        InvalidArgumentError: an index that the adapter doesn't have.
    """
    weight: nn.Parameter = adapter.weight  # type: ignore[assignment]
    kept = list(channels)
    if not kept or min(kept) < 0 or max(kept) >= takes(adapter):
        raise InvalidArgumentError(f"Argument `channels` must lie in [0, {takes(adapter)}), but got {kept}.")
    cuts = [(1, takes(adapter), kept)]
    for optimizer in optimizers:
        state = optimizer.state.get(weight, {})
        for key, value in state.items():
            if isinstance(value, Tensor) and value.shape == weight.shape:
                state[key] = kept_slice(value, cuts)
    resize_(weight, kept_slice(weight.data, cuts))
    for name in ("in_channels", "in_features"):
        if hasattr(adapter, name):
            setattr(adapter, name, len(kept))


def kept_channels(layer: str, channels: int, resized: Mapping[str, Sequence[Sequence[Any]]]) -> list[int] | None:
    """Which output channels of a layer stayed when parameters were resized.

    Args:
        layer: path of the layer; its own parameters tell, or those of the last layer inside of it that has as many channels.
        channels: that it had.
        resized: by parameter name, ``[dimension, size before, kept indices]``; see :func:`lightning_accel.core.structure.resized`.

    Returns:
        Indices; ``None`` if there is no telling.

    Example:
        >>> kept_channels("body.0", 3, {"body.0.conv.weight": [[0, 3, [0, 2]]], "head.weight": [[1, 3, [0, 2]]]})
        [0, 2]
    """
    inside = [cuts for name, cuts in resized.items() if name.startswith(f"{layer}.")]
    found = [list(kept) for cuts in inside for dim, size, kept in cuts if dim == 0 and size == channels]
    return found[-1] if found else None


def replace_parameters_(
    optimizer: torch.optim.Optimizer, old: Iterable[nn.Parameter], new: Iterable[nn.Parameter]
) -> None:
    """Put parameters of adapters into the first group of an optimizer, in place of others that leave it.

    Schedulers keep one learning rate a group, so a group of their own would break those already built.
    """
    leaving = {id(parameter) for parameter in old}
    group = optimizer.param_groups[0]["params"]
    arriving = [p for p in new if all(p is not present for present in group)]
    group[:] = [p for p in group if id(p) not in leaving] + arriving
    for parameter in [p for p in optimizer.state if id(p) in leaving]:
        del optimizer.state[parameter]
