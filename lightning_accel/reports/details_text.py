"""What decides, as Markdown: since the last bundle, class by class, predictions that changed, and time per layer."""

from collections.abc import Sequence

from lightning_accel.benchmarking.markdown import MISSING, markdown_table
from lightning_accel.reports.model import Report

_MOST = 30


def details_text(report: Report) -> list[str]:
    """Headings and tables; those without content are left out."""
    return [*_previous(report), *_classes(report), *_flipped(report), *_layer_times(report)]


def _previous(report: Report) -> list[str]:
    found = report.previous
    if not found:
        return []
    title = "## Since the last bundle"
    if "reason" in found:
        return [title, f"Not compared with {_text(found['path'])}: {_text(found['reason'])}."]
    before, now = found["row"], found["now"]
    rows = [["p50, ms", f"{before['p50_ms']:.3f}", f"{now['p50_ms']:.3f}", f"{now['speedup']:.2f}x the speed"]]
    if found.get("change") is not None:
        change = f"{100 * found['change']:+.2f} points [{100 * found['low']:+.2f}, {100 * found['high']:+.2f}]"
        rows.insert(0, ["accuracy", _share(before["accuracy"]), _share(now["accuracy"]), change])
    rows.append(["file, bytes", f"{before['file_bytes']:,}", f"{now['file_bytes']:,}", ""])
    return [title, markdown_table(["", "before", "now", "change"], rows, left=1)]


def _classes(report: Report) -> list[str]:
    found = report.classes
    if not found:
        return []
    present = [i for i, value in enumerate(found["accuracy"]) if value is not None]
    lowest = sorted(present, key=lambda i: found["accuracy"][i])[:_MOST]
    before: Sequence[float | None] = found.get("baseline_accuracy") or [None] * len(found["names"])
    rows = [
        [_text(found["names"][i]), _share(found["accuracy"][i]), _share(before[i]), f"{sum(found['confusion'][i]):,}"]
        for i in (sorted(lowest) if len(present) <= _MOST else lowest)
    ]
    table = markdown_table(["class", "accuracy", _text(found.get("baseline", "baseline")), "samples"], rows, left=1)
    return ["## Class by class", table]


def _flipped(report: Report) -> list[str]:
    found = report.flipped
    if not found:
        return []
    return [
        "## Predictions that changed",
        f"{found['count']:,} of {found['samples']:,} held-out samples are predicted otherwise than by {_text(found['baseline'])}: "
        f"{found['better']:,} are right now, {found['worse']:,} were right before, {found['neither']:,} are wrong both times.",
    ]


def _layer_times(report: Report) -> list[str]:
    found = report.layer_times
    if not found:
        return []
    rows = [
        [_text(layer["name"]), _text(layer["kind"]), f"{layer['ms']:.4f}", f"{layer['share']:.1%}"]
        for layer in found["layers"][:_MOST]
    ]
    return ["## Time per layer", markdown_table(["operator", "kind", "ms", "share"], rows, left=2)]


def _share(value: float | None) -> str:
    return MISSING if value is None else f"{100 * value:.2f} %"


def _text(text: str) -> str:
    """A name for a cell or a sentence: in one line, without tags."""
    return " ".join(str(text).split("\n")).replace("<", "\\<").replace("|", "\\|")
