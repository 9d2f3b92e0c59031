"""Find what isn't a number: a parameter, an input, an output."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_accel.core.shards import local
from lightning_accel.errors import InvalidArgumentError


def nan_weight(module: nn.Module) -> str:
    """The first parameter, or statistic of a normalization layer, that has NaN, in words; empty if none has.

    In other buffers NaN may stand for a value that isn't known yet, such as a threshold that validation will find.

    Args:
        module: any module; layers that aren't initialized yet don't count.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> layer.weight.data[0, 1] = float("nan")
        >>> nan_weight(layer)
        'parameter `weight` has NaN in 1 of 2 values'
    """
    statistics = [
        (f"{path}.{name}" if path else name, buffer)
        for path, part in module.named_modules()
        for name, buffer in (part.named_buffers(recurse=False) if isinstance(part, _NormBase) else ())
    ]
    parts = (("parameter", module.named_parameters()), ("buffer", statistics))
    tensors = [(kind, name, t) for kind, named in parts for name, t in named if not is_lazy(t) and not t.is_meta]
    return _first((f"{kind} `{name}`", local(tensor)) for kind, name, tensor in tensors)


def nan_input(batch: Any) -> str:
    """The first tensor of a batch, or of the arguments of a call, that has NaN, in words; empty if none has."""
    leaves, _ = pytree.tree_flatten_with_path(batch)
    named = [("the batch" if not path else f"`batch{pytree.keystr(path)}`", leaf) for path, leaf in leaves]
    return _first((name, leaf) for name, leaf in named if isinstance(leaf, torch.Tensor))


def nan_array(what: str, array: np.ndarray) -> str:
    """Where samples ``(S, ...)`` have NaN, in words; empty if they don't."""
    if array.dtype.kind not in "fc" or not (bad := np.isnan(array)).any():
        return ""
    first = int(np.flatnonzero(bad.reshape(len(array), -1).any(1))[0])
    return f"{what} has NaN in {int(bad.sum()):,} of {bad.size:,} values, the first in sample {first}"


def check_weights(module: nn.Module, argument: str, then: str = "") -> None:
    """Raise if a parameter, or a statistic of a normalization layer, has NaN.

    Args:
        module: any module.
        argument: whose value the module is, for the message.
        then: what to do about it.

    Raises:
        InvalidArgumentError: one has; the message names it.
    """
    if found := nan_weight(module):
        raise InvalidArgumentError(
            f"Argument `{argument}` must have numbers as weights, but got a module whose {found}.{then}"
        )


def _first(named: Iterable[tuple[str, torch.Tensor]]) -> str:
    """The first tensor with NaN, in words."""
    floats = [(name, t.detach()) for name, t in named if t.is_floating_point() or t.is_complex()]
    for name, tensor in floats:
        if tensor.numel() and bool((count := tensor.isnan().sum()) > 0):
            return f"{name} has NaN in {int(count):,} of {tensor.numel():,} values"
    return ""
