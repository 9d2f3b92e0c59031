"""PyTorch variants other than the one of ``load_runner``; imported in worker processes only."""

import shutil
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_unflatten

from lightning_accel.engines.pytorch import PyTorchRunner
from lightning_accel.errors import MissingPackageError, UnsupportedError

_AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


class TorchVariant(PyTorchRunner):
    """Run a program saved with ``torch.export.save`` in one of several modes; calls may overlap.

    Args:
        path: the ``.pt2`` file.
        mode: ``"eager"`` (with autograd, as a plain call does), ``"channels_last"``, ``"compile"``, ``"bf16"`` or ``"fp16"``
            (autocast), ``"torchao dynamic"`` or ``"torchao weights"``; all but the first in inference_mode.
        threads: threads inside an operator, of the whole process.

    Raises:
        MissingPackageError: torchao isn't installed.
        UnsupportedError: this network or machine doesn't support the mode.
    """

    def __init__(self, path: str | Path, *, mode: str, threads: int) -> None:
        super().__init__(path)
        torch.set_num_threads(threads)
        self._mode = mode
        self._images = mode == "channels_last"
        if self._images:
            if not any(len(spec.shape) == 4 for spec in self.inputs):
                raise UnsupportedError("channels_last needs an input with four dimensions, and the network has none")
            self._module.to(memory_format=torch.channels_last)
        elif mode == "compile":
            if not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++") or shutil.which("cl")):
                raise UnsupportedError("torch.compile needs a C++ compiler on the CPU, and none was found")
            self._module = torch.compile(self._module)
        elif mode.startswith("torchao"):
            self._module = _quantized(self._module, mode)

    def _execute(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        tensors = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in feeds.values()]
        if self._images:  # inputs arrive in contiguous order, so the conversion is part of the call
            tensors = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in tensors]
        args, kwargs = tree_unflatten(tensors, self._in_spec)
        with torch.inference_mode(self._mode != "eager"), self._autocast():
            leaves = tree_leaves(self._module(*args, **kwargs))
        return [_as_numpy(leaf.detach()) for leaf in leaves]

    def _autocast(self) -> Any:
        dtype = _AUTOCAST.get(self._mode)
        return torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None)


def _as_numpy(tensor: torch.Tensor) -> np.ndarray:
    return (tensor.float() if tensor.dtype in _AUTOCAST.values() else tensor).numpy().copy()


def _quantized(module: nn.Module, mode: str) -> nn.Module:
    try:
        torchao = import_module("torchao.quantization")
    except ModuleNotFoundError as error:
        raise MissingPackageError(
            "the package `torchao` is not installed: pip install torchao", name="torchao"
        ) from error
    if not with_linear_modules_(module):
        raise UnsupportedError("torchao quantizes linear layers, and this network has none")
    configs: dict[str, Callable[[], Any]] = {
        "torchao dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "torchao weights": torchao.Int8WeightOnlyConfig,
    }
    with torch.no_grad():
        torchao.quantize_(module, configs[mode]())
    return module


def with_linear_modules_(module: Any) -> int:
    """Replace each linear operator of a captured program by an ``nn.Linear``, which torchao quantizes.

    Args:
        module: a ``torch.fx.GraphModule``; changed in place without a numerical effect.

    Returns:
        Number of replaced operators.
    """
    count = 0
    for node in list(module.graph.nodes):
        if node.target is not torch.ops.aten.linear.default:
            continue
        taken = [one for one in node.args[1:] if one is not None]
        if any(one.op != "get_attr" for one in taken):  # the weight is an intermediate result, e.g. dequantized
            continue
        weight, *bias = (_attribute(module, one.target) for one in taken)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bool(bias))
        linear.weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias:
            linear.bias = nn.Parameter(bias[0].detach(), requires_grad=False)
        name = f"linear_module_{count}"
        module.add_module(name, linear)
        with module.graph.inserting_before(node):
            replacement = module.graph.call_module(name, (node.args[0],))
        node.replace_all_uses_with(replacement)
        module.graph.erase_node(node)
        count += 1
    module.recompile()
    return count


def _attribute(module: nn.Module, path: str) -> Any:
    for part in path.split("."):
        module = getattr(module, part)
    return module
