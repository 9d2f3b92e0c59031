"""Teacher from an ONNX file, run by an engine."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.core.arguments import checked
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.errors import InvalidArgumentTypeError


class OnnxTeacher(nn.Module):
    """A teacher from an ONNX file, a TensorRT engine or a bundle, run by :func:`load_runner`.

    Args:
        path: file or bundle, or an open :class:`Runner`.
        engine: as for :func:`load_runner`.

    Raises:
        MissingFileError: nothing at ``path``.
        InvalidArgumentError: no engine reads the file.

    Example:
        >>> teacher = OnnxTeacher("teacher.onnx")  # doctest: +SKIP
    """

    @checked()
    def __init__(self, path: str | Path | Runner, engine: str | None = None) -> None:
        super().__init__()
        self.runner = path if isinstance(path, Runner) else load_runner(path, engine)

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Any:
        """Output of a network with one output, otherwise a dict of outputs by name. Floats are cast to the dtypes of the file."""
        feeds = dict(zip(self.runner.input_names, args, strict=False)) | kwargs
        device = next(iter(feeds.values())).device
        dtypes = {spec.name: spec.dtype for spec in self.runner.inputs}
        arrays = {}
        for name, tensor in feeds.items():
            array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()
            arrays[name] = array.astype(dtypes.get(name, array.dtype)) if tensor.is_floating_point() else array
        outputs = {name: torch.from_numpy(array).to(device) for name, array in self.runner.run(arrays).items()}
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def __getstate__(self) -> dict[str, Any]:
        raise InvalidArgumentTypeError("A teacher that runs in an engine can't be pickled. Build it in each process.")

    def __deepcopy__(self, memo: dict[int, Any]) -> "OnnxTeacher":
        return self  # an engine has no mutable weights
