"""Inspect which of ``target``, ``mask`` and ``batch`` a loss takes."""

from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any

KNOWN = ("target", "mask", "batch")


def wants(loss: Callable[..., Any]) -> frozenset[str]:
    """Names among ``target``, ``mask`` and ``batch`` that a loss has as parameters behind its first two.

    Args:
        loss: ``(student, teacher, ...)``. A ``torch.nn.Module`` is asked for its ``forward``.

    Returns:
        What to pass by keyword; nothing for a callable without a signature.

    Example:
        >>> sorted(wants(lambda student, teacher, *, batch, mask=None: 0.0))
        ['batch', 'mask']
        >>> sorted(wants(torch.nn.functional.mse_loss))  # its `target` is the teacher's place
        []
    """
    declared = getattr(loss, "wants", None)
    if isinstance(declared, frozenset):
        return declared
    try:
        own = signature(getattr(loss, "forward", loss))
    except (TypeError, ValueError):  # written in C
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
