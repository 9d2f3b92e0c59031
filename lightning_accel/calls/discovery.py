"""Discover how a network, or a submodule of it, is called in a run."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call, InputsFunction, as_call, call_from_batch, canonical_call
from lightning_accel.calls.contexts import has_forward, isolated_random, mode, own_forward, own_signature
from lightning_accel.calls.learned import accepts, called_path, learned_call, passed_on_call, seen_step, why_unseen
from lightning_accel.calls.loaders import first_batch
from lightning_accel.calls.observed import TRAINING
from lightning_accel.errors import InvalidArgumentError


def example_call(
    module: L.LightningModule, trainer: L.Trainer, inputs: InputsFunction | None, *, whole: bool = False
) -> Call:
    """How ``forward`` of a LightningModule is called.

    By ``inputs``; else ``example_input_array``; else as the user's ``validation_step`` or ``training_step`` calls it; else by the first
    batch and its signature, if no step calls it.
    """
    example = getattr(module, "example_input_array", None)
    if inputs is None and example is not None:
        return canonical_call(own_signature(module), *as_call(example))
    return _call_of(module, "", trainer, inputs, whole)


def _call_of(
    pl_module: L.LightningModule, path: str, trainer: L.Trainer, inputs: InputsFunction | None, whole: bool
) -> Call:
    """The call of a part of the module: as the user's steps make it, or for the first batch."""

    def call(samples: int | None) -> Call:
        seen = learned_call(trainer, pl_module, path, samples) if inputs is None else None
        if seen is not None:
            return seen
        part = find_submodule(pl_module, path) if path else pl_module
        try:
            guess = call_from_batch(part, first_batch(trainer, samples=samples), inputs)
        except InvalidArgumentError as error:
            if inputs is None and not path and (found := passed_on_call(trainer, pl_module, samples)):
                return found
            if inputs is None and (why := why_unseen(trainer, pl_module)):
                error.add_note(why.strip())
            raise
        if inputs is None and not path and not accepts(pl_module, guess):
            return passed_on_call(trainer, pl_module, samples) or guess
        return guess

    return call(None) if whole else _clear(call)


def _clear(call_of: Callable[[int | None], Call]) -> Call:
    """The call for as many samples that no other size equals the batch size, as of a mask ``(L, L)``."""
    call = call_of(None)
    _check_batched(call, call_of)
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor) and leaf.ndim]
    size = len(tensors[0]) if tensors else 0
    others = {n for tensor in tensors for n in tensor.shape[1:]}
    if size > 1 and size in others and any(len(tensor) == size for tensor in tensors[1:]):
        fewer = max((n for n in range(1, size) if n not in others), default=size - 1)
        return call_of(fewer)
    return call


def _check_batched(call: Call, call_of: Callable[[int | None], Call]) -> None:
    """Check that the samples of a batch lie in one tensor.

    Raises:
        InvalidArgumentError: they are a list with one tensor for each sample, as of detection networks.
    """
    for position, value in [*enumerate(call[0]), *call[1].items()]:
        if not isinstance(value, list | tuple) or len(value) < 2 or not isinstance(value[0], torch.Tensor):
            continue
        args, kwargs = call_of(len(value) - 1)
        other = args[position] if isinstance(position, int) else kwargs[str(position)]
        if isinstance(other, list | tuple) and len(other) == len(value) - 1:
            shape = tuple(value[0].shape)
            raise InvalidArgumentError(
                f"Argument `inputs` must give tensors whose first dimension is the batch, but got a list of {len(value)} tensors of shape "
                f"{shape}, one for each sample: a graph has a fixed number of inputs. Let `forward` take the stacked tensor, and pass "
                "`inputs=` a function of the batch that stacks it; or name the network behind it with `module`."
            )


def clear_call(module: nn.Module, batch_of: Callable[[int | None], Any], inputs: InputsFunction | None) -> Call:
    """The call for a batch, made smaller where another size equals the batch size, as of a mask ``(L, L)``.

    Args:
        module: module that is called.
        batch_of: returns a batch of that many samples; ``None``: of the loader's own size.
        inputs: maps a batch to the arguments.
    """
    return _clear(lambda samples: call_from_batch(module, batch_of(samples), inputs))


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


def chosen_path(pl_module: L.LightningModule, trainer: L.Trainer, who: str) -> str:
    """The part of a module to quantize if the user names none: what ``training_step`` calls.

    Args:
        pl_module: the LightningModule.
        trainer: in ``fit``, its module and data attached.
        who: name of the callback, for the message that says what was chosen.

    Returns:
        ``""`` for ``forward``, if the step calls it or no call is seen; else the path of the largest network that it calls.
    """
    path = called_path(trainer, pl_module)
    if not path:
        return ""
    others = [name for name in seen_step(trainer, pl_module, TRAINING).outermost if name != path]
    also = f" Not taken, though it is called, too: {', '.join(f'`{name}`' for name in others)}." if others else ""
    rank_zero_info(
        f"{who} takes `{path}`, the largest network that `training_step` calls; it doesn't call `forward`.{also} "
        "Name others with `module`."
    )
    return path


def _check_python(module: nn.Module) -> None:
    """Check that a module consists of Python code that can be traced.

    Raises:
        InvalidArgumentError: a part of it was compiled by ``torch.jit``.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule):
            what = f"`{name}`" if name else "the module itself"
            raise InvalidArgumentError(
                f"Argument `model` must consist of Python modules, but got a ScriptModule, {what}: TorchScript has no code that can be "
                "pruned or captured. Pass the module that was scripted or traced."
            )


def owner_and_call(
    pl_module: L.LightningModule, path: str, trainer: L.Trainer, inputs: InputsFunction | None
) -> tuple[nn.Module, Call]:
    """The LightningModule or its submodule at ``path``, with an example of its call.

    The first batch may be made smaller, unless a callback of the run names the axes of its batch (its attribute ``names_batch``).

    Raises:
        InvalidArgumentError: the module has no ``forward``, or there is no submodule at the path.
    """
    whole = any(getattr(callback, "names_batch", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    forward_exists = has_forward(pl_module)
    _check_python(find_submodule(pl_module, path) if path else pl_module)
    if not path:
        if not forward_exists:
            raise InvalidArgumentError(
                f"Argument `module` must name the submodule that `training_step` calls, but got None, and "
                f"`{type(pl_module).__name__}` has no `forward`. There are: {', '.join(n for n, _ in pl_module.named_children())}."
                f"{why_unseen(trainer, pl_module)}"
            )
        return pl_module, example_call(pl_module, trainer, inputs, whole=whole)
    part = find_submodule(pl_module, path)
    stated = inputs is not None or getattr(pl_module, "example_input_array", None) is not None
    if forward_exists and (stated or learned_call(trainer, pl_module, path) is None):
        return part, submodule_call(pl_module, path, example_call(pl_module, trainer, inputs, whole=whole))
    return part, _call_of(pl_module, path, trainer, inputs, whole)
