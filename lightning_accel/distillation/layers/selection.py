"""Select a tensor from the output of a network or layer, as in ``"encoder[0]"`` or ``"[logits]"``."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lightning_accel.errors import InvalidArgumentError

_PATH = re.compile(r"(?P<module>[^\[\]]*)(?P<keys>(?:\[[^\[\]]+\])*)")


def split_path(path: str, argument: str) -> tuple[str, tuple[int | str, ...]]:
    """Split a path into module path and keys: ``"bert[hidden_states][-1]"`` is ``("bert", ("hidden_states", -1))``.

    Raises:
        InvalidArgumentError: unbalanced brackets.
    """
    match = _PATH.fullmatch(path) if isinstance(path, str) else None
    if match is None:
        raise InvalidArgumentError(
            f"Argument `{argument}` must be a layer path such as 'layer3' or 'encoder[0]', but got {path!r}."
        )
    keys = re.findall(r"\[([^\[\]]+)\]", match["keys"])
    return match["module"], tuple(int(k) if re.fullmatch(r"-?\d+", k) else k.strip("'\"") for k in keys)


def select_tensor(output: Any, keys: Sequence[int | str], path: str, argument: str) -> Tensor:
    """Select the tensor at ``keys`` from a layer's output, or its only tensor.

    Raises:
        InvalidArgumentError: there is no tensor, or several; the message shows how to select one.
    """
    value: Any = output
    for key in keys:
        try:
            by_key = isinstance(value, Mapping) or isinstance(key, int)
            value = value[key] if by_key else getattr(value, str(key))
        except (KeyError, IndexError, TypeError, AttributeError):
            raise InvalidArgumentError(
                f"Argument `{argument}` must select what is there, but got {path!r}, and `[{key}]` isn't in a "
                f"{type(value).__name__} with {_fields(value)}."
            ) from None
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if isinstance(value, Tensor):
        return value
    raise InvalidArgumentError(
        f"Argument `{argument}` must lead to a Tensor, but {path or 'the output'!r} is a {type(value).__name__} with "
        f"{_fields(value)}. Select one: `{argument}='{path}[{_first(value)}]'`."
    )


def selection_of(outputs: Any) -> str | None:
    """Selection of a path given as ``outputs``: ``"[0]"`` of ``"net[0]"``."""
    if not isinstance(outputs, str):
        return None
    return outputs[len(split_path(outputs, "outputs")[0]) :] or None


def logits_in(output: Any, where: Any, argument: str) -> Tensor:
    """Select the logits from a network's output.

    Args:
        output: output of the network.
        where: a callable, a selection such as ``"[logits]"``, or None: a Tensor itself, or its field ``logits``.
        argument: name of the argument, for messages.

    Raises:
        InvalidArgumentError: the logits are ambiguous; the message shows how to select them.
    """
    if isinstance(where, str):
        return select_tensor(output, split_path(where, argument)[1], where, argument)
    return _find_logits(where(output) if callable(where) else output, argument)


def _find_logits(output: Any, argument: str) -> Tensor:
    """Find the logits in the output of a ``forward``: a Tensor itself, or the field ``logits`` of an object or dict.

    Raises:
        InvalidArgumentError: the logits are ambiguous; the message names ``argument``.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(found, Tensor):
        return found
    raise InvalidArgumentError(
        f"Argument `{argument}` must say where the logits are when forward returns neither a Tensor nor something with "
        f"`logits`, but got a {type(output).__name__} with {_fields(output)}. Give a callable or select one: "
        f"`{argument}='[{_first(output)}]'`."
    )


def _keys(value: Any) -> list[Any]:
    if isinstance(value, Mapping):
        return list(value)
    return list(range(len(value))) if isinstance(value, list | tuple) else []


def _fields(value: Any) -> str:
    return ", ".join(f"[{key}]" for key in _keys(value)) or "no fields"


def _first(value: Any) -> Any:
    return next(iter(_keys(value)), 0)
