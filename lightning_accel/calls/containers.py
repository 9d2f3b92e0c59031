"""Dataclasses and namedtuples of the user's in calls and results: their tensors are inputs and outputs, too."""

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.core.patching import swapped
from lightning_accel.errors import InvalidArgumentError

_SEEN: dict[
    str, type
] = {}  # classes by full name; a description in a checkpoint holds the name alone, and nothing is imported by it


def is_record(value: Any) -> bool:
    """Whether a value is an instance of a dataclass."""
    return is_dataclass(value) and not isinstance(value, type)


def items_of(record: Any) -> dict[str, Any]:
    """Fields of a dataclass's instance by name."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def map_items(value: Any, function: Callable[[Any], Any]) -> Any:
    """A container of the same kind with other items; any other value as it is."""
    if isinstance(value, Mapping):
        return {key: function(item) for key, item in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(function(item) for item in value))
    if isinstance(value, list | tuple):
        return type(value)([function(item) for item in value])
    if is_record(value):
        other = copy(value)  # without `__init__`, which may check what a placeholder isn't
        for name, item in items_of(value).items():
            object.__setattr__(other, name, function(item))
        return other
    return value


def name_of(value: Any) -> str:
    """Full name of the class of a dataclass or namedtuple, which :func:`built` knows from then on; empty for other values."""
    if not is_record(value) and not hasattr(value, "_fields"):
        return ""
    name = f"{type(value).__module__}.{type(value).__qualname__}"
    _SEEN[name] = type(value)
    return name


def built(name: str, items: Mapping[str, Any] | Sequence[Any]) -> Any:
    """An instance of a class that :func:`name_of` has seen.

    Raises:
        InvalidArgumentError: it hasn't seen one, as after loading a checkpoint before any batch.
    """
    if name not in _SEEN:
        raise InvalidArgumentError(
            f"Argument `inputs` must show a call with a `{name}`, which the network was captured with, but no batch was seen yet. "
            "Run `fit`, `validate` or `test` first."
        )
    kind = _SEEN[name]
    return kind(**items) if isinstance(items, Mapping) else kind(*items)


def register(value: Any) -> Any:
    """Let pytree, and so torch.export, see the tensors of the dataclasses in a value; returns the value."""
    if isinstance(value, Mapping | list | tuple):
        for item in value.values() if isinstance(value, Mapping) else value:
            if not isinstance(item, torch.Tensor):
                register(item)
    elif is_record(value):
        if type(value) not in pytree.SUPPORTED_NODES:
            torch.export.register_dataclass(type(value), serialized_type_name=name_of(value))
        register(items_of(value))
    return value


def is_cache(value: Any) -> bool:
    """Whether a value is a cache of keys and values of ``transformers``, for instance a ``DynamicCache``."""
    return any(
        base.__name__.endswith("Cache") and base.__module__.startswith("transformers.") for base in type(value).__mro__
    )


def caches_in(result: Any) -> list[str]:
    """Classes of the caches in a registered result."""
    return [type(leaf).__name__ for leaf in pytree.tree_leaves(result) if is_cache(leaf)]


def without_caches(result: Any) -> Any:
    """A registered result with ``None`` for caches, which only a loop that generates text reads."""
    leaves, spec = pytree.tree_flatten(result)
    if not any(map(is_cache, leaves)):
        return result
    return pytree.tree_unflatten([None if is_cache(leaf) else leaf for leaf in leaves], spec)


@contextmanager
def registered_results(module: nn.Module) -> Iterator[list[str]]:
    """Register the dataclasses that a module's ``forward`` returns inside the block; yields the classes of caches, which it leaves out."""
    forward = module.forward
    caches: list[str] = []

    @functools.wraps(forward)
    def registering(*args: Any, **kwargs: Any) -> Any:
        result = register(forward(*args, **kwargs))
        caches[:] = caches_in(result)
        return without_caches(result)

    with swapped(module, "forward", registering):
        yield caches
