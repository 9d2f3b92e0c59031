"""Read checkpoints that hold objects without running code of theirs: foreign objects become placeholders."""

import io
import pickle
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch._weights_only_unpickler import _get_allowed_globals, _get_user_allowed_globals


class ForeignObject:
    """Placeholder of an object in a checkpoint, whose class isn't imported.

    Attributes:
        class_path: of the object.
    """

    class_path = ""

    def __new__(cls, *args: Any, **kwargs: Any) -> "ForeignObject":
        """A placeholder, whatever the object was built with."""
        return object.__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        """Drop the object's state."""

    def __setitem__(self, key: Any, value: Any) -> None:
        """Drop an item of a dict's subclass."""

    def append(self, value: Any) -> None:
        """Drop an item of a list's subclass."""

    def extend(self, values: Any) -> None:
        """Drop items of a list's subclass."""

    def __repr__(self) -> str:
        return f"<a {self.class_path} that is not unpickled>"


class _Unpickler(pickle.Unpickler):
    """Knows what ``weights_only=True`` allows; everything else becomes a placeholder and is not imported."""

    def find_class(self, module: str, name: str) -> Any:
        path = f"{module}.{name}"
        allowed = {**_get_allowed_globals(), **_get_user_allowed_globals()}
        if path in allowed:
            return allowed[path]
        return type(name, (ForeignObject,), {"class_path": path})


def load_without_objects(path: str | Path) -> Any:
    """What ``torch.save`` wrote, on the CPU, with a :class:`ForeignObject` for each object that ``weights_only=True`` refuses."""
    reader = SimpleNamespace(Unpickler=_Unpickler, load=lambda file, **kwargs: _Unpickler(file, **kwargs).load())
    reader.__name__ = "lightning_accel"
    return torch.load(path, map_location="cpu", weights_only=False, pickle_module=reader)


def foreign_in(value: Any) -> str:
    """Class path of the first placeholder in a nested value; empty if there is none."""
    if isinstance(value, ForeignObject):
        return value.class_path
    items: Iterable[Any] = ()
    if isinstance(value, Mapping):
        items = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        items = value
    return next(filter(None, map(foreign_in, items)), "")


def unreadable(values: Mapping[str, Any]) -> dict[str, str]:
    """Names of hyper-parameters that ``weights_only=True`` refuses, with the class of each."""
    found = {}
    for name, value in values.items():
        file = io.BytesIO()
        try:
            torch.save(value, file)
            file.seek(0)
            torch.load(file, weights_only=True)
        except Exception:  # pickle and torch.load raise a dozen unrelated types
            found[name] = type(value).__name__
    return found
