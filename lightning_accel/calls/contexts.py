"""Context managers that change a module or the random generators and restore them."""

import random
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from copy import copy
from inspect import Parameter, Signature, signature
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn

from lightning_accel.core.packages import counterpart, is_users
from lightning_accel.core.patching import removed, swapped

REPLACED = "replaced_forward"  # of a `forward` that this library has set on an instance: the one before it, or `None`


def instance_forward(module: nn.Module) -> Any:
    """A ``forward`` that the user has set on the instance, which goes before the class's; ``None`` if there is none."""
    found = vars(module).get("forward")
    while hasattr(found, REPLACED):
        found = getattr(found, REPLACED)
    return found


def own_signature(module: nn.Module) -> Signature:
    """Signature of the module's own ``forward``, even if this library has replaced it."""
    with own_forward(module):
        return signature(module.forward)


def builds_layers_late(pl_module: L.LightningModule) -> bool:
    """Whether the user's class may build layers or data after the callbacks' ``setup``."""
    users = [c for c in type(pl_module).__mro__ if is_users(c)]
    return any(hook in vars(c) for c in users for hook in ("setup", "configure_model"))


def has_forward(module: L.LightningModule) -> bool:
    """Whether the user's class has a ``forward`` of its own."""
    return type(module).forward is not counterpart(L.LightningModule, module).forward


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """Use the module's own ``forward`` inside the block, even if this library has replaced it."""
    users = instance_forward(module)
    with removed(module, "forward") if users is None else swapped(module, "forward", users):
        yield


@contextmanager
def own_forwards(root: nn.Module) -> Iterator[None]:
    """Use the own ``forward`` of all submodules inside the block."""
    with ExitStack() as stack:
        for module in root.modules():
            if "forward" in vars(module):
                stack.enter_context(own_forward(module))
        yield


@contextmanager
def named_keywords(module: nn.Module, keywords: Mapping[str, Any]) -> Iterator[None]:
    """Spell out the ``**kwargs`` of the module's own ``forward``, for which torch.export has no dynamic shapes."""
    with own_forward(module):
        own = own_signature(module)
        open_ended = [p for p in own.parameters.values() if p.kind is p.VAR_KEYWORD]
        extra = [Parameter(k, Parameter.KEYWORD_ONLY) for k in keywords if k not in own.parameters]
        if not open_ended:
            yield
            return
        forward = module.forward

        def spelled_out(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        fixed = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
        spelled_out.__signature__ = own.replace(parameters=[*fixed, *extra])  # type: ignore[attr-defined]
        with swapped(module, "forward", spelled_out):
            yield


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """Set all submodules to train or eval mode inside the block; each gets its own mode back."""
    before = {m: m.training for m in module.modules()}
    try:
        for m in before:
            m.training = training
        yield
    finally:
        for m, flag in before.items():
            m.training = flag


@contextmanager
def kept_buffers(module: nn.Module) -> Iterator[None]:
    """Restore buffers after the block: a forward in train mode updates batch norm statistics."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])


@contextmanager
def as_in_training() -> Iterator[None]:
    """Inside the block ``nn.TransformerEncoder`` computes without gradients what it does with them.

    Its fused kernel for inference returns NaN for a sequence in which a query may look nowhere (causal, with padding in front).
    """
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextmanager
def isolated_random(seed: int | None = None) -> Iterator[None]:
    """Restore the state of the global random generators after the block; with a ``seed`` they start from it."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_device = torch.cuda.get_rng_state() if torch.cuda.is_available() and torch.cuda.is_initialized() else None
    if seed is not None:
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        if on_device is not None:
            torch.cuda.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_device is not None:
            torch.cuda.set_rng_state(on_device)


def plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Values that a ``forward`` may read from a module and its submodules: numbers, texts and tuples of them, by dotted name."""
    return {
        f"{path}.{name}" if path else name: value
        for path, part in module.named_modules()
        for name, value in vars(part).items()
        if name != "training" and not name.startswith("_") and _is_plain(value)
    }


def _is_plain(value: Any) -> bool:
    return isinstance(value, bool | int | float | str | None) or (
        type(value) in (tuple, list) and all(_is_plain(item) for item in value)
    )


@contextmanager
def unlogged(module: nn.Module) -> Iterator[None]:
    """Let a LightningModule log nothing inside the block."""
    with ExitStack() as stack:
        for name in ("log", "log_dict") if hasattr(module, "log") else ():
            stack.enter_context(swapped(module, name, lambda *_, **__: None))
        yield


@contextmanager
def kept_state(module: nn.Module) -> Iterator[None]:
    """Restore everything that a ``forward`` can change in a module: attributes, lists, dicts and sets, buffers and their values."""
    parts = list(module.modules())
    attributes = [dict(vars(part)) for part in parts]
    collections = [
        (value, copy(value)) for own in attributes for value in own.values() if type(value) in (list, dict, set)
    ]
    values = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for part, before in zip(parts, attributes, strict=True):
            vars(part).clear()
            vars(part).update(before)
        for collection, before in collections:
            collection.clear()
            collection.extend(before) if isinstance(collection, list) else collection.update(before)
        with torch.no_grad():
            for buffer, value in values:
                buffer.copy_(value)
