"""Describe the inputs of a call by shapes and types, and rebuild an equivalent call from the description."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence
from torch.utils import _pytree as pytree

from lightning_accel.calls.containers import built, is_record, items_of, name_of, register, without_caches
from lightning_accel.errors import InvalidArgumentError

_TENSOR = "tensor"
_HERE = object()  # a tensor's place
_CONSTANTS = (type(None), bool, int, float, str)


def plain_call(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with plain dicts, lists and tuples in place of their subclasses (OrderedDict, BatchEncoding, namedtuples).

    A dataclass becomes the dict of its fields.
    """

    def plain(value: Any) -> Any:
        if isinstance(value, PackedSequence):
            raise InvalidArgumentError(
                "Argument `inputs` must hold tensors with a batch dimension, but got a PackedSequence, whose shape depends on the "
                "lengths of its sequences. Pass the padded batch and the lengths, and let `forward` pack them or use a mask."
            )
        if is_record(value):
            value = items_of(value)
        if isinstance(value, Mapping):
            return {key: plain(item) for key, item in value.items()}
        if isinstance(value, tuple):
            return tuple([plain(item) for item in value])
        return [plain(item) for item in value] if isinstance(value, list) else value

    return plain(args), plain(kwargs)


def describe_inputs(
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
    axes: Sequence[Mapping[int, str]] | None = None,
    batch: Sequence[int | None] | None = None,
) -> dict[str, Any]:
    """Shapes and types of a call's inputs as plain values that fit into a checkpoint.

    Plain values are constants.

    Args:
        args: positional arguments.
        kwargs: keyword arguments.
        axes: further dynamic axes of each tensor, in order: ``{axis: symbol}``; axes of one symbol have one size.
        batch: axis of each tensor, in order, that is the batch; ``None``: none. By default it is the first one of tensors whose
            first dimension equals that of the first tensor.

    Raises:
        InvalidArgumentError: there is no tensor among the inputs, or something that is neither a tensor nor a plain value.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(plain_call(args, kwargs)) if isinstance(leaf, torch.Tensor)]
    if not tensors or (batch is None and tensors[0].ndim == 0):
        raise InvalidArgumentError("Argument `inputs` must hold a tensor with a batch dimension, but got none.")
    if batch is None:
        batch = [0 if t.ndim > 0 and t.shape[0] == tensors[0].shape[0] else None for t in tensors]
    further, own = iter(axes if axes is not None else [{}] * len(tensors)), iter(batch)

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            axis = next(own)
            entry = {
                _TENSOR: list(value.shape),
                "dtype": str(value.dtype).removeprefix("torch."),
                "batch": axis is not None,
                **({"batch_axis": axis} if axis else {}),
            }
            free = [[axis, symbol] for axis, symbol in next(further).items()]
            return {**entry, "axes": free} if free else entry
        named = {"class": name} if (name := name_of(value)) else {}
        if isinstance(value, Mapping) or is_record(value):
            items = items_of(value) if is_record(value) else value
            return {"mapping": [[key, plain(item)] for key, item in items.items()], **named}
        if isinstance(value, list | tuple):
            return {"sequence": [plain(item) for item in value], "tuple": isinstance(value, tuple), **named}
        if not isinstance(value, _CONSTANTS):
            raise InvalidArgumentError(
                "Argument `inputs` must hold tensors, plain values (None, bool, int, float, str) and dicts, lists or tuples of "
                f"them, but got a {type(value).__name__}. Pass `inputs=` a function of the batch that makes it a tensor or leaves it out."
            )
        return {"value": value}

    return {"args": [plain(value) for value in args], "kwargs": {key: plain(value) for key, value in kwargs.items()}}


def dynamic_axes(description: Mapping[str, Any]) -> list[dict[int, str]]:
    """Further dynamic axes of each tensor, as :func:`describe_inputs` got them."""
    return [dict(entry.get("axes", [])) for entry in tensor_entries(description)]


def batch_axes(description: Mapping[str, Any]) -> list[int | None]:
    """Axis of each tensor that is the batch, as :func:`describe_inputs` got them; ``None`` for tensors without one."""
    return [entry.get("batch_axis", 0) if entry["batch"] else None for entry in tensor_entries(description)]


def batch_elsewhere(description: Mapping[str, Any]) -> str:
    """Sentence on inputs that are as long as the batch along another axis than the first one, unnamed; empty if there are none."""
    entries = list(tensor_entries(description))
    sizes = [entry[_TENSOR][entry.get("batch_axis", 0)] for entry in entries if entry["batch"]]
    found = [
        (e[_TENSOR], e[_TENSOR].index(sizes[0])) for e in entries if not e["batch"] and sizes and sizes[0] in e[_TENSOR]
    ]
    if not found:
        return ""
    shape, axis = found[0]
    return (
        f" An input of shape {tuple(shape)} is taken for one that is the same in each call, but its axis {axis} is as long as the batch: "
        f"if it is the batch, name it, batch_axis={{name: {axis}}}."
    )


def traced_batch(description: Mapping[str, Any]) -> int:
    """Batch size to capture with: not 0 or 1, which torch.export specializes, and no size in the example."""
    fixed = {size for entry in tensor_entries(description) for size in entry[_TENSOR]}
    return next(n for n in range(3, 10**6) if n not in fixed)


def tensor_entries(entry: Any) -> Iterator[Mapping[str, Any]]:
    """Entry of each tensor in a description, in order."""
    if isinstance(entry, Mapping) and _TENSOR in entry:
        yield entry
    elif isinstance(entry, Mapping | list | tuple):
        for item in entry.values() if isinstance(entry, Mapping) else entry:
            yield from tensor_entries(item)


def example_inputs(
    description: Mapping[str, Any], device: torch.device, *, plain: bool = False
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the described shapes and types, all zeros, with a batch of :func:`traced_batch`.

    Args:
        description: from :func:`describe_inputs`.
        device: of the tensors.
        plain: whether dataclasses and namedtuples are the dicts and tuples of :func:`plain_call`.
    """
    batch = traced_batch(description)

    def build(entry: Mapping[str, Any]) -> Any:
        if _TENSOR in entry:
            shape = list(entry[_TENSOR])
            if entry["batch"]:
                shape[entry.get("batch_axis", 0)] = batch
            return torch.zeros(shape, dtype=getattr(torch, entry["dtype"]), device=device)
        name = "" if plain else entry.get("class", "")
        if "mapping" in entry:
            fields = {key: build(item) for key, item in entry["mapping"]}
            return built(name, fields) if name else fields
        if "sequence" in entry:
            items = [build(item) for item in entry["sequence"]]
            if name:
                return built(name, items)
            return tuple(items) if entry["tuple"] else items
        return entry["value"]

    args = tuple(build(entry) for entry in description["args"])
    return args, {key: build(entry) for key, entry in description["kwargs"].items()}


def batch_shapes(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    batch: Sequence[int | None],
    axes: Sequence[Mapping[int, str]] | None = None,
) -> Any:
    """``dynamic_shapes`` for ``torch.export``.

    Args:
        module: module that is captured.
        args: positional arguments of the example.
        kwargs: keyword arguments.
        batch: axis of each tensor that is the batch, in order, see :func:`batch_axes`.
        axes: further dynamic axes of each tensor, in order; axes of one name have one size.
    """
    shapes = torch.export.ShapesCollection()
    size = torch.export.Dim("batch")
    free = torch.export.Dim.DYNAMIC  # within what the code asks of it: at least 3 for a kernel of 3
    tensors = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
    for leaf, axis, further in zip(tensors, batch, axes or [{}] * len(tensors), strict=True):
        found: dict[int, Any] = {} if axis is None else {axis: size}
        found |= dict.fromkeys(further, free)
        if found:
            shapes[leaf] = found
    return shapes.dynamic_shapes(module, args, kwargs)


@dataclass(frozen=True)
class ResultShape:
    """Nesting of a result: positions of its tensors, and constants between them (for example ``None`` for a loss).

    Args:
        spec: the nested structure.
        constants: one entry for each leaf; ``_HERE`` where a tensor is.
    """

    spec: Any
    constants: tuple[Any, ...]

    @staticmethod
    def of(result: Any, *, others: bool = False) -> "tuple[ResultShape, list[torch.Tensor]]":
        """Separate a result into its shape and its tensors. Caches of ``transformers`` are no outputs; ``None`` stands for them.

        Args:
            result: what ``forward`` returned.
            others: whether objects that are neither tensors nor plain values may be there, ``None`` standing for them.

        Returns:
            Its shape and its tensors, in order.

        Raises:
            InvalidArgumentError: it holds no tensor, or something that is neither a tensor nor a plain value.
        """
        leaves, spec = pytree.tree_flatten(without_caches(register(result)))
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) and type(leaf) not in _CONSTANTS and not others:
                raise InvalidArgumentError(
                    f"Method `forward` must return tensors and plain values, but got a {type(leaf).__name__} in {_words(result)}. "
                    "Return it as a tensor or not at all, or choose others with `outputs`."
                )
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        if not tensors:
            raise InvalidArgumentError(f"Method `forward` must return at least one tensor, but got {_words(result)}.")
        kept = (leaf if type(leaf) in _CONSTANTS else None for leaf in leaves)
        return ResultShape(
            spec, tuple(_HERE if isinstance(v, torch.Tensor) else c for v, c in zip(leaves, kept, strict=True))
        ), tensors

    def pick(self, result: Any) -> list[torch.Tensor]:
        """Tensors of another result of the same form, at the places where this one has tensors."""
        leaves = pytree.tree_leaves(without_caches(result))
        return [leaf for leaf, kept in zip(leaves, self.constants, strict=True) if kept is _HERE]

    def select(self, places: Collection[int]) -> "ResultShape":
        """The shape with these of its tensors only, by position; ``None`` stands for the others."""
        tensors = [i for i, constant in enumerate(self.constants) if constant is _HERE]
        gone = {i for place, i in enumerate(tensors) if place not in places}
        return ResultShape(self.spec, tuple(None if i in gone else c for i, c in enumerate(self.constants)))

    def rebuild(self, tensors: Iterable[Any]) -> Any:
        """The result with other tensors in it."""
        given = iter(tensors)
        return pytree.tree_unflatten([next(given) if c is _HERE else c for c in self.constants], self.spec)

    def paths(self) -> list[Any]:
        """Path of each tensor in the nested structure."""
        found, _ = pytree.tree_flatten_with_path(pytree.tree_unflatten(list(self.constants), self.spec))
        return [path for path, leaf in found if leaf is _HERE]


class InputGuard:
    """Check calls against the inputs a graph was captured with: structure, fixed dimensions and constants.

    Args:
        inputs: from :func:`describe_inputs`.
        what: name of the module, for messages.
    """

    def __init__(self, inputs: Mapping[str, Any], what: str) -> None:
        self._what = what
        example = self._example = example_inputs(inputs, torch.device("meta"), plain=True)
        self._targets = set(inputs.get("targets", ()))
        leaves, self._spec = pytree.tree_flatten(example)
        self._words = _words(example)
        batch, axes = iter(batch_axes(inputs)), iter(dynamic_axes(inputs))
        self._wanted: list[Any] = []
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                axis = next(batch)
                free = {**({} if axis is None else {axis: "N"}), **next(axes)}
                leaf = (tuple(free.get(i, n) for i, n in enumerate(leaf.shape)), leaf.dtype)
            self._wanted.append(leaf)

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a call in canonical form, as :func:`plain_call` gives it.

        Keys of dicts that the network doesn't read, and targets that it doesn't need, may be there or not.

        Raises:
            InvalidArgumentError: it differs from what was captured.
        """
        args = tuple([None if i in self._targets else value for i, value in enumerate(args)])
        kwargs = {name: None if name in self._targets else value for name, value in kwargs.items()}
        args, kwargs = _only_known((args, kwargs), self._example)
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:
            raise InvalidArgumentError(
                f"Inputs of the quantized `{self._what}` must have the structure they were captured with, {self._words}, "
                f"but got {_words((args, kwargs))}. Pass `inputs=` so that it shows this call."
            )
        sizes: dict[str, int] = {}
        for leaf, want in zip(leaves, self._wanted, strict=True):
            if not isinstance(leaf, torch.Tensor) or not isinstance(want, tuple):
                if isinstance(leaf, torch.Tensor) or isinstance(want, tuple) or not _same(leaf, want):
                    was = "a tensor" if isinstance(want, tuple) else _words(want)
                    raise InvalidArgumentError(
                        f"A constant input of the quantized `{self._what}` must be {was}, as captured, but got {_words(leaf)}. "
                        "Make it a tensor if it changes."
                    )
                continue
            shape, dtype = want
            if len(shape) != leaf.ndim or any(
                m != (sizes.setdefault(n, m) if isinstance(n, str) else n)
                for n, m in zip(shape, leaf.shape, strict=True)
            ):
                seen = "".join(f", {symbol} = {size} before" for symbol, size in sizes.items() if symbol in shape)
                raise InvalidArgumentError(
                    f"An input of the quantized `{self._what}` must have shape ({', '.join(map(str, shape))}), as captured, but got "
                    f"{tuple(leaf.shape)}{seen}. Pad or resize, or name the axes that vary in `dynamic`."
                )
            if leaf.dtype is not dtype and leaf.is_floating_point() != dtype.is_floating_point:
                raise InvalidArgumentError(
                    f"An input of the quantized `{self._what}` must have dtype {dtype}, as captured, but got {leaf.dtype}."
                )


def _only_known(value: Any, example: Any) -> Any:
    """A call without the keys of dict arguments that the example lacks."""
    if isinstance(value, dict) and isinstance(example, dict) and example.keys() <= value.keys():
        return {key: _only_known(value[key], item) for key, item in example.items()}
    if isinstance(value, tuple) and isinstance(example, tuple) and len(value) == len(example):
        return tuple([_only_known(item, other) for item, other in zip(value, example, strict=True)])
    return value


def _same(leaf: Any, want: Any) -> bool:
    """Whether two constants are equal and of one type: 1 and True differ."""
    return leaf is want or (isinstance(leaf, _CONSTANTS) and type(leaf) is type(want) and leaf == want)


def _words(value: Any) -> str:
    """Short text of a nested call: ``({'image': float32[3, 8, 8]}, True)``."""
    if isinstance(value, torch.Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key!r}: {_words(item)}" for key, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        inside = ", ".join(_words(item) for item in value)
        return f"[{inside}]" if isinstance(value, list) else f"({inside})"
    return repr(value) if isinstance(value, _CONSTANTS) else f"a {type(value).__name__}"
