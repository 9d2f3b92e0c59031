"""Support both packages that hold Lightning: ``lightning`` and ``pytorch_lightning``.

They contain the same code twice and share no class. This library builds on ``lightning``; a user's Trainer, module and callbacks may come
from either package. ``pytorch_lightning`` is never imported here: without it no object of it can exist.
"""

import sys
from typing import Any, Self, TypeVar

import lightning as L
from lightning_utilities.core.overrides import is_overridden as _is_overridden
from torch import nn
from typing_extensions import TypeIs

from lightning_accel.errors import InvalidArgumentError

_Kind = TypeVar("_Kind")
_PREFIXES = (("lightning.pytorch", "pytorch_lightning"), ("lightning.fabric", "lightning_fabric"))
_PACKAGES = {
    "lightning": "lightning",
    "pytorch_lightning": "pytorch_lightning",
    "lightning_fabric": "pytorch_lightning",
}
_LIBRARIES = {*_PACKAGES, "torch", "torchmetrics", "lightning_accel", "builtins"}


def is_users(kind: type) -> bool:
    """Whether a class is the user's own and not of Lightning, PyTorch or this library; ``torchgeo`` and ``lightning_pose`` are users'."""
    return kind.__module__.partition(".")[0] not in _LIBRARIES


def twin(kind: Any) -> Any:
    """A class or function of ``lightning`` as ``pytorch_lightning`` has it; ``None`` if that isn't imported or has no such name."""
    for ours, theirs in _PREFIXES:
        if f"{kind.__module__}.".startswith(f"{ours}."):
            module = sys.modules.get(theirs + kind.__module__[len(ours) :])
            return getattr(module, kind.__name__, None)
    return None


def both(*kinds: type[_Kind]) -> tuple[type[_Kind], ...]:
    """Classes of ``lightning`` with their twins, for ``isinstance`` and ``issubclass``.

    Example:
        >>> isinstance(L.LightningModule(), both(L.LightningModule))
        True
    """
    return tuple(c for kind in kinds for c in (kind, twin(kind)) if c is not None)


def package_of(value: Any) -> str:
    """The package that a Trainer, a module or a callback (or its class) comes from: ``"lightning"`` or ``"pytorch_lightning"``."""
    kind = value if isinstance(value, type) else type(value)
    tops = (c.__module__.partition(".")[0] for c in kind.__mro__)
    return next((_PACKAGES[top] for top in tops if top in _PACKAGES), "lightning")


def counterpart(kind: Any, value: Any) -> Any:
    """A class or function of ``lightning`` as it is in the package of ``value``."""
    found = twin(kind) if package_of(value) == "pytorch_lightning" else None
    return kind if found is None else found


def is_lightning_module(value: Any) -> TypeIs[L.LightningModule]:
    """Whether a value is a LightningModule of either package."""
    return isinstance(value, both(L.LightningModule))


def is_overridden(method: str, value: Any, kind: type = L.LightningModule) -> bool:
    """Whether the user overrides a method of a Lightning class (``kind``) of either package."""
    return bool(_is_overridden(method, value, counterpart(kind, value)))


def check_one_package(trainer: Any, **others: Any) -> None:
    """Check that a Trainer and what it is used with come from one package.

    Args:
        trainer: of either package.
        others: modules and datamodules by argument name; ``None`` is left out.

    Raises:
        InvalidArgumentError: they don't.
    """
    wanted = package_of(trainer)
    for argument, value in others.items():
        if isinstance(value, both(L.LightningModule, L.LightningDataModule)) and package_of(value) != wanted:
            got = package_of(value)
            raise InvalidArgumentError(
                f"Argument `{argument}` must come from the package of the Trainer, `{wanted}`, but got a {type(value).__name__} of "
                f"`{got}`: the two share no class. Import both from one of them: `from {_import(got)} import Trainer`."
            )


def _import(package: str) -> str:
    return "lightning" if package == "lightning" else package


class TrainerCallback(L.Callback):
    """Base of this library's callbacks: a ``Callback`` for the Trainer of either package."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Create an instance, which is a ``pytorch_lightning.Callback``, too, where that package is imported."""
        theirs = twin(L.Callback)
        if theirs is not None and not issubclass(TrainerCallback, theirs):
            TrainerCallback.__bases__ = (*TrainerCallback.__bases__, theirs)
        other: Any = cls.instead(*args, **kwargs)
        return super().__new__(cls) if other is None else other

    @classmethod
    def instead(cls, *args: Any, **kwargs: Any) -> Any:
        """Another callback that these arguments stand for; ``None`` for an instance of this class.

        A ``__new__`` of a subclass would hide the arguments of ``__init__`` from the command line.
        """
        return None


def module_bases(kind: type[nn.Module]) -> tuple[type, ...]:
    """The classes of a module's class up to ``nn.Module``, as bases that stay in front of any further one."""
    return kind.__mro__[: kind.__mro__.index(nn.Module)]
