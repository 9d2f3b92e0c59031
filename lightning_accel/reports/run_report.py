"""The comparison as a table, and the report of a run as Markdown."""

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from lightning_accel.benchmarking.comparison import Comparison
from lightning_accel.benchmarking.markdown import MISSING, markdown_table
from lightning_accel.benchmarking.scores import Z95
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.reports.comparison_text import render_comparison


@dataclass
class Row:
    """One variant in the comparison; ``None`` is a value that was not measured.

    Attributes:
        name: e.g. ``"student int8"``.
        engine: what ran it, e.g. ``"onnxruntime"``.
        accuracy: share of correct predictions on held-out samples, in [0, 1]. Default: ``correct / total``.
        correct: held-out samples predicted correctly.
        total: held-out samples.
        metrics: further metrics by name, e.g. the user's own.
        parameters: number of parameters.
        file_bytes: size of the file in bytes.
        p50_ms: median latency in ms.
        p90_ms: 90th percentile of the latency in ms.
        speedup: time of the first row divided by the time of this one, as measured.
        speedup_low: lower end of its 95 % interval.
        speedup_high: upper end of its 95 % interval.
        note: printed below the table.
    """

    name: str
    engine: str | None = None
    accuracy: float | None = None
    correct: int | None = None
    total: int | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    parameters: int | None = None
    file_bytes: int | None = None
    p50_ms: float | None = None
    p90_ms: float | None = None
    speedup: float | None = None
    speedup_low: float | None = None
    speedup_high: float | None = None
    note: str = ""

    def __post_init__(self) -> None:
        if self.correct is not None and self.total is not None:
            wilson_interval(self.correct, self.total)  # checks both
            share = self.correct / self.total
            if self.accuracy is None:
                self.accuracy = share
            elif not math.isclose(self.accuracy, share, abs_tol=5e-5):  # a metric computed in float32 may round
                raise InvalidArgumentError(
                    f"Argument `accuracy` must be correct / total = {share:.6f}, but got {self.accuracy:.6f}."
                )
        if self.accuracy is not None and not 0 <= self.accuracy <= 1:
            raise InvalidArgumentError(f"Argument `accuracy` must be in [0, 1], but got {self.accuracy}.")

    @property
    def accuracy_interval(self) -> tuple[float, float] | None:
        """95 % interval of the accuracy; ``None`` without the counts."""
        return None if self.correct is None or self.total is None else wilson_interval(self.correct, self.total)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values; ``Row(**values)`` is this row again."""
        return asdict(self)


def wilson_interval(correct: int, total: int) -> tuple[float, float]:
    """95 % `Wilson score interval <https://doi.org/10.1080/01621459.1927.10502953>`_ of a proportion.

    Unlike the normal approximation it stays within [0, 1] and holds near 0 and 1, where accuracies are.

    Args:
        correct: number of successes.
        total: number of trials.

    Raises:
        InvalidArgumentError: ``total`` below 1, or ``correct`` outside 0 to ``total``.

    Example:
        >>> low, high = wilson_interval(970, 1000)
        >>> f"{low:.4f} {high:.4f}"
        '0.9575 0.9789'
    """
    if total < 1:
        raise InvalidArgumentError(f"Argument `total` must be at least 1, but got {total}.")
    if not 0 <= correct <= total:
        raise InvalidArgumentError(f"Argument `correct` must be from 0 to {total}, but got {correct}.")
    share, z2 = correct / total, Z95**2
    center = (share + z2 / (2 * total)) / (1 + z2 / total)
    half = Z95 / (1 + z2 / total) * math.sqrt(share * (1 - share) / total + z2 / (4 * total**2))
    return (0.0 if correct == 0 else center - half), (1.0 if correct == total else center + half)


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


def render_markdown(report: Mapping[str, Any]) -> str:
    """Render the report of a run; a section appears only where there is something to say.

    Args:
        report: ``title``, ``summary`` (lines), ``command`` (that repeats the export), ``rows`` (dicts of :class:`Row`),
            ``verification``, ``engines``, ``compression`` and ``quantization`` (see ``report.json``), ``phases``,
            ``run``, ``environment``, ``notes``.
    """
    parts = [f"# {report.get('title') or 'Report'}"]
    if lines := report.get("summary"):
        parts.append("\n".join(f"- {line}" for line in lines))
    if command := report.get("command"):
        parts.append(f"```\n{command}\n```")
    if rows := report.get("rows"):
        parts += ["## Comparison", comparison_table([row if isinstance(row, Row) else Row(**row) for row in rows])]
    for title, key in (("Verification", "verification"), ("Engines", "engines")):
        if entries := report.get(key):
            parts += [f"## {title}", _records(entries)]
    if comparison := report.get("comparison"):
        parts += ["## Runtime variants", render_comparison(Comparison.from_dict(comparison))]
    if compression := report.get("compression"):
        parts += ["## Compression, measured", _nested(compression)]
    if quantization := report.get("quantization"):
        parts += ["## Quantization, operator by operator", _nested(quantization)]
    if run := report.get("run"):
        parts += ["## The run", f"```\n{run['command']}\n```"]
        parts += (
            [f"```yaml\n{run['config'].strip()}\n```"] if run.get("config") else [_nested(run.get("settings") or {})]
        )
    for title, key in (("Phases", "phases"), ("Notes", "notes")):
        if lines := report.get(key):
            parts += [f"## {title}", "\n".join(f"- {line}" for line in ([lines] if isinstance(lines, str) else lines))]
    if machine := report.get("environment"):
        parts += ["## Environment", _nested(machine)]
    statuses = {
        str(e["status"]) for e in report.get("engines") or [] if e.get("engine") == "tensorrt" and "status" in e
    }
    parts += [f"TensorRT: {status}" for status in sorted(statuses)]
    return "\n\n".join(parts) + "\n"


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
    """Names and values of the user's in a list: they start no paragraph and no tag, which a page would swallow."""
    return " ".join(str(text).split("\n")).replace("<", "\\<")


def plain(value: Any) -> str:
    """A value in words, numbers with four digits."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        return ", ".join(map(plain, value))
    return json.dumps(value) if isinstance(value, Mapping) else str(value)
