"""Public names that are imported when they are first used, so that importing the package stays fast."""

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from lightning_accel.errors import MissingPackageError

_TRAINING = (
    "torch",
    "lightning",
    "torchmetrics",
    "torch_pruning",
    "onnxscript",
    "jsonargparse",
    "tqdm",
    "typing_extensions",
    "onnx",
)


@contextmanager
def training_packages(purpose: str) -> Iterator[None]:
    """Name the extra where a package is missing that only training needs.

    Args:
        purpose: what needs it; the subject of the error.

    Raises:
        MissingPackageError: a package of the extra ``train`` isn't installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if isinstance(error, MissingPackageError) or (error.name or "").split(".")[0] not in _TRAINING:
            raise
        raise MissingPackageError(
            f"{purpose} needs the package `{error.name}`, which is not installed: the extra `runtime` only runs bundles. "
            'pip install "lightning-accel[cpu]"',
            name=error.name,
        ) from None


def lazy(package: str, names: Mapping[str, str]) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Make ``__getattr__``, ``__dir__`` and ``__all__`` of a package.

    Args:
        package: its ``__name__``.
        names: name -> module below ``lightning_accel`` that defines it; an empty string for a module of that name.
    """

    def get(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module `{package}` has no attribute `{name}`")
        with training_packages(f"`{name}`"):
            module = import_module(f"lightning_accel.{names[name] or name}")
        value = getattr(module, name) if names[name] else module
        # The import may have brought other modules of this package, which hide functions of the same name.
        for other, path in names.items():
            if path.rpartition(".")[2] == other and (made := sys.modules.get(f"lightning_accel.{path}")) is not None:
                setattr(sys.modules[package], other, getattr(made, other))
        setattr(sys.modules[package], name, value)
        return value

    return get, lambda: sorted(names), list(names)
