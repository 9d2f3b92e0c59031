"""Types by annotation, ranges by a rule beside it."""

import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from lightning_accel.core.arguments import (
    NOT_EMPTY,
    above,
    at_least,
    below,
    check_fields,
    checked,
    describe,
    fits,
    one_of,
    shown,
    within,
)
from lightning_accel.errors import InvalidArgumentError, InvalidArgumentTypeError


@pytest.mark.parametrize(
    ("hint", "right", "wrong", "words"),
    [
        (int, [1, -1, np.int64(3)], [True, 1.0, "1", None], "an integer"),
        (float, [1, 0.5, np.float32(2), math.inf], [True, math.nan, "0.5", None, 1j], "a number"),
        (bool, [True, False], [0, 1, "yes", None], "True or False"),
        (str, ["", "x"], [b"x", 1, None, Path("x")], "a string"),
        (
            str | list[str] | None,
            [None, "x", ["x"], ("x",), []],
            [1, [1], {"x": 1}],
            "a string, a list of strings or None",
        ),
        (tuple[int, ...], [(1,), [1, 2], ()], [1, "12", (1.5,), {1}], "a list of integers"),
        (Sequence[float], [[1.0], (1,), range(3)], ["abc", 1, [None]], "a list of numbers"),
        (
            dict[str, float],
            [{"a": 1}, {}],
            [[("a", 1)], {1: 1}, {"a": "b"}, {"a": math.nan}],
            "a dict of strings to numbers",
        ),
        (Mapping[str, Any], [{"a": object()}], [{1: 2}, 5], "a dict"),
        (Callable[..., Any], [len, lambda: 0, dict], [1, "len", None], "a function"),
        (Iterable[Any], [[], iter([]), "x", np.zeros(2)], [5, None], "an Iterable"),
        (str | os.PathLike[str], ["x", Path("x")], [5, None], "a string or a path"),
        (type[Exception], [ValueError], [ValueError("x"), "x"], "a type"),
        (Literal["a", "b"], ["a"], ["c", 1], "one of ['a', 'b']"),
        (Path, [Path("x")], ["x"], "a Path"),
        (Any, [None, 1, object()], [], "an Any"),
    ],
)
def test_values_fit_their_annotation(hint, right, wrong, words):
    assert [value for value in right if not fits(value, hint)] == []
    assert [value for value in wrong if fits(value, hint)] == []
    assert describe(hint) == words


@checked(
    count=at_least(1),
    share=below(1),
    mode=one_of("a", "b"),
    rate=above(0),
    names=NOT_EMPTY,
    part=within(0, 100, "percent"),
)
def function(
    count: int = 1,
    share: float = 0.5,
    mode: str = "a",
    rate: float | None = None,
    names: list[str] | None = None,
    part: float = 1,
) -> str:
    """Its own documentation."""
    return "called"


@pytest.mark.parametrize(
    ("given", "kind", "message"),
    [
        ({"count": 0}, ValueError, "Argument `count` must be at least 1, but got 0."),
        ({"count": 2.5}, TypeError, "Argument `count` must be an integer, at least 1, but got 2.5."),
        ({"share": math.nan}, ValueError, "Argument `share` must be from 0 to below 1, but got nan."),
        ({"count": math.nan}, TypeError, "Argument `count` must be an integer, at least 1, but got nan."),
        ({"part": 101}, ValueError, "Argument `part` must be from 0 to 100 percent, but got 101."),
        ({"share": 1.0}, ValueError, "Argument `share` must be from 0 to below 1, but got 1.0."),
        ({"mode": "c"}, ValueError, "Argument `mode` must be one of ['a', 'b'], but got 'c'."),
        ({"rate": math.inf}, ValueError, "Argument `rate` must be above 0 and finite, but got inf."),
        ({"rate": "x"}, TypeError, "Argument `rate` must be a number or None, above 0 and finite, but got 'x'."),
        ({"names": []}, ValueError, "Argument `names` must be not empty, but got []."),
        (
            {"cuont": 1},
            TypeError,
            "function: got an unexpected keyword argument 'cuont'. Its arguments are count, share,",
        ),
    ],
)
def test_messages(given, kind, message):
    with pytest.raises(kind) as error:
        function(**given)
    assert str(error.value).startswith(message)
    assert isinstance(error.value, InvalidArgumentError | InvalidArgumentTypeError)


def test_what_is_right_is_called_and_looks_as_before():
    assert function(3, share=0, mode="b", rate=None, names=["x"]) == "called"
    assert (function.__name__, function.__doc__) == ("function", "Its own documentation.")


def test_a_rule_for_no_argument_is_a_mistake_of_ours():
    with pytest.raises(TypeError, match="no arguments"):
        checked(nothing=NOT_EMPTY)(lambda count: count)


def test_fields():
    @dataclass
    class Settings:
        size: int
        names: tuple[str, ...] = ("a",)

        def __post_init__(self):
            check_fields(self, size=at_least(1), names=NOT_EMPTY)

    Settings(2)
    with pytest.raises(
        InvalidArgumentTypeError, match="Argument `names` must be a list of strings, not empty, but got 'a'"
    ):
        Settings(2, "a")
    with pytest.raises(InvalidArgumentError, match="Argument `size` must be at least 1, but got 0"):
        Settings(0)


def test_a_value_is_shortened_and_its_repr_may_raise():
    class Bad:
        def __repr__(self):
            raise OSError

    assert shown(Bad()) == "Bad (whose repr raises OSError)"
    assert len(shown("x" * 1000)) == 120
