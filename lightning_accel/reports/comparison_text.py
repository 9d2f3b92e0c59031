"""A comparison as text: what each way is, how fast it is, what couldn't be run and why, what ships."""

from collections.abc import Sequence
from typing import Any

from lightning_accel.benchmarking.comparison import Comparison, Point, WayResult, null_line
from lightning_accel.benchmarking.decision import resolution
from lightning_accel.benchmarking.markdown import MISSING, markdown_table
from lightning_accel.benchmarking.scores import score_titles


def render_comparison(comparison: Comparison) -> str:
    """Render as plain text that is Markdown too.

    Args:
        comparison: what was measured; ways without a measurement are listed below the tables with the reason.
    """
    shown = [way for way in comparison.ways if way.points]
    parts = [_what(shown, score_titles(comparison.settings)), _speed(shown)] if shown else ["Nothing was measured."]
    parts += ["\n".join(f"- {line}" for line in _lines(comparison))]
    if comparison.decision is not None:
        parts.append(render_decision(comparison))
    return "\n\n".join(parts)


def render_decision(comparison: Comparison) -> str:
    """Render what ships and why, and why each of the others doesn't."""
    assert comparison.decision is not None
    decision = comparison.decision
    limits = ", ".join(f"{name} {value:g}" for name, value in decision["budgets"].items() if value is not None)
    lines = [f"Decision ({limits}): {decision['why']}"]
    refused = [f"- {name}: {reason}" for name, reason in decision["refused"].items()]
    ran = {way.name for way in comparison.ways if way.status == "ran"}
    lines += [line for name, line in zip(decision["refused"], refused, strict=True) if name in ran]
    samples = next((way.samples for way in comparison.ways if way.samples), None)
    if says := resolution(samples, decision["budgets"], comparison.settings.get("scores")):
        lines.append(says)
    return "\n".join([lines[0], *([""] if lines[1:] else []), *lines[1:]])


def _what(ways: Sequence[WayResult], scores: tuple[str, str]) -> str:
    rows = [
        [
            way.name,
            _share(way.accuracy),
            _share(way.agreement),
            _number(way.file_bytes, ","),
            _number(None if way.peak_memory_bytes is None else way.peak_memory_bytes / 1e6, ",.0f"),
            _number(way.first_ms, ",.0f"),
        ]
        for way in ways
    ]
    return markdown_table(["way", *scores, "file, bytes", "memory, MB", "first, ms"], rows, left=1)


def _speed(ways: Sequence[WayResult]) -> str:
    titles = ["way", "batch", "callers", "p50, ms", "p90, ms", "p99, ms", "samples/s", "speed-up [95 %]"]
    keys = dict.fromkeys((point.batch, point.callers) for way in ways for point in way.points)
    rows = [[way.name, *_cells(point)] for key in keys for way in ways if (point := way.point(*key)) is not None]
    return markdown_table(titles, rows, left=1)


def _cells(point: Point) -> list[str]:
    speedup = (
        MISSING
        if point.speedup is None
        else f"{point.speedup:.2f}x [{point.speedup_low:.2f}, {point.speedup_high:.2f}]"
    )
    times = [f"{value:.3f}" for value in (point.p50_ms, point.p90_ms, point.p99_ms)]
    return [str(point.batch), str(point.callers), *times, f"{point.throughput:,.0f}", speedup]


def _lines(comparison: Comparison) -> list[str]:
    settings = comparison.settings
    lines = [f"{way.name}: {way.status}: {way.reason}" for way in comparison.ways if way.status != "ran"]
    lines += [
        f"{way.name}: its kernels don't compute here what the file says: {'; '.join(way.kernels['failures'])}"
        for way in comparison.ways
        if way.kernels is not None and not way.kernels["passed"]
    ]
    if any(way.engine == "pytorch" and way.precision == "int8" and way.points for way in comparison.ways):
        lines.append("pytorch computes the int8 network in float, as it was trained")
    for null in comparison.null["points"]:
        lines.append(null_line(null))
    lines.append(
        f"speed-ups are over {comparison.baseline}; threads of each way: {settings['threads']}, idle ones asleep; each way in a process "
        f"of its own, in turns; load {_load(comparison.environment)}"
    )
    lines.append(f"{settings['data']}; agreement is with {settings['agreement_with']}")
    if comparison.interrupted:
        lines.append("interrupted: what is missing was not measured")
    return lines


def _load(environment: dict[str, Any]) -> str:
    load = environment.get("load_average")
    return "unknown" if load is None else f"{load[0]:g} when it began"


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f} %"


def _number(value: float | None, form: str) -> str:
    return MISSING if value is None else format(value, form)
