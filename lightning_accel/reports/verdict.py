"""The verdict of a run in one sentence: what ships, why, its cost and benefit against one baseline, and what was not run."""

from collections.abc import Sequence

from lightning_accel.reports.model import Report, Row, Verdict


def verdict_line(report: Report) -> str:
    """What ships, why, what it cost in accuracy and brought in speed against one baseline, and what was not run.

    The baseline is the teacher if there is one, else float32 of the same network.

    Args:
        report: of a bundle.

    Returns:
        One sentence; empty for a report without a verdict.
    """
    verdict, shipped = report.verdict, shipped_row(report)
    if verdict is None or shipped is None:
        return ""
    engine = "" if shipped.engine is None or shipped.name.endswith(f", {shipped.engine}") else f" ({shipped.engine})"
    parts = [f"Ships {shipped.name}{engine}, {verdict.why}", _against(report, shipped, verdict)]
    if waiting := [str(line["engine"]) for line in report.engines if not line.get("runs_here", True)]:
        parts.append(f"not run on this machine: {', '.join(waiting)}")
    if report.failed:
        parts.append(f"failed: {', '.join(failure.engine for failure in report.failed)}")
    return "; ".join(part for part in parts if part) + "."


def shipped_row(report: Report) -> Row | None:
    """The row of the network that ships; the last one if none has that name, ``None`` without rows."""
    rows = report.rows
    return next((row for row in rows if row.name == report.ships), rows[-1] if rows else None)


def _against(report: Report, shipped: Row, verdict: Verdict) -> str:
    """Accuracy, speed and size of the shipped network against the baseline."""
    baseline = next((row for row in report.rows if row.name == verdict.baseline), None)
    if shipped.p50_ms is None:
        return "neither its accuracy nor its speed was measured"
    if baseline is None or baseline is shipped:
        return "" if shipped.accuracy is None else f"accuracy {100 * shipped.accuracy:.2f} %"
    told = [_score(shipped, baseline, verdict), *_times(shipped, baseline)]
    return f"against {baseline.name}: {', '.join(filter(None, told))}"


def _score(shipped: Row, baseline: Row, verdict: Verdict) -> str:
    if verdict.change is None:
        return "of unknown accuracy"
    if verdict.score == "accuracy" and shipped.accuracy is not None:
        return f"accuracy {100 * shipped.accuracy:.2f} % ({points(verdict)})"
    one, two = baseline.metrics.get(verdict.score), shipped.metrics.get(verdict.score)
    return f"`{verdict.score}` {two:.4g} instead of {one:.4g}" if one is not None and two is not None else ""


def points(verdict: Verdict) -> str:
    """Change of accuracy in percentage points with its 95 % interval."""
    return f"{100 * (verdict.change or 0):+.2f} points {_ends(verdict.low, verdict.high, 100, '+.2f')}"


def _ends(low: float | None, high: float | None, factor: float, form: str) -> str:
    return "" if low is None or high is None else f"[{factor * low:{form}}, {factor * high:{form}}]"


def _times(shipped: Row, baseline: Row) -> Sequence[str]:
    told = []
    if shipped.speedup is not None:
        told.append(
            f"{shipped.speedup:.2f}x {_ends(shipped.speedup_low, shipped.speedup_high, 1, '.2f')} its speed".replace(
                "  ", " "
            )
        )
    if shipped.file_bytes and baseline.file_bytes:
        factor = baseline.file_bytes / shipped.file_bytes
        told.append(f"{factor:.1f}x smaller" if factor >= 1 else f"{1 / factor:.1f}x larger")
    return told
