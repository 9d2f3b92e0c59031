"""Whether a teacher fits on the device of each rank, and how to shard one that doesn't."""

import torch
from torch import nn

from lightning_accel.core.shards import is_sharded
from lightning_accel.errors import InvalidArgumentError

_SHARD = (
    "Shard it: train with ModelParallelStrategy, and call `fully_shard` with the layers of `self.teacher` and with `self.teacher` in the "
    "student's `configure_model`"
)


def bytes_to_move(teacher: nn.Module, device: torch.device) -> int:
    """Bytes of a teacher that are not on a device yet; what is sharded doesn't count, since it is gathered layer by layer."""
    tensors = [*teacher.parameters(), *teacher.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors if t.device != device and not is_sharded(t))


def check_fits(needed: int, free: int, device: str, ranks: int) -> None:
    """Raise if a teacher doesn't fit on the device of each rank.

    Args:
        needed: bytes of its weights.
        free: bytes that are free on the device.
        device: its name, for the message.
        ranks: of the run.

    Raises:
        InvalidArgumentError: it doesn't.

    Example:
        >>> check_fits(10, free=20, device="cuda:0", ranks=2)
    """
    if needed > free:
        raise InvalidArgumentError(
            f"Argument `teacher` must fit beside the student on each of {ranks} ranks, but got one of {needed / 1e9:.1f} GB, and {device} "
            f"has {free / 1e9:.1f} GB free. {_SHARD}."
        )


def check_teacher_fits(teacher: nn.Module, device: torch.device, ranks: int) -> None:
    """:func:`check_fits` for the device of this rank; on a CPU the teacher lies in memory already.

    Raises:
        InvalidArgumentError: the device has too little memory for it.
    """
    if device.type == "cuda" and (needed := bytes_to_move(teacher, device)):
        check_fits(needed, torch.cuda.mem_get_info(device)[0], str(device), ranks)
