"""The trained module as a function of named arrays, so that it can be compared with files and engines."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.compare import Network


class ModuleNetwork:
    """A module in eval mode as a function of named arrays, with the names of its ONNX file.

    Args:
        module: the module; its mode is set to eval.
        export: what it was exported to.
        description_call: a call in canonical form; its constants are used, its tensors replaced.
    """

    def __init__(self, module: nn.Module, export: OnnxExport, description_call: Any) -> None:
        self.module, self.export = module.eval(), export
        self._leaves, self._spec = pytree.tree_flatten(description_call)
        self._slots = [i for i, leaf in enumerate(self._leaves) if isinstance(leaf, torch.Tensor)]

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; tensors that aren't inputs of the file are those of the example."""
        return self._run(feeds, torch.contiguous_format)

    def orders(self) -> dict[str, Network]:
        """The same function, its sums computed in another order, by what was changed."""
        images = any(self._leaves[slot].ndim == 4 for slot in self._slots)
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
        filled = list(self._leaves)
        device = next((tensor.device for tensor in self.module.parameters()), torch.device("cpu"))
        for slot, name in zip(self._slots, self.export.input_names, strict=True):
            tensor = torch.from_numpy(np.ascontiguousarray(feeds[name])).to(device)
            filled[slot] = tensor.to(memory_format=memory_format) if tensor.ndim == 4 else tensor
        args, kwargs = pytree.tree_unflatten(filled, self._spec)
        with torch.no_grad():
            result = self.module(*args, **kwargs)
        outputs = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        return {name: tensor.cpu().numpy() for name, tensor in zip(self.export.output_names, outputs, strict=True)}
