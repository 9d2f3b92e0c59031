"""A small network and images to try the library with; ``lightning-accel init`` copies these files into a project.

The names are resolved lazily, so that the files can be copied where torch can't be imported.
"""

from importlib import import_module
from typing import Any

_PUBLIC = {"ImageClassifier": "model", "Images": "data"}

__all__ = ["ImageClassifier", "Images"]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(import_module(f"lightning_accel.demo.{_PUBLIC[name]}"), name)
    raise AttributeError(f"module `lightning_accel.demo` has no attribute `{name}`")
