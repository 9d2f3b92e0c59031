"""Build HTML and SVG; everything that isn't markup already is escaped."""

from collections.abc import Iterable
from html import escape
from typing import Any

_VOID = ("br", "hr", "img", "meta", "link", "col")


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def tag(name: str, /, *children: Any, **attributes: Any) -> Markup:
    """An element.

    Args:
        name: of the element.
        children: markup, or anything else, whose text is escaped; ``None`` is left out.
        attributes: ``class_`` is written ``class``, further underscores as hyphens; ``None`` and ``False`` are left out, ``True``
            is written without a value.

    Example:
        >>> tag("p", "1 < 2", class_="note")
        '<p class="note">1 &lt; 2</p>'
    """
    pairs = ((key.rstrip("_").replace("_", "-"), value) for key, value in attributes.items())
    written = [
        key if value is True else f'{key}="{escape(_text(value))}"'
        for key, value in pairs
        if value is not None and value is not False
    ]
    opening = " ".join([name, *written])
    if name in _VOID:
        return Markup(f"<{opening}>")
    return Markup(f"<{opening}>{join(children)}</{name}>")


def join(parts: Iterable[Any]) -> Markup:
    """Concatenate markup; other values are escaped."""
    return Markup("".join(p if isinstance(p, Markup) else escape(_text(p)) for p in parts if p is not None))


def _text(value: Any) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
