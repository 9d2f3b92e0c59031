"""Assemble the verdict of a bundle: what ships and why, against one baseline."""

from typing import Any

from lightning_accel.export.candidates import Candidates
from lightning_accel.export.default_rule import Choice
from lightning_accel.export.quality import change, monitored
from lightning_accel.export.spec import ExportSpec
from lightning_accel.reports.model import Report, Verdict


def with_budgets(choice: Choice, decision: dict[str, Any] | None, baseline: str) -> Choice:
    """The choice within budgets, with its reason; the other one if nothing fits or was decided.

    Args:
        choice: without budgets.
        decision: see :func:`~lightning_accel.benchmarking.decision.choose_variant`.
        baseline: variant that the others are compared with.
    """
    if decision is None:
        return choice
    if decision["ship"] is None:
        return Choice(choice.ships, f"since no variant fits the budgets; otherwise {choice.why}", choice.refused)
    why = (
        "since no variant within the budgets is clearly faster"
        if decision["ship"] == baseline
        else "the fastest variant within the budgets"
    )
    return Choice(choice.ships, why)


def verdict_of(candidates: Candidates, choice: Choice, report: Report, spec: ExportSpec) -> Verdict:
    """The verdict on the network that ships.

    Args:
        candidates: measured.
        choice: what ships and why.
        report: its row that ships is known.
        spec: the export.
    """
    rows = candidates.rows
    baseline = next(
        (name for name in ("teacher", candidates.float32) if name in rows and rows[name].p50_ms is not None), ""
    )
    scores = candidates.scores
    found = None
    if baseline in scores and report.ships in scores and baseline != report.ships:
        found = change(scores[baseline], scores[report.ships], monitored(getattr(spec.data.trainer, "callbacks", ())))
    refused = {label: refusal.reason for label, refusal in choice.refused.items()}
    lost = candidates.gained is not None and candidates.gained.worse
    if found is None:
        return Verdict(choice.why, baseline, good=not lost, refused=refused)
    return Verdict(
        choice.why,
        baseline,
        found.score,
        found.value,
        found.low,
        found.high,
        good=not lost,
        refused=refused,
    )
