"""An example call of a network, with names, axes and shapes derived once."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from inspect import Signature
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call, canonical_call, given_call, is_target
from lightning_accel.calls.contexts import named_keywords, own_signature
from lightning_accel.calls.names import Axes, checked_axes, checked_batch, input_names
from lightning_accel.calls.shapes import (
    batch_axes,
    batch_shapes,
    describe_inputs,
    example_inputs,
    plain_call,
    tensor_entries,
)


@dataclass(frozen=True)
class ExampleCall:
    """One call of a network in canonical form, with names, dynamic axes and shapes.

    Export, verification and benchmarks pass this object on instead of deriving names and axes again from the bare arguments.

    Args:
        signature: of the network's ``forward``.
        call: positional and keyword arguments, defaults filled in.
        tensor_names: one for each tensor of the call, in order.
        axes: axes beyond the batch that may change, ``{input: {axis: name}}``.
        description: shapes and types as plain values that fit into a checkpoint, see
            :func:`~lightning_accel.calls.shapes.describe_inputs`.
        unused: names of tensors that the network's outputs don't depend on; ``None`` until it was captured.
    """

    signature: Signature = field(repr=False)
    call: Call = field(repr=False)
    tensor_names: tuple[str, ...]
    axes: Axes
    description: Mapping[str, Any] = field(repr=False)
    unused: tuple[str, ...] | None = None

    @classmethod
    def of(
        cls,
        module: nn.Module,
        inputs: Any,
        *,
        names: Sequence[str] | None = None,
        dynamic: Axes | None = None,
        batch: str = "dynamic",
        batch_axis: Mapping[str, int | None] | None = None,
    ) -> "ExampleCall":
        """Derive everything from one call.

        Args:
            module: the network.
            inputs: a tensor, a tuple of positional or a dict of keyword arguments, or ``(args, kwargs)``.
            names: names of the inputs; ``None``: the parameter names of ``forward`` and the keys of dicts.
            dynamic: axes beyond the batch that may change.
            batch: ``"dynamic"``, or ``"fixed"`` for a network that takes the example's shapes only.
            batch_axis: axis of the batch of inputs where it isn't the first one; ``None`` for inputs without a batch.

        Raises:
            InvalidArgumentError: the inputs hold no tensor, or names or axes don't fit them.
            InvalidArgumentTypeError: the inputs don't fit the signature.

        Example:
            >>> ExampleCall.of(nn.Linear(4, 2), torch.zeros(3, 4)).input_names
            ('input',)
        """
        signature = own_signature(module)
        call = canonical_call(signature, *given_call(inputs))
        found = input_names(signature, call, names)
        batches = checked_batch(batch, batch_axis, found, call)
        axes = checked_axes(dynamic or {}, found, call, batches)
        described = describe_inputs(*call, [axes.get(name, {}) for name in found], batches)
        return cls(signature, call, tuple(found), axes, _with_targets(described, signature, call))

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the network's inputs: of the tensors without the unused ones."""
        return tuple(name for name in self.tensor_names if name not in (self.unused or ()))

    @property
    def batch_axes(self) -> dict[str, int]:
        """Axis of each input that is the batch; inputs without one, and all of a fixed batch, aren't in it."""
        found = dict(zip(self.tensor_names, batch_axes(self.description), strict=True))
        return {name: axis for name in self.input_names if (axis := found[name]) is not None}

    def with_axes(self, axes: Axes, batch: Sequence[int | None] | None = None) -> "ExampleCall":
        """The same call with other dynamic axes, which were checked before, and another axis of each tensor as the batch."""
        batches = batch_axes(self.description) if batch is None else batch
        described = describe_inputs(*self.call, [axes.get(name, {}) for name in self.tensor_names], batches)
        return replace(self, axes=axes, description=_with_targets(described, self.signature, self.call))

    def without(self, unused: Sequence[str]) -> "ExampleCall":
        """The same call for a network whose outputs don't depend on these tensors."""
        axes = {name: of_input for name, of_input in self.axes.items() if name not in unused}
        return replace(self, unused=tuple(unused), axes=axes)

    def feeds(self) -> dict[str, np.ndarray]:
        """The example's own tensors as named arrays."""
        return self.named(self.call)

    def named(self, call: Call) -> dict[str, np.ndarray]:
        """Tensors of a call of the same form as named arrays for an engine."""
        arrays = named_arrays(call, self.tensor_names)
        return {name: arrays[name] for name in self.input_names}

    def feeds_of(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Tensors of another call of the same network as named arrays."""
        given = plain_call(*canonical_call(self.signature, args, kwargs))
        leaves = pytree.tree_flatten_with_path(plain_call(*self.call))[0]
        paths = dict(zip(self.tensor_names, (p for p, leaf in leaves if isinstance(leaf, torch.Tensor)), strict=True))
        tensors = {name: pytree.key_get(given, paths[name]) for name in self.input_names}
        return {name: tensor.detach().cpu().numpy() for name, tensor in tensors.items()}

    def filled(self, tensors: Mapping[str, torch.Tensor]) -> Call:
        """The example with other tensors in it, by input name; constants stay, unused tensors get the others' sizes."""
        leaves, spec = pytree.tree_flatten(self.call)
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for slot, name in zip(slots, self.tensor_names, strict=True):
            leaves[slot] = tensors[name] if name in tensors else self._like(leaves[slot], name, tensors)
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    def _like(self, unused: torch.Tensor, name: str, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """An unused tensor of the example, repeated or cut to the batch and the dynamic axes of the tensors of a call."""
        entries = dict(zip(self.tensor_names, tensor_entries(self.description), strict=True))
        sizes: dict[str, int] = {}
        for other, tensor in tensors.items():
            for axis, symbol in _symbols(entries[other]):
                sizes[symbol] = tensor.shape[axis]
        for axis, symbol in _symbols(entries[name]):
            size = sizes.get(symbol, unused.shape[axis])
            places = torch.arange(size, device=unused.device) % unused.shape[axis]
            unused = unused.index_select(axis, places)
        return unused

    @contextmanager
    def traceable(self, source: nn.Module, device: torch.device) -> Iterator[tuple[Call, Any]]:
        """Arguments of zeros and their ``dynamic_shapes`` for ``torch.export`` of ``source``, which has the network's inputs."""
        args, kwargs = example_inputs(self.description, device)
        with named_keywords(source, kwargs):
            axes = [self.axes.get(name, {}) for name in self.tensor_names]
            yield (args, kwargs), batch_shapes(source, args, kwargs, batch_axes(self.description), axes)


def _symbols(entry: Mapping[str, Any]) -> list[tuple[int, str]]:
    """Axes of a described tensor that vary, each with its symbol."""
    batch = [(entry.get("batch_axis", 0), "batch")] if entry["batch"] else []
    return batch + [(axis, symbol) for axis, symbol in entry.get("axes", [])]


def _with_targets(description: dict[str, Any], signature: Signature, call: Call) -> dict[str, Any]:
    """The description with the positions and names of targets that ``forward`` has a default for and that the call leaves out."""
    parameters = list(signature.parameters.values())
    bound = signature.bind(*call[0], **call[1]).arguments
    absent = [p for p in parameters if p.default is None and is_target(p.name) and bound.get(p.name) is None]
    found = [p.name if p.name in call[1] else parameters.index(p) for p in absent]
    return {**description, "targets": found} if found else description


def named_arrays(call: Call, names: Sequence[str]) -> dict[str, np.ndarray]:
    """A call's tensors as named arrays for an engine."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
