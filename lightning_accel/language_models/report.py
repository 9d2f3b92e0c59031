"""The report of a language model's bundle, as Markdown and as a page."""

from collections.abc import Mapping
from typing import Any

from lightning_accel.reports.markup import tag

_TITLE = "Language model"
_STYLE = (
    "body{font:16px/1.5 system-ui;margin:2rem auto;max-width:80rem;padding:0 1rem}"
    "table{border-collapse:collapse}td,th{padding:.3rem .6rem;border:1px solid #8888;text-align:left}"
)


def _number(value: float | None, digits: str = ".2g") -> str:
    return "" if value is None else format(value, digits)


def rows_of_formats(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison of files with the trained integers."""
    head = ["format", "integers equal", "scales", "float32 activations, error", "MB"]
    rows = [
        [
            name,
            f"{one['equal']:,} of {one['integers']:,}",
            "equal" if one["scales_equal"] else "differ",
            _number(one["float_error"]),
            f"{one['bytes'] / 1e6:.2f}",
        ]
        for name, one in report["formats"].items()
    ]
    return head, rows


def rows_of_engines(report: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the comparison of engines with the trained network."""
    head = ["engine", "file", "logits, error", "log-probabilities, error (nats)", "greedy tokens", "perplexity"]
    head += ["trained", "tokenizer and chat", "batched = single", "adapter", "result"]
    rows = []
    for one in [*report["engines"].values(), *report["failed"].values()]:
        agreement = f"{one['agreement']:.0%}"
        if one["first_difference"] is not None:
            agreement += f", first difference at {one['first_difference']} (margin {_number(one['margin'])})"
        adapter = ""
        if one["adapter_effect"] is not None:
            adapter = f"changes {_number(one['adapter_effect'])}, error {_number(one['adapter_error'])}"
        rows.append(
            [
                one["engine"],
                one["format"],
                _number(one["logit_error"]),
                _number(one["log_probability_error"]),
                agreement,
                _number(one["perplexity"], ".3f"),
                _number(one["reference_perplexity"], ".3f"),
                {True: "equal", False: "differ", None: ""}[one["tokenizer_equal"]],
                "yes" if one["batched_equal"] else "no",
                adapter,
                f"failed: {one['reason']}" if one["reason"] else "passed",
            ]
        )
    return head, rows


def summary_lines(report: Mapping[str, Any]) -> list[str]:
    """Facts in sentences."""
    grid = report["grid"]
    lines = [f"{report['architecture']}: {report['parameters']:,} parameters in float32."]
    if grid is not None:
        share = f"{report['quantized_parameters']:,} of {report['parameters']:,} parameters"
        form = f"{grid['bits']}-bit integers with a scale for each {grid['group']} inputs"
        lines = [f"{report['architecture']}: {share} are {form}."]
    if report["adapters"]:
        lines.append(f"Adapters kept apart: {', '.join(report['adapters'])}.")
    return lines


def render_markdown(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    parts = [f"# {_TITLE}", "", *summary_lines(report)]
    for title, (head, rows) in _tables(report).items():
        lines = [" | ".join(row) for row in [head, ["---"] * len(head), *rows]]
        parts += ["", f"## {title}", "", *(f"| {line} |" for line in lines)]
    machine = report["environment"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["packages"].items())
    return "\n".join(
        [*parts, "", f"{machine['cpu']}, {machine['cores']} cores; Python {machine['python']}; {versions}.", ""]
    )


def _tables(report: Mapping[str, Any]) -> dict[str, tuple[list[str], list[list[str]]]]:
    return {
        "Files: is each integer the trained one?": rows_of_formats(report),
        "Engines: is it what was trained?": rows_of_engines(report),
    }


def render_page(report: Mapping[str, Any]) -> str:
    """The report as one HTML page; all values are escaped."""
    sections = [
        tag("section", tag("h2", title), tag("table", _head(head), *(_row(row) for row in rows)))
        for title, (head, rows) in _tables(report).items()
    ]
    head_part = tag("head", tag("meta", charset="utf-8"), tag("title", _TITLE), tag("style", _STYLE))
    body = tag("body", tag("h1", _TITLE), *(tag("p", line) for line in summary_lines(report)), *sections)
    return "<!doctype html>\n" + tag("html", head_part, body, lang="en") + "\n"


def _head(cells: list[str]) -> Any:
    return tag("tr", *(tag("th", cell) for cell in cells))


def _row(cells: list[str]) -> Any:
    return tag("tr", *(tag("td", cell) for cell in cells))
