"""Linear layers whose weight is transformed before each use: adapters first, then rounding.

The parameters and their names stay as they are; only the class of the layer changes, so ``state_dict``, optimizers and ``isinstance`` see
what they saw before.
"""

from collections.abc import Iterator
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import nn
from typing_extensions import override

_ROUNDING, _ADAPTERS = "_weight_rounding", "adapters"


class Rounding(Protocol):
    """Rounding of a weight, the last step before it is used."""

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        """Rounded values of a weight ``(out, in)``, with a gradient to it."""
        ...


class EffectiveWeight(nn.Module):
    """Mixin of linear layers that compute with :meth:`effective_weight` instead of ``weight``.

    Attributes:
        transposed: whether ``weight`` is ``(in, out)``, as in the ``Conv1D`` of transformers.
    """

    transposed = False

    def stored_weight(self) -> torch.Tensor:
        """The parameter as ``(out, in)``."""
        weight = cast(torch.Tensor, self.weight)
        return weight.t() if self.transposed else weight

    def adapted_weight(self) -> torch.Tensor:
        """Parameter plus the merged adapters, ``(out, in)``."""
        weight = self.stored_weight()
        for adapter in self.adapters_of(merged=True):
            weight = weight + adapter.delta().to(weight.dtype)
        return weight

    def effective_weight(self) -> torch.Tensor:
        """The weight that the layer computes with, ``(out, in)``: adapted, then rounded."""
        weight, rounding = self.adapted_weight(), self.rounding
        return weight if rounding is None else rounding(weight)

    @property
    def adapters_by_name(self) -> dict[str, Any]:
        """All adapters of the layer, active or not."""
        modules = self._modules.get(_ADAPTERS)
        return {} if modules is None else dict(cast(nn.ModuleDict, modules).items())

    def adapters_of(self, *, merged: bool) -> Iterator[Any]:
        """Active adapters that change the weight, or those that add to the output."""
        if _ADAPTERS in self._modules:
            yield from (a for a in self.adapters_by_name.values() if a.active and a.merged == merged)

    @property
    def rounding(self) -> Rounding | None:
        """Rounding of the weight, if any."""
        return cast("Rounding | None", self.__dict__.get(_ROUNDING))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``x @ effective_weight.T + bias`` plus adapters that are kept apart: ``(..., in)`` to ``(..., out)``."""
        bias = cast("torch.Tensor | None", self.bias)
        result = F.linear(x, self.effective_weight(), bias)
        for adapter in self.adapters_of(merged=False):
            result = result + adapter(x).to(result.dtype)
        return result


class EffectiveLinear(EffectiveWeight, nn.Linear):
    """``nn.Linear`` that computes with :meth:`EffectiveWeight.effective_weight`."""

    @override
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return EffectiveWeight.forward(self, x)


_CLASSES: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: EffectiveLinear}


def is_conv1d(kind: type) -> bool:
    """Whether a class is the ``Conv1D`` of transformers, a linear layer with a weight ``(in, out)``."""
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def has_linear_weight(layer: nn.Module) -> bool:
    """Whether a layer is exactly a linear one; a subclass may compute anything."""
    return type(layer) is nn.Linear or is_conv1d(type(layer)) or isinstance(layer, EffectiveWeight)


def transform_(layer: nn.Module) -> EffectiveWeight:
    """Let a linear layer compute with its effective weight, in place. A second call does nothing."""
    kind = type(layer)
    if not isinstance(layer, EffectiveWeight):
        if kind not in _CLASSES:  # Conv1D: transformers isn't imported here
            namespace = {"transposed": True, "__module__": __name__, "forward": EffectiveWeight.forward}
            _CLASSES[kind] = type(f"Effective{kind.__name__}", (EffectiveWeight, kind), namespace)
        layer.__class__ = _CLASSES[kind]
    return cast(EffectiveWeight, layer)


def restore_(layer: nn.Module) -> None:
    """Undo :func:`transform_` unless adapters or a rounding are left."""
    if isinstance(layer, EffectiveWeight) and layer.rounding is None and not layer.adapters_by_name:
        kind = type(layer)
        layer._modules.pop(_ADAPTERS, None)
        cast(Any, layer).__class__ = next(plain for plain, effective in _CLASSES.items() if effective is kind)


def set_rounding_(layer: nn.Module, rounding: Rounding | None) -> None:
    """Round the weight of a linear layer before each use, in place; ``None`` ends that."""
    transform_(layer)
    if rounding is None:
        layer.__dict__.pop(_ROUNDING, None)
        restore_(layer)
    else:
        layer.__dict__[_ROUNDING] = rounding


def add_adapter_(layer: nn.Module, name: str, adapter: nn.Module) -> None:
    """Add an adapter to a linear layer under a name, in place."""
    transform_(layer)
    if layer._modules.get(_ADAPTERS) is None:
        layer.add_module(_ADAPTERS, nn.ModuleDict())
    cast(nn.ModuleDict, layer._modules[_ADAPTERS])[name] = adapter


def remove_adapter_(layer: nn.Module, name: str) -> None:
    """Remove an adapter from a linear layer, in place."""
    del cast(nn.ModuleDict, layer._modules[_ADAPTERS])[name]
    restore_(layer)


def linear_layers(module: nn.Module) -> dict[str, nn.Module]:
    """Linear layers below a module by name; a layer under several names has its first."""
    return {name: part for name, part in module.named_modules() if has_linear_weight(part)}
