"""Discover how a network, or a submodule of it, is called in a run."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call, InputsFunction, as_call, call_from_batch, canonical_call
from lightning_accel.calls.contexts import has_forward, isolated_random, mode, own_forward, own_signature
from lightning_accel.calls.loaders import first_batch
from lightning_accel.errors import InvalidArgumentError


def example_call(module: nn.Module, trainer: L.Trainer, inputs: InputsFunction | None) -> Call:
    """How ``forward`` of a LightningModule is called: by ``inputs``, else ``example_input_array``, else the first batch."""
    example = getattr(module, "example_input_array", None)
    if inputs is None and example is not None:
        return canonical_call(own_signature(module), *as_call(example))
    return _first_call(module, trainer, inputs)


def _first_call(module: nn.Module, trainer: L.Trainer, inputs: InputsFunction | None) -> Call:
    """The call for the first batch."""
    return clear_call(module, lambda samples: first_batch(trainer, samples=samples), inputs)


def clear_call(module: nn.Module, batch_of: Callable[[int | None], Any], inputs: InputsFunction | None) -> Call:
    """The call for a batch, made smaller where another size equals the batch size, as of a mask ``(L, L)``.

    Args:
        module: module that is called.
        batch_of: returns a batch of that many samples; ``None``: of the loader's own size.
        inputs: maps a batch to the arguments.
    """
    call = call_from_batch(module, batch_of(None), inputs)
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    size = len(tensors[0]) if tensors else 0
    others = {n for tensor in tensors for n in tensor.shape[1:]}
    if size > 1 and size in others and any(len(tensor) == size for tensor in tensors[1:]):
        fewer = max((n for n in range(1, size) if n not in others), default=size - 1)
        return call_from_batch(module, batch_of(fewer), inputs)
    return call


def find_submodule(module: nn.Module, path: str, argument: str = "module") -> nn.Module:
    """The submodule at a dotted path.

    Raises:
        InvalidArgumentError: there is none.
    """
    try:
        return module.get_submodule(path)
    except AttributeError:
        names = ", ".join(name for name, _ in module.named_children())
        raise InvalidArgumentError(
            f"Argument `{argument}` must be the path of a submodule, but got {path!r}. There are: {names}."
        ) from None


def submodule_call(module: nn.Module, path: str, call: Call) -> Call:
    """Arguments of a submodule when its root is called with ``call``.

    Raises:
        InvalidArgumentError: there is no such submodule, or it isn't called exactly once.
    """
    part = find_submodule(module, path)
    seen: list[Call] = []
    handle = part.register_forward_pre_hook(lambda m, args, kwargs: seen.append((args, kwargs)), with_kwargs=True)
    try:
        with isolated_random(), mode(module, False), own_forward(module), torch.no_grad():
            module(*call[0], **call[1])
    finally:
        handle.remove()
    if len(seen) != 1:
        raise InvalidArgumentError(
            f"Argument `module` must name a submodule that `forward` calls once, but got {path!r}, which it called {len(seen)} times."
        )
    return canonical_call(own_signature(part), *seen[0])


def owner_and_call(
    pl_module: L.LightningModule, path: str, trainer: L.Trainer, inputs: InputsFunction | None
) -> tuple[nn.Module, Call]:
    """The LightningModule or its submodule at ``path``, with an example of its call.

    Raises:
        InvalidArgumentError: the module has no ``forward``, or there is no submodule at the path.
    """
    forward_exists = has_forward(pl_module)
    if not path:
        if not forward_exists:
            raise InvalidArgumentError(
                f"Argument `module` must name the submodule that `training_step` calls, but got None, and "
                f"`{type(pl_module).__name__}` has no `forward`. There are: {', '.join(n for n, _ in pl_module.named_children())}."
            )
        return pl_module, example_call(pl_module, trainer, inputs)
    if forward_exists:
        return find_submodule(pl_module, path), submodule_call(
            pl_module, path, example_call(pl_module, trainer, inputs)
        )
    part = find_submodule(pl_module, path)
    return part, _first_call(part, trainer, inputs)
