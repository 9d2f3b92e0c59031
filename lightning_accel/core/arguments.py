"""Check arguments once, when a function is called: the type by its annotation, the range by a rule beside it."""

import collections.abc
import inspect
import math
import numbers
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

from lightning_accel.errors import InvalidArgumentError, InvalidArgumentTypeError

_P = ParamSpec("_P")
_R = TypeVar("_R")
_LONGEST = 120  # characters of a value in a message


@dataclass(frozen=True)
class Rule:
    """A range.

    Args:
        text: completes "must be ...": ``"at least 1"``.
        holds: whether a value of the right type lies in it.
    """

    text: str
    holds: Callable[[Any], bool]


def at_least(least: float) -> Rule:
    """Numbers from ``least`` on."""
    return Rule(f"at least {least:g}", lambda value: value >= least)


def below(most: float, least: float = 0) -> Rule:
    """Numbers from ``least`` to just below ``most``."""
    return Rule(f"from {least:g} to below {most:g}", lambda value: least <= value < most)


def within(least: float, most: float, what: str = "") -> Rule:
    """Numbers from ``least`` to ``most``, with their unit."""
    return Rule(f"from {least:g} to {most:g}{f' {what}' if what else ''}", lambda value: least <= value <= most)


def above(least: float) -> Rule:
    """Finite numbers above ``least``."""
    return Rule(f"above {least:g} and finite", lambda value: least < value < math.inf)


def one_of(*names: str) -> Rule:
    """Some strings."""
    return Rule(f"one of {list(names)}", lambda value: value in names)


NOT_EMPTY = Rule("not empty", lambda value: not hasattr(value, "__len__") or len(value) > 0)  # a Path has no length
FOLDER = Rule(
    "the path of a folder, not empty and without a NUL character",
    lambda value: bool(os.fspath(value).strip()) and "\0" not in os.fspath(value),
)
JSON = Rule("values that JSON can hold, with strings as keys and without NaN", lambda value: _is_json(value))


def checked(**rules: Rule) -> Callable[[Callable[_P, _R]], Callable[_P, _R]]:
    """Decorate a function or constructor whose arguments are checked at each call.

    The type comes from the annotation, and is strict: a bool is no number, a string no path unless it says so, and NaN is no value. A
    rule applies to an argument that isn't ``None``.

    Args:
        rules: ranges by argument.

    Raises:
        InvalidArgumentTypeError: in the call, a value of another type, or an argument that the function doesn't have.
        InvalidArgumentError: in the call, a value out of its range.

    Example:
        >>> @checked(count=at_least(1))
        ... def repeat(word: str, count: int = 2) -> str:
        ...     return word * count
        >>> repeat("a", 0)
        Traceback (most recent call last):
        lightning_accel.errors.InvalidArgumentError: Argument `count` must be at least 1, but got 0.
    """

    def decorate(function: Callable[_P, _R]) -> Callable[_P, _R]:
        signature = inspect.signature(function)
        if unknown := rules.keys() - signature.parameters.keys():
            raise TypeError(f"{function.__qualname__} has no arguments {sorted(unknown)}")

        @wraps(function)
        def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError as error:
                name = function.__qualname__.removesuffix(".__init__")
                accepted = [p for p in signature.parameters if p != "self"]
                raise InvalidArgumentTypeError(f"{name}: {error}. Its arguments are {', '.join(accepted)}.") from None
            check_arguments(function, bound.arguments, **rules)
            return function(*args, **kwargs)

        return call

    return decorate


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any], **rules: Rule) -> None:
    """Check values by the annotations of a function; values without an annotation pass.

    Args:
        function: whose annotations apply.
        given: values by argument.
        rules: ranges by argument.

    Raises:
        InvalidArgumentTypeError: a value of another type.
        InvalidArgumentError: a value out of its range.
    """
    hints = _hints(function)
    for name, value in given.items():
        if name in hints:
            check_value(name, value, hints[name], rules.get(name))


def check_fields(instance: Any, **rules: Rule) -> None:
    """Check the fields of a dataclass by their annotations, for ``__post_init__``; as :func:`check_arguments`."""
    check_arguments(type(instance), {n: v for n, v in vars(instance).items() if not n.startswith("_")}, **rules)


def check_value(name: str, value: Any, hint: Any, rule: Rule | None = None) -> None:
    """Check one value.

    Args:
        name: of the argument.
        value: what was passed.
        hint: its type.
        rule: its range.

    Raises:
        InvalidArgumentTypeError: another type.
        InvalidArgumentError: out of its range.
    """
    if not fits(value, hint):
        wanted = f"{describe(hint)}{f', {rule.text}' if rule else ''}"
        if isinstance(value, numbers.Real) and value != value and fits(0.5, hint):  # NaN: out of every range
            raise InvalidArgumentError(
                f"Argument `{name}` must be {rule.text if rule else wanted}, but got {shown(value)}."
            )
        raise InvalidArgumentTypeError(f"Argument `{name}` must be {wanted}, but got {shown(value)}.")
    if rule is not None and value is not None and not rule.holds(value):
        raise InvalidArgumentError(f"Argument `{name}` must be {rule.text}, but got {shown(value)}.")


def shown(value: Any) -> str:
    """A value for a message, shortened."""
    try:
        text = repr(value)
    except Exception as error:  # somebody's own `__repr__`
        text = f"{type(value).__name__} (whose repr raises {type(error).__name__})"
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


@cache
def _hints(function: Callable[..., Any]) -> Mapping[str, Any]:
    return typing.get_type_hints(inspect.unwrap(function), include_extras=False)


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of an annotation, its elements included.

    Example:
        >>> fits(True, int), fits(1, float), fits(float("nan"), float), fits(["a"], str | list[str])
        (False, True, False, True)
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any or isinstance(hint, TypeVar):
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, one) for one in arguments)
    if origin is typing.Literal:
        return value in arguments
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, numbers.Integral) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and value == value
    return _fits_container(value, origin or hint, arguments)


def _fits_container(value: Any, kind: Any, arguments: tuple[Any, ...]) -> bool:
    """Whether a value is of a class, or a container of the right elements."""
    if kind is collections.abc.Callable:
        return callable(value)
    if kind in (list, tuple, collections.abc.Sequence):
        elements = [one for one in arguments if one is not Ellipsis] or [Any]
        right = isinstance(value, list | tuple) or (kind is collections.abc.Sequence and _is_sequence(value))
        return right and all(fits(item, elements[0]) for item in value)
    if kind in (dict, collections.abc.Mapping):
        key, item = arguments or (Any, Any)
        return isinstance(value, Mapping) and all(fits(k, key) and fits(v, item) for k, v in value.items())
    if kind is type:
        return isinstance(value, type)
    if kind is collections.abc.Iterable:
        return isinstance(value, Iterable) or hasattr(value, "__getitem__")
    if kind is os.PathLike:
        return isinstance(value, os.PathLike)
    return not isinstance(kind, type) or _is_protocol(kind) or isinstance(value, _classes(kind))


def _is_json(value: Any) -> bool:
    """Whether JSON gives a value back as it was, but for tuples; and its text can be written as UTF-8."""
    if isinstance(value, Mapping):
        return all(isinstance(key, str) and _is_json(key) and _is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(_is_json, value))
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode() == value
    if type(value) is float:
        return math.isfinite(value)
    return value is None or type(value) in (bool, int)


def _is_sequence(value: Any) -> bool:
    return isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes)


def _is_protocol(kind: type) -> bool:
    return bool(getattr(kind, "_is_protocol", False))


def _classes(kind: type) -> tuple[type, ...]:
    """A class and its twin in ``pytorch_lightning``, whose modules and Trainers are taken, too."""
    ours = "lightning.pytorch."
    if not kind.__module__.startswith(ours):
        return (kind,)
    other = sys.modules.get(f"pytorch_lightning.{kind.__module__.removeprefix(ours)}")
    twin = getattr(other, kind.__name__, kind)
    return kind, twin


def describe(hint: Any) -> str:
    """An annotation in words.

    Example:
        >>> describe(str | list[str] | None)
        'a string, a list of strings or None'
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    words = {bool: "True or False", int: "an integer", float: "a number", str: "a string", type(None): "None"}
    if hint in words:
        return words[hint]
    if origin in (typing.Union, types.UnionType):
        parts = list(dict.fromkeys(describe(one) for one in arguments))
        return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} or {parts[-1]}"
    if origin is typing.Literal:
        return f"one of {list(arguments)}"
    kind = origin or hint
    if kind is collections.abc.Callable:
        return "a function"
    if kind in (list, tuple, collections.abc.Sequence):
        elements = [one for one in arguments if one not in (Ellipsis, Any)]
        return f"a list of {_plural(describe(elements[0]))}" if elements else "a list"
    if kind in (dict, collections.abc.Mapping):
        known = [one for one in arguments if one is not Any]
        return f"a dict of {' to '.join(_plural(describe(one)) for one in arguments)}" if len(known) == 2 else "a dict"
    if kind is os.PathLike:
        return "a path"
    name = getattr(kind, "__name__", str(kind))
    return f"{'an' if name[:1] in 'AEIOUaeiou' else 'a'} {name}"


def _plural(text: str) -> str:
    first, _, rest = text.partition(" ")
    return f"{rest}s" if first in ("a", "an") and " " not in rest else text
