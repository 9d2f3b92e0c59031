"""Inputs: from a batch of the user's loader to the arguments of the module's ``forward``."""

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from inspect import Parameter, Signature, signature
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree
from torch.utils.data import BatchSampler, DataLoader, IterableDataset

from lightning_accel.errors import InvalidArgumentError

Call = tuple[tuple[Any, ...], dict[str, Any]]
InputsFunction = Callable[[Any], Any]


def canonical_call(
    sig: Signature, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """One form for every way to write the same call: positional where possible, defaults filled in.

    Raises:
        InvalidArgumentTypeError: the arguments don't fit the signature.
    """
    bound = sig.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args, dict(bound.kwargs)


def own_signature(module: nn.Module) -> Signature:
    """Signature of the module's own ``forward``, whatever took it over."""
    with own_forward(module):
        return signature(module.forward)


def builds_layers_late(pl_module: L.LightningModule) -> bool:
    """Whether the user's class may build layers or data after the callbacks' ``setup``."""
    users = [c for c in type(pl_module).__mro__ if not c.__module__.startswith(("lightning", "torch"))]
    return any(hook in vars(c) for c in users for hook in ("setup", "configure_model"))


def has_forward(module: L.LightningModule) -> bool:
    """Whether the user's class has a ``forward`` of its own."""
    return type(module).forward is not L.LightningModule.forward


@contextmanager
def own_forward(module: nn.Module) -> Iterator[None]:
    """The module's own ``forward``, whatever took it over."""
    taken = module.__dict__.pop("forward", None)
    try:
        yield
    finally:
        if taken is not None:
            module.__dict__["forward"] = taken


@contextmanager
def named_keywords(module: nn.Module, keywords: Mapping[str, Any]) -> Iterator[None]:
    """The module's own ``forward`` with ``**kwargs`` spelled out: torch.export can't give those dynamic shapes."""
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
        module.__dict__["forward"] = spelled_out
        try:
            yield
        finally:
            del module.__dict__["forward"]


@contextmanager
def mode(module: nn.Module, training: bool) -> Iterator[None]:
    """All submodules in train or eval mode; each gets its own mode back."""
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
    """Buffers get their values back: a forward in train mode moves the statistics of batch norm."""
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    try:
        yield
    finally:
        with torch.no_grad():
            for name, buffer in module.named_buffers():
                buffer.copy_(before[name])


def call_from_batch(module: nn.Module, batch: Any, inputs: InputsFunction | None = None) -> Call:
    """Arguments with which ``forward`` is called for a batch.

    With ``inputs``, whatever it returns: a tuple is positional arguments, a dict keyword arguments, anything else the one
    argument. Without, by the signature: a dict batch gives the keywords that ``forward`` names (or is passed whole if it
    names none), a sequence gives its first elements, as many as ``forward`` requires.

    Args:
        module: whose ``forward`` is meant.
        batch: what the loader yields.
        inputs: the user's own rule.

    Returns:
        Positional and keyword arguments in canonical form.

    Raises:
        InvalidArgumentError: the batch doesn't give what ``forward`` needs.
    """
    return call_by_signature(own_signature(module), f"{type(module).__name__}.forward", batch, inputs)


def call_by_signature(own: Signature, name: str, batch: Any, inputs: InputsFunction | None = None) -> Call:
    """The same for any function: its arguments for a batch.

    Args:
        own: signature of the function.
        name: of the function, for messages.
        batch: what the loader yields.
        inputs: the user's own rule.

    Raises:
        InvalidArgumentError: the batch doesn't give what the function needs.
    """
    args, kwargs = _as_call(inputs(batch)) if inputs is not None else _by_signature(own.parameters, batch)
    try:
        return canonical_call(own, args, kwargs)
    except TypeError as error:
        raise InvalidArgumentError(
            f"Argument `inputs` must map a batch to the arguments of `{name}{own}`, but a batch of type {type(batch).__name__} "
            f"gave others: {error}. Pass `inputs=` a function of the batch that returns a tuple or a dict."
        ) from None


def _as_call(value: Any) -> Call:
    if isinstance(value, tuple):
        return value, {}
    return ((), dict(value)) if isinstance(value, Mapping) else ((value,), {})


def _by_signature(parameters: Mapping[str, Parameter], batch: Any) -> Call:
    ordinary = [
        p for p in parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    ]
    required = [p for p in ordinary if p.default is p.empty]
    if isinstance(batch, Mapping):
        # `labels` would make a Hugging Face model compute its loss: the shipped network has no labels.
        known = {p.name: batch[p.name] for p in ordinary if p.name in batch and p.name != "labels"}
        if known and all(p.name in known for p in required):
            return (), known
        return (batch,), {}
    if isinstance(batch, list | tuple):
        count = max(len(required), 1)
        first = batch[0]
        if count > 1 and len(batch) <= count and isinstance(first, list | tuple) and len(first) == count:
            return tuple(first), {}  # ((a, b), target)
        return tuple(batch[:count]), {}
    return (batch,), {}


def target_from_batch(batch: Any, inputs: int | None = None) -> torch.Tensor | None:
    """What is to be predicted for a batch, as it lies in it: class labels, values or something else.

    Args:
        batch: a dict with a usual name, or a sequence.
        inputs: elements of a sequence that ``forward`` takes; the one behind them is looked at, the last if ``None``.

    Returns:
        The target; ``None`` if there is none.
    """
    if isinstance(batch, Mapping):
        found = next((batch[k] for k in ("labels", "label", "target", "targets", "y") if k in batch), None)
    else:
        sequence = isinstance(batch, list | tuple) and len(batch) > 1
        found = batch[min(inputs, len(batch) - 1) if inputs is not None else -1] if sequence else None
    return found if isinstance(found, torch.Tensor) else None


def class_labels(target: torch.Tensor | None) -> torch.Tensor | None:
    """A target if it holds class labels: integers of shape ``(N,)``."""
    return None if target is None or target.ndim != 1 or target.is_floating_point() else target


@contextmanager
def isolated_random() -> Iterator[None]:
    """Whatever happens inside, the global random generators go on as if it hadn't."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def peek(loader: Any, argument: str = "train_dataloaders", samples: int | None = None) -> Any:
    """A batch as the loader would make it, without moving its sampler, its generator or the global random state.

    For a map-style dataset it is made of the first samples; an iterable one is started anew.

    Args:
        loader: whose batch it is.
        argument: which it was, for messages.
        samples: how many of a map-style dataset are asked for; ``None``: as many as the loader takes.

    Raises:
        InvalidArgumentError: the loader is empty.
    """
    with isolated_random():
        if isinstance(loader, DataLoader) and not isinstance(loader.dataset, IterableDataset):
            length = len(loader.dataset)  # type: ignore[arg-type]
            indices = list(range(min(samples or _batch_size(loader.batch_sampler or loader.sampler), length)))
            if indices and loader.batch_sampler is not None:
                return loader.collate_fn([loader.dataset[i] for i in indices])
            if indices:  # the dataset makes batches itself
                index = indices if isinstance(loader.sampler, BatchSampler) else 0
                return loader.collate_fn(loader.dataset[index])
        for batch in loader:
            return batch
    raise InvalidArgumentError(f"Argument `{argument}` must yield a batch, but got an empty loader.")


def _batch_size(sampler: Any) -> int:
    return int(getattr(sampler, "batch_size", None) or 1)


def first_batch(trainer: L.Trainer, device: torch.device | None = None, samples: int | None = None) -> Any:
    """A training batch as ``training_step`` gets it, before the fit loop has set its loaders up.

    Args:
        trainer: in ``fit``, its module and data attached.
        device: where the batch goes; ``None``: the CPU.
        samples: as for :func:`peek`.
    """
    with isolated_random():
        return transferred(trainer, peek(training_loader(trainer), samples=samples), device or torch.device("cpu"))


def training_loader(trainer: L.Trainer) -> Any:
    """The training loader before the fit loop has set it up; random numbers that making it takes are given back."""
    with isolated_random():
        return trainer.fit_loop._data_source.dataloader()


def transferred(trainer: L.Trainer, batch: Any, device: torch.device) -> Any:
    """A batch as ``training_step`` gets it: cast, passed through the user's transfer hooks, on a device."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch)
    return trainer.strategy.batch_to_device(batch, device)


def example_call(module: nn.Module, trainer: L.Trainer, inputs: InputsFunction | None) -> Call:
    """How ``forward`` of a LightningModule is called: by ``inputs``, else ``example_input_array``, else the first batch."""
    example = getattr(module, "example_input_array", None)
    if inputs is None and example is not None:
        return canonical_call(own_signature(module), *_as_call(example))
    return _first_call(module, trainer, inputs)


def _first_call(module: nn.Module, trainer: L.Trainer, inputs: InputsFunction | None) -> Call:
    """The call for the first batch."""
    return clear_call(module, lambda samples: first_batch(trainer, samples=samples), inputs)


def clear_call(module: nn.Module, batch_of: Callable[[int | None], Any], inputs: InputsFunction | None) -> Call:
    """The call for a batch; with a sample less where a size could be taken for the batch's, as of a mask ``(L, L)``.

    Args:
        module: what is called.
        batch_of: makes the batch of so many samples; of as many as come for ``None``.
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
    """The submodule at a dotted path, which came as that argument.

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
    """How a submodule is called when its root is called with ``call``; nothing but the call is observed.

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
    """The module to look into, the LightningModule or a submodule of it, and how it is called.

    Raises:
        InvalidArgumentError: the module has no ``forward``, or the path leads nowhere.
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
