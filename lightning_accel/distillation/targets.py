"""Find targets and padding masks in a batch."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from lightning_accel.errors import InvalidArgumentError

Where = Callable[[Any], Tensor] | str | int | None

_TARGETS = ("labels", "label", "target", "targets", "y")
_MASKS = ("attention_mask",)  # "mask" may be the target of a segmentation


def find(batch: Any, where: Where, argument: str) -> Tensor | None:
    """Find the target or mask of a batch.

    Args:
        batch: batch of ``training_step``.
        where: a callable of the batch; a key or attribute; an index; ``None``: a common name in a dict, and for the target
            the last element of a sequence, if it holds integers.
        argument: ``"target"`` or ``"mask"``.

    Returns:
        The tensor; ``None`` if ``where`` is None and there is none.

    Raises:
        InvalidArgumentError: ``where`` is given and doesn't exist.
    """
    if where is None:
        return _usual(batch, argument)
    try:
        if callable(where):
            found = where(batch)
        elif isinstance(where, str) and not isinstance(batch, Mapping):
            found = getattr(batch, where)
        else:
            found = batch[where]
    except (KeyError, IndexError, TypeError, AttributeError):
        found = None
    if not isinstance(found, Tensor):
        raise InvalidArgumentError(
            f"Argument `{argument}` must lead to a Tensor in a batch, but got {where!r}, which leads to a "
            f"{type(found).__name__} in a {type(batch).__name__}{_keys(batch)}."
        )
    return found


def usual_target(batch: Any) -> Tensor | None:
    """The target under a usual name or in the usual place, of any dtype; ``None`` if there is none."""
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in _TARGETS if name in batch), None)
    else:
        found = batch[-1] if isinstance(batch, list | tuple) and len(batch) > 1 else None
    return found if isinstance(found, Tensor) else None


def _usual(batch: Any, argument: str) -> Tensor | None:
    names = _TARGETS if argument == "target" else _MASKS
    if isinstance(batch, Mapping):
        found = next((batch[name] for name in names if name in batch), None)
    elif argument == "target" and isinstance(batch, list | tuple) and len(batch) > 1:
        found = batch[-1]
    else:
        found = None
    if not isinstance(found, Tensor) or (argument == "target" and found.is_floating_point()):
        return None
    return found


def _keys(batch: Any) -> str:
    return f" with {', '.join(map(str, batch))}" if isinstance(batch, Mapping) else ""


def fits(mask: Tensor, values: Tensor) -> bool:
    """Whether a mask matches the positions of logits or features.

    Args:
        mask: ``(N, T)`` or ``(N, H, W)``.
        values: ``(N, T, C)``, ``(N, C, H, W)``, ``(N, heads, T, T)``; or any shape that starts with the mask's.
    """
    if values.ndim > mask.ndim and values.shape[: mask.ndim] == mask.shape:
        return True
    if values.ndim == mask.ndim + 1 and (values.shape[0], *values.shape[2:]) == mask.shape:
        return True
    return values.ndim == 4 and mask.ndim == 2 and (values.shape[0], values.shape[3]) == mask.shape
