"""Names of inputs and outputs, from the positions of tensors in a call and its result, and of dynamic axes."""

import re
from collections.abc import Mapping, Sequence
from inspect import Signature
from typing import Any

import torch
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call
from lightning_accel.calls.shapes import ResultShape
from lightning_accel.errors import InvalidArgumentError

Axes = Mapping[str, Mapping[int, str]]  # of inputs: {name: {axis: symbol}}


def input_names(signature: Signature, call: Call, given: Sequence[str] | None) -> list[str]:
    """One name for each tensor of a call in canonical form: its parameter of ``forward``, or its key in a dict.

    Raises:
        InvalidArgumentError: ``given`` names another number of inputs.
    """
    bound = signature.bind(*call[0], **call[1])
    leaves = pytree.tree_flatten_with_path(dict(bound.arguments))[0]
    names = short_names([path for path, leaf in leaves if isinstance(leaf, torch.Tensor)], "input")
    return _checked("input_names", names, given)


def checked_batch(
    batch: str, batch_axis: Mapping[str, int | None] | None, names_in: Sequence[str], call: Call
) -> list[int | None]:
    """Axis of each tensor of a call that is the batch; ``None`` for tensors without one.

    Args:
        batch: ``"dynamic"`` or ``"fixed"``: no axis is.
        batch_axis: axes by input, ``None`` for an input without a batch. The others have it first, if their first dimension is
            as large as that of the first input with a batch.
        names_in: names of the call's tensors.
        call: an example.

    Raises:
        InvalidArgumentError: an unknown input or axis, batches of different sizes, or axes of a fixed batch.
    """
    if batch not in ("dynamic", "fixed"):
        raise InvalidArgumentError(f'Argument `batch` must be "dynamic" or "fixed", but got {batch!r}.')
    given = dict(batch_axis or {})
    if batch == "fixed":
        if given:
            raise InvalidArgumentError(f'Argument `batch_axis` must be left out with batch="fixed", but got {given}.')
        return [None] * len(names_in)
    shapes = _shapes(names_in, call)
    for name, axis in given.items():
        if name not in shapes:
            raise InvalidArgumentError(
                f"Argument `batch_axis` must name inputs, of {list(names_in)}, but got {name!r}."
            )
        if axis is not None and axis not in range(len(shapes[name])):
            raise InvalidArgumentError(
                f"Argument `batch_axis` must give None or an axis from 0 to {len(shapes[name]) - 1} of input `{name}` of shape "
                f"{shapes[name]}, but got {axis!r}."
            )
    found = {name: given.get(name, 0 if shapes[name] else None) for name in names_in}
    size = next((shapes[name][axis] for name, axis in found.items() if axis is not None), None)
    for name, axis in found.items():
        if axis is not None and shapes[name][axis] != size:
            if name in given:
                raise InvalidArgumentError(
                    f"Argument `batch_axis` must name axes of one size, {size} as of the first input, but axis {axis} of input `{name}` "
                    f"has shape {shapes[name]}."
                )
            found[name] = None
    return list(found.values())


def _shapes(names_in: Sequence[str], call: Call) -> dict[str, tuple[int, ...]]:
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return {name: tuple(tensor.shape) for name, tensor in zip(names_in, tensors, strict=True)}


def checked_axes(
    dynamic: Axes, names_in: Sequence[str], call: Call, batch: Sequence[int | None] | None = None
) -> dict[str, dict[int, str]]:
    """Axes beyond the batch that may change, counted from the front.

    Args:
        dynamic: ``{input: {axis: symbol}}``; axes of one symbol have one size.
        names_in: names of the call's tensors.
        call: an example.
        batch: axis of each tensor that is the batch; by default the first one.

    Raises:
        InvalidArgumentError: an unknown input, an axis that isn't there or is the batch, or a name that isn't one.
    """
    shapes = _shapes(names_in, call)
    batches = dict(zip(names_in, batch if batch is not None else [0] * len(names_in), strict=True))
    axes: dict[str, dict[int, str]] = {}
    for name, of_input in dynamic.items():
        if name not in shapes:
            raise InvalidArgumentError(f"Argument `dynamic` must name inputs, of {list(names_in)}, but got {name!r}.")
        for axis, symbol in of_input.items():
            counted = axis + len(shapes[name]) if axis < 0 else axis
            able = [i for i in range(len(shapes[name])) if i != batches[name]]
            if counted not in able:
                raise InvalidArgumentError(
                    f"Argument `dynamic` must give axes of {able} of input `{name}` of shape {shapes[name]} (the batch is dynamic "
                    f"anyway), but got {axis}."
                )
            if not isinstance(symbol, str) or not symbol.isidentifier() or symbol == "batch":
                raise InvalidArgumentError(
                    f'Argument `dynamic` must name axis {axis} of input `{name}` by an identifier other than "batch", but got {symbol!r}.'
                )
            if shapes[name][counted] < 2:
                raise InvalidArgumentError(
                    f"Argument `inputs` must give input `{name}` at least 2 along its dynamic axis {axis}, but got shape {shapes[name]}."
                )
            axes.setdefault(name, {})[counted] = symbol
    return axes


def output_names(result: ResultShape, given: Sequence[str] | None) -> list[str]:
    """One name for each tensor of a result: its key in a dict, or ``"output"``.

    Raises:
        InvalidArgumentError: ``given`` names another number of outputs.
    """
    return _checked("output_names", short_names(result.paths(), "output"), given)


def chosen_outputs(names: Sequence[str], outputs: Sequence[str] | Mapping[str, str] | None) -> dict[int, str]:
    """Position of each output that is kept, in the order of the result, and its name.

    Args:
        names: default names of all outputs.
        outputs: names to keep, or ``{name: name in the file}``; ``None`` for all.

    Raises:
        InvalidArgumentError: a name that isn't an output, none at all, or one name twice.
    """
    if outputs is None:
        return dict(enumerate(names))
    wanted = dict(outputs) if isinstance(outputs, Mapping) else {name: name for name in outputs}
    whole = not isinstance(outputs, str) and all(isinstance(new, str) and new for new in wanted.values())
    if not wanted or not whole or wanted.keys() - set(names) or len(set(wanted.values())) != len(list(outputs)):
        raise InvalidArgumentError(
            f"Argument `outputs` must hold names of outputs, each once, of {list(names)}, or map them to names in the file, but got "
            f"{outputs!r}."
        )
    return {place: wanted[name] for place, name in enumerate(names) if name in wanted}


def _checked(argument: str, names: list[str], given: Sequence[str] | None) -> list[str]:
    if given is None:
        return names
    if isinstance(given, str) or len(given) != len(names) or len(set(given)) != len(names) or not all(given):
        raise InvalidArgumentError(
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
