"""Where student and teacher features differ in channels: a trained 1x1 layer between them, which never ships."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lightning_accel.inputs import isolated_random

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
        ValueError: numbers of dimensions differ.
    """
    if student.ndim != teacher.ndim or student.ndim < 2:
        raise ValueError(
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


def keep_channels_(adapter: nn.Module, channels: Iterable[int]) -> None:
    """Follow a student that lost channels: what the adapter has learned about the remaining ones stays.

    Args:
        adapter: made by :func:`make_adapter`; changed in place. Its weight becomes a new parameter.
        channels: indices of the channels that the student kept, in their order.

    Raises:
        ValueError: an index that the adapter doesn't have.
    """
    index = torch.as_tensor(list(channels), dtype=torch.long)
    if len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= takes(adapter):
        raise ValueError(f"Argument `channels` must lie in [0, {takes(adapter)}), but got {index.tolist()}.")
    weight: Tensor = adapter.weight  # type: ignore[assignment]
    adapter.weight = nn.Parameter(weight.detach()[:, index.to(weight.device)].clone())
    for name in ("in_channels", "in_features"):
        if hasattr(adapter, name):
            setattr(adapter, name, len(index))


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
