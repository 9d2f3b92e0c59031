import pytest

from lightning_accel.core.globs import as_patterns, select

NAMES = ["body.0.weight", "body.1.weight", "head.weight"]


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ((), (), NAMES),
        (("body.*",), (), NAMES[:2]),
        ((), ("head.*",), NAMES[:2]),
        (("*.weight",), ("body.0.*",), NAMES[1:]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    assert select(NAMES, include, exclude) == expected


@pytest.mark.parametrize("argument", ["include", "exclude"])
def test_a_glob_without_a_match_is_an_error_that_lists_the_names(argument):
    globs = {"include": (), "exclude": ()} | {argument: ("neck.*",)}
    with pytest.raises(ValueError, match=rf"Argument `{argument}` must match .* 'neck.\*', .*body.0.weight"):
        select(NAMES, **globs)


def test_patterns():
    assert as_patterns("include", None) == ()
    assert as_patterns("include", "a.*") == ("a.*",)
    with pytest.raises(ValueError, match="Argument `include` must be a name glob"):
        as_patterns("include", [1])
