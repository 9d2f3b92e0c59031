"""Key facts of a report: the shipped network, its accuracy, size and latency, and its verification."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_accel.reports.model import INCOMPLETE, Report, Row
from lightning_accel.reports.verdict import points, shipped_row, verdict_line


@dataclass(frozen=True)
class Fact:
    """One key fact.

    Args:
        title: topic.
        value: the number or name.
        detail: comparison or context.
        good: ``False`` for what needs a reader's attention.
    """

    title: str
    value: str
    detail: str
    good: bool = True

    def __str__(self) -> str:
        return f"{self.title}: {self.value}" + (f" ({self.detail})" if self.detail else "")


def facts(report: Report) -> list[Fact]:
    """Key facts of a report; empty without rows.

    Args:
        report: of a bundle.
    """
    rows, shipped = report.rows, shipped_row(report)
    if shipped is None:
        return []
    verdict = report.verdict
    first = next((row for row in rows if verdict is not None and row.name == verdict.baseline), rows[0])
    found = [Fact("Ships", shipped.name, verdict_line(report) or shipped.engine or "", verdict is None or verdict.good)]
    if shipped.accuracy is not None:
        detail = _accuracy(shipped, first, None if verdict is None or verdict.score != "accuracy" else points(verdict))
        good = verdict is None or verdict.score != "accuracy" or verdict.high is None or verdict.high >= 0
        found.append(Fact("Accuracy", f"{100 * shipped.accuracy:.2f} %", detail, good))
    if shipped.file_bytes:
        found.append(Fact("Size", size(shipped.file_bytes), _size(shipped, first)))
    if shipped.p50_ms is not None:
        slower = shipped.speedup_high is not None and shipped.speedup_high < 1
        found.append(Fact("Latency", f"{shipped.p50_ms:.3g} ms", _latency(shipped, first, report), not slower))
    else:
        found.append(Fact("Latency", "not measured", shipped.note, good=False))
    if (cost := report.cost_of_a_million(shipped)) is not None:
        before = report.cost_of_a_million(first)
        told = "" if before is None or first is shipped else f"instead of {price(before)} with {first.name}"
        found.append(Fact("Cost of a million", price(cost), told))
    checks = report.verification
    if checks:
        passed = sum(bool(check.get("passed")) for check in checks)
        value = f"{passed} of {len(checks)} comparisons passed"
        found.append(Fact("Proof", value, _proofs(report.proofs), passed == len(checks)))
    waiting = [line for line in report.engines if not line.get("runs_here", True)]
    found += [Fact("Not run here", str(line["engine"]), str(line["status"]), good=False) for line in waiting]
    found += [Fact("Failed", f.engine, _failure(f.reason, f.replaced_by), good=False) for f in report.failed]
    found += [Fact("Incomplete", "targets not reached", reason, good=False) for reason in report.notes_of(INCOMPLETE)]
    if report.benchmark.get("noisy"):
        found.append(Fact("Noise", "too high", "latencies can't be told apart finely on this machine", good=False))
    return found


def _failure(reason: str, replaced_by: str) -> str:
    return f"{reason} The default is {replaced_by} instead." if replaced_by else reason


def decision_of(report: Report) -> str:
    """The decision of the comparison with its reason; empty without one."""
    decision = (report.comparison or {}).get("decision")
    if not decision:
        return ""
    return f"Ship {decision['ship']}: {decision['why']}" if decision["ship"] else str(decision["why"])


def size(count: float) -> str:
    """Bytes in decimal units.

    Example:
        >>> [size(n) for n in (999, 8398, 1_335_452)]
        ['999 B', '8.4 kB', '1.34 MB']
    """
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}" if name != "kB" or count >= 1e5 else f"{count / unit:.1f} {name}"
    return f"{count:g} B"


def price(value: float) -> str:
    """An amount of money with two digits after the point, or two significant ones.

    Example:
        >>> [price(v) for v in (1234.5, 0.5, 0.00123)]
        ['1,234.50', '0.50', '0.0012']
    """
    return f"{value:,.2f}" if value >= 0.1 else f"{value:.2g}"


def cost_line(report: Report) -> str:
    """How the cost of a million samples is computed; empty without a price."""
    if report.price_per_hour is None:
        return ""
    return (
        f"Cost of a million samples: calls with a batch of {report.batch_size}, one after the other, at the median latency measured "
        f"here, on a machine for {price(report.price_per_hour)} an hour; without what the machine does besides."
    )


def _accuracy(shipped: Row, first: Row, change: str | None) -> str:
    parts = []
    if interval := shipped.accuracy_interval:
        parts.append(f"[{100 * interval[0]:.2f}, {100 * interval[1]:.2f}] on {shipped.total:,} held-out samples")
    if first is not shipped and first.accuracy is not None and shipped.accuracy is not None:
        parts.append(f"{change or f'{100 * (shipped.accuracy - first.accuracy):+.2f} points'} to {first.name}")
    return "; ".join(parts)


def _size(shipped: Row, first: Row) -> str:
    if first is shipped or not first.file_bytes or not shipped.file_bytes:
        return ""
    factor = first.file_bytes / shipped.file_bytes
    word, factor = ("smaller", factor) if factor >= 1 else ("larger", 1 / factor)
    return f"{factor:.1f}x {word} than {first.name}"


def _latency(shipped: Row, first: Row, report: Report) -> str:
    where = "" if report.threads is None else f"batch {report.batch_size}, {report.threads} threads"
    if first is shipped or shipped.speedup is None:
        return where
    interval = ""
    if shipped.speedup_low is not None and shipped.speedup_high is not None:
        interval = f" [{shipped.speedup_low:.2f}, {shipped.speedup_high:.2f}]"
    told = f"{shipped.speedup:.2f}x{interval} the speed of {first.name}"
    return f"{told}; {where}" if where else told


def _proofs(proofs: Mapping[str, Any]) -> str:
    parts = []
    if integers := proofs.get("integers"):
        parts.append(f"{integers['integers']:,} integers bit for bit")
    if nodes := proofs.get("nodes"):
        parts.append(f"{nodes['compared']} of {nodes['of']} nodes one by one")
    return ", ".join(parts)
