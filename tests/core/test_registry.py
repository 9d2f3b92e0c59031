"""Objects by name: what a name belongs to, and what other distributions add."""

import pytest

from lightning_accel.core.registry import Registry
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.engines.registry import TEXT_ENGINES, engine_entry
from tests.support.distributions import install

GROUP = "lightning_accel.tested"
SQUARE = "a square, from a distribution"  # the object of an entry point below


@pytest.fixture
def shapes():
    return Registry("shape", GROUP, ["line"], lambda name: f"a {name}", str)


def test_names_in_order(shapes, tmp_path, monkeypatch):
    shapes.register("circle", "a circle")
    install(tmp_path, "more", GROUP, square="tests.core.test_registry:SQUARE")
    monkeypatch.syspath_prepend(tmp_path)
    assert list(shapes) == ["line", "square", "circle"]
    assert [shapes.find(name) for name in shapes] == ["a line", SQUARE, "a circle"]
    assert dict(shapes.registered) == {"circle": "a circle"}


def test_a_name_belongs_to_one_object(shapes, tmp_path, monkeypatch):
    install(tmp_path, "more", GROUP, square="tests.core.test_registry:SQUARE")
    monkeypatch.syspath_prepend(tmp_path)
    shapes.register("line", "a line")  # the same again
    shapes.register("square", SQUARE)
    shapes.register("circle", "a circle")
    shapes.register("circle", "a circle")
    for name in ("line", "square", "circle"):
        with pytest.raises(InvalidArgumentError, match=f"`name` must be one that no other shape has, but got '{name}'"):
            shapes.register(name, "another")
        with pytest.raises(
            InvalidArgumentError, match=f"`shape` must have a name that no other shape has, but got '{name}'"
        ):
            shapes.register(name, "another", "shape")
    shapes.unregister("circle")
    assert shapes.find("circle") is None
    with pytest.raises(InvalidArgumentError, match=r"`name` must be one of \['square'\], but got 'line'"):
        shapes.unregister("line")


def test_a_missing_name_is_refused_with_the_nearest(shapes):
    shapes.register("circle", "a circle")
    with pytest.raises(
        InvalidArgumentError,
        match=r"`form` must be one of \['circle', 'line'\], but got 'cirle'. Did you mean 'circle'\? Draw it.$",
    ):
        shapes.get("cirle", "form", " Draw it.")
    with pytest.raises(InvalidArgumentError, match=r"`forms` must hold some of \['circle', 'line'\], but got 'x'.$"):
        shapes.get("x", "forms")
    with pytest.raises(InvalidArgumentError, match="but got None"):
        shapes.get(None, "form")


@pytest.mark.parametrize(
    ("path", "says"), [("no_such_module:X", "No module named"), ("tests.core.test_registry:GROUPS", "has no attribute")]
)
def test_a_broken_entry_point_is_reported_once(shapes, path, says, tmp_path, monkeypatch):
    install(tmp_path, "bad", GROUP, broken=path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.warns(UserWarning, match=f"Entry point `broken` of group `{GROUP}` can't be loaded: .*{says}"):
        assert shapes.find("broken") is None
    assert shapes.find("broken") is None
    assert list(shapes) == ["line"]


def test_an_entry_point_of_another_type_is_reported(tmp_path, monkeypatch):
    install(tmp_path, "bad", GROUP, square="tests.core.test_registry:SQUARE")
    monkeypatch.syspath_prepend(tmp_path)
    for expected, wanted in ((int, "of type int"), (None, "callable")):
        with pytest.warns(UserWarning, match=f"it must be {wanted}, but it is 'a square"):
            assert Registry("shape", GROUP, (), str, expected).find("square") is None


def test_a_text_engine_of_another_distribution(tmp_path, monkeypatch):
    install(tmp_path, "more", TEXT_ENGINES.group, mine="tests.core.test_registry:MINE")
    monkeypatch.syspath_prepend(tmp_path)
    assert engine_entry("mine") is MINE
    assert list(TEXT_ENGINES)[-1] == "mine"


MINE = type(engine_entry("vllm"))("mine", "gguf", "model.gguf", "numpy", "mine", "mine.engine:Engine")
