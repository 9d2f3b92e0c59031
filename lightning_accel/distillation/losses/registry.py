"""Registry of named distillation losses, open to other distributions."""

from collections.abc import Callable
from importlib import import_module
from inspect import signature
from typing import Any, cast

from torch import Tensor

from lightning_accel.core.registry import Registry
from lightning_accel.distillation.scheduled import Number
from lightning_accel.errors import InvalidArgumentError

_BUILTIN = {  # name -> module and class below this package
    "kd": "logits.SoftTargetLoss",
    "hard": "logits.HardLabelLoss",
    "mse": "logits.LogitMSELoss",
    "multilabel": "logits.MultiLabelLoss",
    "regression": "logits.RegressionLoss",
    "dkd": "decoupled.DKDLoss",
    "dist": "correlation.DISTLoss",
    "standardized_kd": "correlation.StandardizedLoss",
    "hint": "features.HintLoss",
    "attention_transfer": "features.AttentionTransferLoss",
    "similarity": "relations.SimilarityLoss",
    "rkd": "relations.RKDLoss",
    "hidden": "tokens.HiddenStateLoss",
    "cosine": "tokens.CosineLoss",
    "attention": "tokens.AttentionLoss",
    "minilm": "tokens.MiniLMLoss",
}


def _class_of(name: str) -> Callable[..., Any]:
    module, _, cls = _BUILTIN[name].partition(".")
    return cast("Callable[..., Any]", getattr(import_module(f"lightning_accel.distillation.losses.{module}"), cls))


_LOSSES: Registry[Callable[..., Any]] = Registry("loss", "lightning_accel.losses", _BUILTIN, _class_of)


def register_loss(name: str, factory: Callable[..., Callable[..., Tensor]]) -> None:
    """Register a loss by a name for ``DistillationModule(losses=...)``, in this process.

    A distribution declares its losses as entry points of the group ``lightning_accel.losses`` instead.

    Args:
        name: of the loss, in logs and in the checkpoint too.
        factory: a class, or a function that returns the loss ``(student, teacher) -> scalar``. It is called without arguments, or with
            ``temperature=`` if it has this parameter and the user gives one. Its attribute ``layers`` says whether the loss compares
            layers: ``"none"`` (the default), ``"optional"`` or ``"required"``.

    Raises:
        InvalidArgumentError: another loss has this name, or ``factory`` isn't callable.
    """
    if not callable(factory):
        raise InvalidArgumentError(f"Argument `factory` must be a class or a function, but got {factory!r}.")
    _LOSSES.register(name, factory)


def unregister_loss(name: str) -> None:
    """Remove a loss that :func:`register_loss` added.

    Raises:
        InvalidArgumentError: there is none of that name.
    """
    _LOSSES.unregister(name)


def loss_names() -> list[str]:
    """Names of all losses: those of this package, those of entry points, and those registered in this process."""
    return list(_LOSSES)


def loss_factory(name: str) -> Callable[..., Any]:
    """The class of the loss with a name.

    Raises:
        InvalidArgumentError: there is no such name.
    """
    found = _LOSSES.find(name)
    if found is None:
        raise InvalidArgumentError(
            f"Argument `losses` must name one of {', '.join(_LOSSES)}, or be a callable, but got {name!r}.{_LOSSES.suggestion(name)}"
        )
    return found


def named_loss(name: str, temperature: Number | None = None) -> Callable[..., Tensor]:
    """Create the loss with a name, with its default settings except for the temperature.

    Raises:
        InvalidArgumentError: there is no such name, or the loss has no temperature.
    """
    make = loss_factory(name)
    if temperature is None:
        return cast("Callable[..., Tensor]", make())
    if name == "standardized_kd":
        return cast("Callable[..., Tensor]", make(named_loss("kd", temperature)))
    if not has_temperature(name):
        raise InvalidArgumentError(f"Argument `temperature` must be left out for the loss {name!r}, which has none.")
    return cast("Callable[..., Tensor]", make(temperature=temperature))


def has_temperature(name: str) -> bool:
    """Whether the loss with a name has a temperature."""
    return name == "standardized_kd" or "temperature" in signature(loss_factory(name)).parameters


def layers_of(name: str) -> str:
    """Whether the loss with a name compares layers: ``"none"``, ``"optional"`` or ``"required"``."""
    return str(getattr(loss_factory(name), "layers", "none"))


def name_of(loss: Any) -> str:
    """The name of a loss object: the registered one, or that of its class or function."""
    known = {path.partition(".")[2]: name for name, path in _BUILTIN.items()}
    known |= {getattr(factory, "__name__", ""): name for name, factory in _LOSSES.registered.items()}
    name = getattr(loss, "__name__", type(loss).__name__)
    return known.get(name, "loss" if name == "<lambda>" else name)
