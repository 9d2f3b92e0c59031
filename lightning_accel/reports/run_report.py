"""The comparison as a table, and the report of a run as Markdown."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lightning_accel.benchmarking.comparison import Comparison
from lightning_accel.benchmarking.markdown import MISSING, markdown_table
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.reports.comparison_text import render_comparison
from lightning_accel.reports.details_text import details_text
from lightning_accel.reports.model import LayerTable, Report, Row, as_report


def comparison_table(rows: Sequence[Row]) -> str:
    """One line for each row, readable as plain text and as Markdown; notes below.

    Args:
        rows: the variants; the first is the one that speed-ups refer to.

    Raises:
        InvalidArgumentError: no rows.
    """
    if not rows:
        raise InvalidArgumentError("Argument `rows` must have at least one row, but got none.")
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    columns: list[tuple[str, Callable[[Row], str | None]]] = [
        ("engine", lambda row: row.engine),
        ("accuracy [95 %]", _accuracy),
        *((name, lambda row, name=name: _number(row.metrics.get(name), ".4f")) for name in metrics),
        ("parameters", lambda row: _number(row.parameters, ",")),
        ("file, bytes", lambda row: _number(row.file_bytes, ",")),
        ("p50, ms", lambda row: _number(row.p50_ms, ".3f")),
        ("p90, ms", lambda row: _number(row.p90_ms, ".3f")),
        ("speed-up [95 %]", lambda row: "1.00x" if row is rows[0] and row.p50_ms is not None else _speedup(row)),
    ]
    notes: list[str] = []
    cells: list[list[str]] = []
    for row in rows:
        values = [value(row) for _, value in columns]
        note = row.note or ("" if None not in values else "not measured: " + _absent(columns, values))
        if note and note not in notes:
            notes.append(note)
        mark = f" [{notes.index(note) + 1}]" if note else ""
        cells.append([row.name + mark, *(MISSING if value is None else value for value in values)])
    table = markdown_table(["name", *(title for title, _ in columns)], cells, left=2)
    return "\n".join([table, *([""] if notes else []), *(f"[{i}] {note}" for i, note in enumerate(notes, 1))])


def render_markdown(report: Report | Mapping[str, Any], summary: Sequence[str] = ()) -> str:
    """Render the report of a run as Markdown; empty sections are left out.

    Args:
        report: of a bundle, or the content of its ``report.json``.
        summary: lines at the beginning.
    """
    report = as_report(report)
    parts = [f"# {report.title}"]
    if summary:
        parts.append("\n".join(f"- {line}" for line in summary))
    if report.command:
        parts.append(f"```\n{report.command}\n```")
    if report.rows:
        parts += ["## Comparison", comparison_table(report.rows)]
    if report.verdict is not None and report.verdict.refused:
        parts += ["\n".join(f"- {name} doesn't ship: {why}." for name, why in report.verdict.refused.items())]
    parts += details_text(report)
    if report.verification:
        parts += ["## Verification", _records(map(_readable, report.verification))]
    if report.engines:
        parts += ["## Engines", _records(report.engines)]
    if report.comparison:
        parts += ["## Runtime variants", render_comparison(Comparison.from_dict(report.comparison))]
    if report.layers:
        parts += ["## Compression, measured", _nested({table.title: _whole(table) for table in report.layers})]
    if report.quantization:
        parts += ["## Quantization, operator by operator", _nested(report.quantization)]
    if run := report.run:
        parts += ["## The run", f"```\n{run['command']}\n```"]
        parts += (
            [f"```yaml\n{run['config'].strip()}\n```"] if run.get("config") else [_nested(run.get("settings") or {})]
        )
    for title, lines in (("Phases", report.phases), ("Notes", [note.line for note in report.notes])):
        if lines:
            parts += [f"## {title}", "\n".join(f"- {line}" for line in lines)]
    if report.environment:
        parts += ["## Environment", _nested(report.environment)]
    statuses = {str(e["status"]) for e in report.engines if e.get("engine") == "tensorrt" and "status" in e}
    parts += [f"TensorRT: {status}" for status in sorted(statuses)]
    return "\n\n".join(parts) + "\n"


def _whole(table: LayerTable) -> dict[str, Any]:
    return table.values if table.total is None else {**table.values, "all": table.total}


def _readable(line: Mapping[str, Any]) -> dict[str, Any]:
    """An entry of the verification for a table, with nested values as text."""
    words = {
        "batch_sizes": lambda v: ", ".join(f"{size} ({count})" for size, count in v.items()),
        "tolerance": lambda v: f"median {v['median']:g}, max {v['maximum']:g}, agreement {v['agreement']:g}",
        "metric": lambda v: ", ".join(f"{name} {a:.4f} -> {b:.4f}" for name, (a, b) in v.items()),
        "outputs": lambda v: ", ".join(f"{name} ({line['kind']})" for name, line in v.items()),
    }
    titles = {"batch_sizes": "batch sizes (samples)", "metric": "metric, PyTorch -> engine"}
    return {titles.get(k, k): words[k](v) if k in words else v for k, v in line.items()}


def _accuracy(row: Row) -> str | None:
    if row.accuracy is None:
        return None
    interval = row.accuracy_interval
    text = f"{100 * row.accuracy:.2f} %"
    return text if interval is None else f"{text} [{100 * interval[0]:.2f}, {100 * interval[1]:.2f}]"


def _speedup(row: Row) -> str | None:
    if row.speedup is None:
        return None
    if row.speedup_low is None or row.speedup_high is None:
        return f"{row.speedup:.2f}x"
    return f"{row.speedup:.2f}x [{row.speedup_low:.2f}, {row.speedup_high:.2f}]"


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _absent(columns: Sequence[tuple[str, Any]], values: Sequence[str | None]) -> str:
    titles = (title for (title, _), value in zip(columns, values, strict=True) if value is None)
    return ", ".join(title.removesuffix(" [95 %]").partition(",")[0] for title in titles)


def _records(entries: Iterable[Mapping[str, Any]]) -> str:
    """Table with a column for each key that any entry has."""
    entries = list(entries)
    keys = list(dict.fromkeys(key for entry in entries for key in entry))
    return markdown_table(
        [key.replace("_", " ") for key in keys],
        [[plain(entry[key]) if entry.get(key) is not None else MISSING for key in keys] for entry in entries],
        left=1,
    )


def _nested(values: Mapping[str, Any], indent: str = "") -> str:
    lines = []
    for key, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}- {_in_line(key)}", _nested(value, indent + "  ")]
        else:
            lines.append(f"{indent}- {_in_line(key)}: {MISSING if value is None else _in_line(plain(value))}")
    return "\n".join(lines)


def _in_line(text: str) -> str:
    """Escape a user's name or value for a list item: no line breaks and no tags."""
    return " ".join(str(text).split("\n")).replace("<", "\\<")


def plain(value: Any) -> str:
    """A value as text, numbers with four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return ", ".join(f"{name} {plain(v)}" for name, v in value.items()) if isinstance(value, Mapping) else str(value)
