"""Tables of the page, each scrollable, with a caption and headers for rows and columns."""

from collections.abc import Iterable, Sequence
from typing import Any

from lightning_accel.benchmarking.markdown import MISSING
from lightning_accel.reports.markup import Markup, join, tag


def table(
    caption: str,
    titles: Sequence[str],
    rows: Iterable[Sequence[Any]],
    *,
    text: Sequence[int] = (),
    wide: Sequence[int] = (),
    marked: Sequence[int] = (),
) -> Markup:
    """A table whose first column names the rows.

    Args:
        caption: text above the table.
        titles: of the columns.
        rows: a cell for each column; ``None`` is shown as a dash.
        text: left-aligned text columns.
        wide: text columns that may wrap.
        marked: highlighted rows.
    """
    kinds = dict.fromkeys(text, "text") | dict.fromkeys(wide, "text wide")
    head = tag("tr", *(tag("th", title, scope="col", class_=kinds.get(i)) for i, title in enumerate(titles)))
    body = []
    for number, row in enumerate(rows):
        cells = [MISSING if cell is None or cell == "" else cell for cell in row]
        line = [tag("td", cell, class_=kinds.get(i)) for i, cell in enumerate(cells)]
        line[0] = tag("th", cells[0], scope="row")
        body.append(tag("tr", *line, class_="ships" if number in marked else None))
    whole = tag("table", tag("caption", tag("span", caption)), tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label=caption, tabindex=0)


def under(value: Any, *small: Any) -> Markup | None:
    """A cell with smaller lines below its value; empty ones are left out."""
    lines = [tag("small", line) for line in small if line not in (None, "")]
    return None if value is None and not lines else join([MISSING if value is None else value, *lines])


def passed(good: bool | None) -> Markup | None:
    """Yes or no, with colour and text."""
    return None if good is None else tag("span", "passed" if good else "failed", class_="yes" if good else "no")


def share(value: float | None) -> str | None:
    """A share as per cent with two digits."""
    return None if value is None else f"{100 * value:.2f} %"


def exact(value: float | None) -> str | None:
    """A small number."""
    return None if value is None else f"{value:.1e}" if value else "0"
