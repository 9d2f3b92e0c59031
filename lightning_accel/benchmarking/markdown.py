"""Format Markdown tables that are also readable as plain text."""

from collections.abc import Sequence

MISSING = "—"  # a value that was not measured


def markdown_table(titles: Sequence[str], rows: Sequence[Sequence[str]], left: int) -> str:
    """Format an aligned Markdown table; the first ``left`` columns are left-aligned, the others right-aligned."""
    clean = [
        [cell.replace("|", "\\|").replace("<", "\\<").replace("\n", " ") for cell in row] for row in (titles, *rows)
    ]
    widths = [max(3, *map(len, column)) for column in zip(*clean, strict=True)]

    def line(cells: Sequence[str]) -> str:
        padded = (c.ljust(w) if i < left else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True)))
        return f"| {' | '.join(padded)} |"

    rule = [("-" * width if index < left else "-" * (width - 1) + ":") for index, width in enumerate(widths)]
    return "\n".join([line(clean[0]), line(rule), *map(line, clean[1:])])
