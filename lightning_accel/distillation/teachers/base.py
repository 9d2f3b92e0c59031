"""Base of the teachers: a frozen module in eval mode, with its own device and precision."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_accel.core.structure import read_plain
from lightning_accel.errors import InvalidArgumentError

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class Teacher(nn.Module):
    """A teacher with its own device, precision and memory format.

    Inputs are moved there and outputs back. Paths of layers are relative to ``network``.

    Args:
        network: the teacher; converted in place.
        device: device of the teacher, e.g. ``"cuda:1"``; ``None``: the student's.
        precision: ``"float32"``, ``"float16"`` or ``"bfloat16"``, of its weights and computation, regardless of the
            Trainer's; ``None``: as the student.
        channels_last: whether to use the memory format ``torch.channels_last``, which is faster on most GPUs and CPUs.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> teacher = Teacher(nn.Conv2d(3, 4, 1), precision="bfloat16", channels_last=True)
        >>> teacher(torch.zeros(1, 3, 8, 8)).dtype
        torch.float32
    """

    layers_in = "network"

    def __init__(
        self,
        network: nn.Module,
        device: str | None = None,
        precision: str | None = None,
        channels_last: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(network, nn.Module):
            raise InvalidArgumentError(f"Argument `network` must be an nn.Module, but got a {type(network).__name__}.")
        if precision is not None and precision not in _DTYPES:
            raise InvalidArgumentError(f"Argument `precision` must be one of {sorted(_DTYPES)}, but got {precision!r}.")
        try:
            self.home = None if device is None else torch.device(device)
            torch.empty(0, device=self.home)
        except (RuntimeError, AssertionError) as error:  # unknown device, or not supported by this build of torch
            reason = str(error).splitlines()[0]
            raise InvalidArgumentError(
                f"Argument `device` must be a torch device of this machine, but got {device!r}: {reason}."
            ) from None
        self.network = network
        self.precision, self.channels_last = precision, channels_last
        self._place()

    def _place(self) -> None:
        dtype = None if self.precision is None else _DTYPES[self.precision]
        self.network.to(device=self.home, dtype=dtype)
        if self.channels_last:
            self.network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Teacher":
        """Apply a conversion of the student, except for the teacher's own settings."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch has no annotation for it
        self._place()
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Output of the network; floats in float32 if it has its own precision."""
        tensor = next((leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)), None)
        args, kwargs = pytree.tree_map(self._into, (args, kwargs))
        if self.precision is None:
            output = self.network(*args, **kwargs)
        else:
            with torch.autocast(self.home.type if self.home else _device_type(tensor), enabled=False):
                output = self.network(*args, **kwargs)
        back = None if tensor is None else tensor.device
        return pytree.tree_map(lambda value: self._out_of(value, back), output)

    def _into(self, value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        floats = self.precision is not None and value.is_floating_point()
        value = value.to(device=self.home, dtype=_DTYPES[str(self.precision)] if floats else None)
        images = self.channels_last and value.ndim == 4
        return value.contiguous(memory_format=torch.channels_last) if images else value

    def _out_of(self, value: Any, device: torch.device | None) -> Any:
        if not isinstance(value, Tensor):
            return value
        floats = self.precision is not None and value.is_floating_point()
        return value.to(device=device if self.home else None, dtype=torch.float32 if floats else None)


def _device_type(tensor: Tensor | None) -> str:
    return "cpu" if tensor is None else tensor.device.type


def network_of(teacher: nn.Module) -> nn.Module:
    """Root of a teacher's layer paths: the network inside of a wrapper of this library."""
    inside = getattr(type(teacher), "layers_in", None)
    network = getattr(teacher, inside) if isinstance(inside, str) else None
    return network_of(network) if isinstance(network, nn.Module) else teacher


def freeze_(teacher: nn.Module, student: nn.Module) -> nn.Module:
    """Set a teacher to eval mode and disable its gradients.

    Raises:
        InvalidArgumentError: it shares a parameter with the student, which would be frozen with it.
    """
    own = {id(parameter): name for name, parameter in student.named_parameters()}
    for name, parameter in teacher.named_parameters():
        if id(parameter) in own:
            raise InvalidArgumentError(
                f"Argument `teacher` must not share parameters with the student, but got {name!r}, which is the student's "
                f"{own[id(parameter)]!r}. Pass `copy.deepcopy(teacher)`."
            )
    return teacher.eval().requires_grad_(False)


def load_weights_(teacher: nn.Module, path: str | Path) -> None:
    """Load a Lightning checkpoint or a state-dict file into a teacher, strictly and without unpickling.

    Raises:
        MissingFileError: there is no such file.
        InvalidArgumentError: the file is damaged, or its weights don't match.
    """
    checkpoint = read_plain(path, "teacher_checkpoint")
    state = checkpoint.get("state_dict", checkpoint) if isinstance(checkpoint, dict) else {}
    expected = {key: value.shape for key, value in teacher.state_dict().items() if isinstance(value, Tensor)}
    wrong = [
        *(f"{key!r} is missing" for key in expected if key not in state),
        *(f"{key!r} is unknown" for key in state if key not in expected),
        *(
            f"{key!r} is {tuple(state[key].shape)}, not {tuple(shape)}"
            for key, shape in expected.items()
            if isinstance(state.get(key), Tensor) and state[key].shape != shape
        ),
    ]
    if wrong:
        more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        raise InvalidArgumentError(
            f"Argument `teacher_checkpoint` must hold exactly the weights of `teacher` ({type(teacher).__name__}), but got "
            f"{str(path)!r}, in which {', '.join(wrong[:3])}{more}. Build the teacher from the class that wrote the file."
        )
    teacher.load_state_dict(state)
