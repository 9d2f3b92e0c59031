"""Render the report as one self-contained HTML page, for phones, dark mode and print."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_accel.reports import details, sections
from lightning_accel.reports.facts import Fact, decision_of, facts
from lightning_accel.reports.markup import Markup, join, tag
from lightning_accel.reports.model import INCOMPLETE, QAT_BENEFIT, Report, as_report

_SECTIONS = {
    "comparison": ("Before and after", sections.before_after),
    "variants": ("Runtime variants", sections.variants),
    "previous": ("Since the last bundle", details.previous),
    "classes": ("Class by class", details.classes),
    "flipped": ("Predictions that changed", details.flipped),
    "verification": ("Is it what was trained?", sections.verification),
    "layers": ("Layer by layer", sections.layers),
    "times": ("Time per layer", details.layer_times),
    "training": ("Training", sections.training),
    "engines": ("Engines", sections.engines),
    "making": ("How it was made", sections.making),
    "machine": ("Machine and notes", sections.machine),
}
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def render_html(report: Report | Mapping[str, Any]) -> str:
    """Render the report of a run as a page; empty sections are left out.

    Args:
        report: of a bundle, or the content of its ``report.json``.

    Returns:
        A complete document. All values of the report are escaped.
    """
    report = as_report(report)
    parts = {key: (name, shown) for key, (name, make) in _SECTIONS.items() if (shown := make(report)) is not None}
    links = [tag("li", tag("a", name, href=f"#{key}")) for key, (name, _) in parts.items()]
    body = [
        tag("header", tag("h1", report.title), _status(report)),
        tag(
            "main",
            _summary(report),
            tag("nav", tag("ul", *links), aria_label="Sections"),
            *(tag("section", tag("h2", name), shown, id=key) for key, (name, shown) in parts.items()),
        ),
        tag("footer", "Written by lightning-accel. The same in numbers: report.json."),
    ]
    style = Markup((Path(__file__).with_name("page.css")).read_text(encoding="utf-8"))
    head = [
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        # The page says itself that it fetches nothing: a browser holds it to that.
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("link", rel="icon", href="data:,"),  # or a browser asks the server for one
        tag("title", report.title),
        tag("style", style),
    ]
    return "<!doctype html>\n" + tag("html", tag("head", *head), tag("body", *body), lang="en") + "\n"


def _status(report: Report) -> Markup | None:
    checks = report.verification
    if not checks:
        return None
    if report.notes_of(INCOMPLETE):
        return tag("p", tag("span", "incomplete: targets not reached", class_="chip warn"))
    if not all(check.get("passed") for check in checks):
        return tag("p", tag("span", "not proven", class_="chip warn"))
    worse = report.verdict is not None and not report.verdict.good
    chip = tag("span", "quantization-aware training cost accuracy", class_="chip warn") if worse else None
    return tag("p", tag("span", "proven: what ships is what was trained", class_="chip good"), chip)


def _summary(report: Report) -> Markup:
    found = facts(report)
    decision = decision_of(report)
    return tag(
        "section",
        tag("dl", *map(_card, found), class_="facts") if found else None,
        tag("p", decision, class_="decision") if decision else None,
        *(tag("p", note, class_="lead") for note in report.notes_of(QAT_BENEFIT)),
        id="summary",
        aria_label="Summary",
    )


def _card(fact: Fact) -> Markup:
    value = tag("dd", fact.value, class_="value")
    detail = tag("dd", fact.detail, class_="detail") if fact.detail else None
    return tag("div", join([tag("dt", fact.title), value, detail]), class_="fact" if fact.good else "fact warn")
