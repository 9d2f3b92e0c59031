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
from lightning_accel.calls.names import Axes, checked_axes, input_names
from lightning_accel.calls.shapes import batch_shapes, describe_inputs, example_inputs, plain_call, traced_batch


@dataclass(frozen=True)
class ExampleCall:
    """One call of a network in canonical form, with names, dynamic axes and shapes.

    Export, verification and benchmarks pass this object on instead of deriving names and axes again from the bare arguments.

    Args:
        signature: of the network's ``forward``.
        call: positional and keyword arguments, defaults filled in.
        input_names: one for each tensor of the call, in order.
        axes: axes beyond the batch that may change, ``{input: {axis: name}}``.
        description: shapes and types as plain values that fit into a checkpoint, see
            :func:`~lightning_accel.calls.shapes.describe_inputs`.
    """

    signature: Signature = field(repr=False)
    call: Call = field(repr=False)
    input_names: tuple[str, ...]
    axes: Axes
    description: Mapping[str, Any] = field(repr=False)

    @classmethod
    def of(
        cls, module: nn.Module, inputs: Any, *, names: Sequence[str] | None = None, dynamic: Axes | None = None
    ) -> "ExampleCall":
        """Derive everything from one call.

        Args:
            module: the network.
            inputs: a tensor, a tuple of positional or a dict of keyword arguments, or ``(args, kwargs)``.
            names: names of the inputs; ``None``: the parameter names of ``forward`` and the keys of dicts.
            dynamic: axes beyond the batch that may change.

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
        axes = checked_axes(dynamic or {}, found, call)
        described = describe_inputs(*call, [axes.get(name, {}) for name in found])
        return cls(signature, call, tuple(found), axes, _with_targets(described, signature, call))

    def with_axes(self, axes: Axes) -> "ExampleCall":
        """The same call with other dynamic axes, which were checked before."""
        described = describe_inputs(*self.call, [axes.get(name, {}) for name in self.input_names])
        return replace(self, axes=axes, description=_with_targets(described, self.signature, self.call))

    def feeds(self) -> dict[str, np.ndarray]:
        """The example's own tensors as named arrays."""
        return named_arrays(self.call, self.input_names)

    def feeds_of(self, *args: Any, **kwargs: Any) -> dict[str, np.ndarray]:
        """Tensors of another call of the same network as named arrays."""
        given = plain_call(*canonical_call(self.signature, args, kwargs))
        leaves = pytree.tree_flatten_with_path(plain_call(*self.call))[0]
        tensors = [pytree.key_get(given, path) for path, leaf in leaves if isinstance(leaf, torch.Tensor)]
        return {name: tensor.detach().cpu().numpy() for name, tensor in zip(self.input_names, tensors, strict=True)}

    def filled(self, tensors: Mapping[str, torch.Tensor]) -> Call:
        """The example with other tensors in it, by input name; constants stay."""
        leaves, spec = pytree.tree_flatten(self.call)
        slots = [i for i, leaf in enumerate(leaves) if isinstance(leaf, torch.Tensor)]
        for slot, name in zip(slots, self.input_names, strict=True):
            leaves[slot] = tensors[name]
        args, kwargs = pytree.tree_unflatten(leaves, spec)
        return args, kwargs

    @contextmanager
    def traceable(self, source: nn.Module, device: torch.device) -> Iterator[tuple[Call, Any]]:
        """Arguments of zeros and their ``dynamic_shapes`` for ``torch.export`` of ``source``, which has the network's inputs."""
        args, kwargs = example_inputs(self.description, device)
        with named_keywords(source, kwargs):
            axes = [self.axes.get(name, {}) for name in self.input_names]
            yield (args, kwargs), batch_shapes(source, args, kwargs, traced_batch(self.description), axes)


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
