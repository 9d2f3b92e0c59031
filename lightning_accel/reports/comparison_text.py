"""A comparison as text: what each variant is, how fast it is, what couldn't be run and why, what ships."""

from collections.abc import Sequence
from typing import Any

from lightning_accel.benchmarking.comparison import Comparison, LatencyPoint, VariantResult, null_line
from lightning_accel.benchmarking.decision import resolution
from lightning_accel.benchmarking.markdown import MISSING, markdown_table
from lightning_accel.benchmarking.scores import score_titles


def render_comparison(comparison: Comparison) -> str:
    """Render as plain text that is Markdown too.

    Args:
        comparison: what was measured; variants without a measurement are listed below the tables with the reason.
    """
    shown = [variant for variant in comparison.variants if variant.points]
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
    ran = {variant.name for variant in comparison.variants if variant.status == "ran"}
    lines += [line for name, line in zip(decision["refused"], refused, strict=True) if name in ran]
    samples = next((variant.samples for variant in comparison.variants if variant.samples), None)
    if says := resolution(samples, decision["budgets"], comparison.settings.get("output_kind")):
        lines.append(says)
    return "\n".join([lines[0], *([""] if lines[1:] else []), *lines[1:]])


def _what(variants: Sequence[VariantResult], scores: tuple[str, str]) -> str:
    rows = [
        [
            variant.name,
            _share(variant.accuracy),
            _share(variant.agreement),
            _number(variant.file_bytes, ","),
            _number(None if variant.peak_memory_bytes is None else variant.peak_memory_bytes / 1e6, ",.0f"),
            _number(variant.first_ms, ",.0f"),
        ]
        for variant in variants
    ]
    return markdown_table(["variant", *scores, "file, bytes", "memory, MB", "first, ms"], rows, left=1)


def _speed(variants: Sequence[VariantResult]) -> str:
    titles = ["variant", "batch", "callers", "p50, ms", "p90, ms", "p99, ms", "samples/s", "speed-up [95 %]"]
    keys = dict.fromkeys((point.batch, point.callers) for variant in variants for point in variant.points)
    rows = [
        [variant.name, *_cells(point)]
        for key in keys
        for variant in variants
        if (point := variant.point(*key)) is not None
    ]
    return markdown_table(titles, rows, left=1)


def _cells(point: LatencyPoint) -> list[str]:
    speedup = (
        MISSING
        if point.speedup is None
        else f"{point.speedup:.2f}x [{point.speedup_low:.2f}, {point.speedup_high:.2f}]"
    )
    times = [f"{value:.3f}" for value in (point.p50_ms, point.p90_ms, point.p99_ms)]
    return [str(point.batch), str(point.callers), *times, f"{point.throughput:,.0f}", speedup]


def _lines(comparison: Comparison) -> list[str]:
    settings = comparison.settings
    lines = [
        f"{variant.name}: {variant.status}: {variant.reason}"
        for variant in comparison.variants
        if variant.status != "ran"
    ]
    lines += [
        f"{variant.name}: its kernels diverge from the file on this machine: {'; '.join(variant.kernels['failures'])}"
        for variant in comparison.variants
        if variant.kernels is not None and not variant.kernels["passed"]
    ]
    if any(
        variant.engine == "pytorch" and variant.precision == "int8" and variant.points
        for variant in comparison.variants
    ):
        lines.append("pytorch computes the int8 network in float, as it was trained")
    for null in comparison.null["points"]:
        lines.append(null_line(null))
    lines.append(
        f"speed-ups are over {comparison.baseline}; threads of each variant: {settings['threads']}, idle ones asleep; each variant in a "
        f"process of its own, in turns; load {_load(comparison.environment)}"
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
