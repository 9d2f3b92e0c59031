"""Import optional packages where they are needed; the error names the extra that installs them."""

from importlib import import_module
from typing import Any

from lightning_accel.errors import MissingPackageError


def require(module: str, extra: str, purpose: str) -> Any:
    """Import an optional package.

    Args:
        module: import name, e.g. ``"onnxruntime"``.
        extra: extra of this distribution that installs it.
        purpose: what needs it; becomes the subject of the error, e.g. ``"Engine `onnxruntime`"``.

    Raises:
        MissingPackageError: the package is not installed; the message says how to install it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        if error.name is not None and error.name.split(".")[0] != module.split(".")[0]:
            raise  # the package is there, something it needs is not: its own message is the better one
        raise MissingPackageError(
            f'{purpose} needs the package `{module}`, which is not installed: pip install "lightning-accel[{extra}]"',
            name=module,
        ) from None
