"""Inspect which of ``target``, ``mask`` and ``batch`` a loss takes."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

KNOWN = ("target", "mask", "batch")


def wants(loss: Callable[..., Any]) -> frozenset[str]:
    """Names among ``target``, ``mask`` and ``batch`` that a loss takes as parameters after its first two.

    Args:
        loss: ``(student, teacher, ...)``. For a ``torch.nn.Module`` the signature of its ``forward`` is used.

    Returns:
        Names of the arguments to pass by keyword; empty for a callable without a signature.

    Example:
        >>> sorted(wants(lambda student, teacher, *, batch, mask=None: 0.0))
        ['batch', 'mask']
        >>> sorted(wants(torch.nn.functional.mse_loss))  # its `target` is the second parameter
        []
    """
    declared = getattr(loss, "wants", None)
    if isinstance(declared, frozenset):
        return declared
    try:
        own = signature(getattr(loss, "forward", loss))
    except (TypeError, ValueError):  # implemented in C
        return frozenset()
    behind = list(own.parameters.values())[2:]
    return frozenset(p.name for p in behind if p.name in KNOWN and p.kind is not Parameter.POSITIONAL_ONLY)


def required(loss: Callable[..., Any]) -> frozenset[str]:
    """Those of :func:`wants` without a default."""
    inner = getattr(loss, "loss", None)
    if isinstance(getattr(loss, "wants", None), frozenset) and inner is not None:
        return required(inner)
    names = wants(loss)
    if not names:
        return names
    own = signature(getattr(loss, "forward", loss)).parameters
    return frozenset(name for name in names if own[name].default is Parameter.empty)
