"""Combine a network with its pre- and postprocessing in one module."""

from inspect import Parameter, Signature, signature
from typing import Any

import torch
from torch import nn

from lightning_accel.calls.contexts import own_signature
from lightning_accel.errors import InvalidArgumentTypeError


def surrounded(network: nn.Module, preprocess: nn.Module | None, postprocess: nn.Module | None) -> nn.Module:
    """One module that computes ``postprocess(network(preprocess(...)))``.

    Args:
        network: the network; quantized parts of it are still found in it.
        preprocess: takes the shipped inputs, returns the network's arguments: a tensor, a tuple of positional or a dict of
            keyword arguments. ``None``: the network's own inputs.
        postprocess: takes the network's result as its one argument. ``None``: the result itself.

    Raises:
        InvalidArgumentTypeError: one that is no ``nn.Module``.
    """
    for name, part in (("preprocess", preprocess), ("postprocess", postprocess)):
        if part is not None and not isinstance(part, nn.Module):
            raise InvalidArgumentTypeError(
                f"Argument `{name}` must be an nn.Module, whose buffers and mode go with it, but got {type(part).__name__}."
            )
    if preprocess is None and postprocess is None:
        return network
    first = own_signature(network) if preprocess is None else signature(preprocess.forward)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.preprocess is not None:
            given = self.preprocess(*args, **kwargs)
            args, kwargs = given if isinstance(given, tuple) else (), given if isinstance(given, dict) else {}
            if isinstance(given, torch.Tensor):
                args = (given,)
        result = self.network(*args, **kwargs)
        return result if self.postprocess is None else self.postprocess(result)

    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *first.parameters.values()]
    if any(p.kind is Parameter.POSITIONAL_ONLY for p in first.parameters.values()):
        parameters[0] = Parameter("self", Parameter.POSITIONAL_ONLY)
    forward.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    made = type(f"Surrounded{type(network).__name__}", (nn.Module,), {"forward": forward})()
    made.preprocess, made.network, made.postprocess = preprocess, network, postprocess
    value: nn.Module = made
    return value
