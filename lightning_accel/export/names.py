"""Names of a file's inputs and outputs, from the places of tensors in a call and in its result."""

import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.call_shapes import ResultShape
from lightning_accel.inputs import Call, own_signature


def input_names(module: nn.Module, call: Call, given: Sequence[str] | None) -> list[str]:
    """One name for each tensor of a call in canonical form: its parameter of ``forward``, or its key in a dict.

    Raises:
        ValueError: ``given`` names another number of inputs.
    """
    bound = own_signature(module).bind(*call[0], **call[1])
    leaves = pytree.tree_flatten_with_path(dict(bound.arguments))[0]
    names = short_names([path for path, leaf in leaves if isinstance(leaf, torch.Tensor)], "input")
    return _checked("input_names", names, given)


def output_names(result: ResultShape, given: Sequence[str] | None) -> list[str]:
    """One name for each tensor of a result: its key in a dict, or ``"output"``.

    Raises:
        ValueError: ``given`` names another number of outputs.
    """
    return _checked("output_names", short_names(result.paths(), "output"), given)


def _checked(argument: str, names: list[str], given: Sequence[str] | None) -> list[str]:
    if given is None:
        return names
    if isinstance(given, str) or len(given) != len(names) or len(set(given)) != len(names) or not all(given):
        raise ValueError(
            f"Argument `{argument}` must hold {len(names)} different names (by default {names}), but got {given!r}."
        )
    return list(given)


def short_names(paths: list[Any], default: str) -> list[str]:
    """Short names from paths in a nested structure: the last key, with its predecessors where that says too little."""
    keys = [[str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path] for path in paths]

    def text(parts: list[str], keep: int) -> str:
        joined = re.sub(r"\W+", "_", "_".join(parts[-keep:]))
        return f"{default}_{joined}" if joined.isdigit() else joined or default

    depth = [next((n for n in range(1, len(parts) + 1) if not parts[-n].isdigit()), len(parts) or 1) for parts in keys]
    while True:
        names = [text(parts, keep) for parts, keep in zip(keys, depth, strict=True)]
        twice = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(keys[i])]
        if not twice:
            return names if len(set(names)) == len(names) else [f"{default}_{i}" for i in range(len(paths))]
        for i in twice:
            depth[i] += 1
