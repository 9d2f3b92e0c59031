"""The trained module as a function of named arrays, so that it can be compared with files and engines."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from lightning_accel.calls.contexts import as_in_training
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.compare import Network


class ModuleNetwork:
    """A module in eval mode as a function of named arrays, with the input and output names of its ONNX file.

    Args:
        module: the module; its mode is set to eval.
        export: the file it was exported to.
    """

    def __init__(self, module: nn.Module, export: OnnxExport) -> None:
        self.module, self.export = module.eval(), export

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the module; returns its outputs by name."""
        return self._run(feeds, torch.contiguous_format)

    def orders(self) -> dict[str, Network]:
        """The same function with another order of summation, by the change."""
        images = any(array.ndim == 4 for array in self.export.example.feeds().values())
        return {
            "without oneDNN": self._without_onednn,
            **({"channels last": partial(self._run, memory_format=torch.channels_last)} if images else {}),
        }

    def _without_onednn(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        backend: Any = torch.backends.mkldnn  # its `flags` would also set TF32, with a warning on CPUs
        before, backend.enabled = backend.enabled, False
        try:
            return self(feeds)
        finally:
            backend.enabled = before

    def _run(self, feeds: Mapping[str, np.ndarray], memory_format: torch.memory_format) -> dict[str, np.ndarray]:
        device = next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))
        tensors = {}
        for name in self.export.input_names:
            tensor = torch.from_numpy(np.ascontiguousarray(feeds[name])).to(device)
            tensors[name] = tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor
        args, kwargs = self.export.example.filled(tensors)
        with torch.no_grad(), as_in_training():
            result = self.module(*args, **kwargs)
        outputs = self.export.result.pick(result)
        return {name: tensor.cpu().numpy() for name, tensor in zip(self.export.output_names, outputs, strict=True)}
