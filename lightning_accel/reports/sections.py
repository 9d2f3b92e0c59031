"""Render the sections of the page; an empty section is ``None``."""

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_accel.benchmarking.comparison import null_line
from lightning_accel.benchmarking.pareto import ParetoPoint, pareto_front
from lightning_accel.benchmarking.scores import score_titles
from lightning_accel.reports.facts import cost_line, price, size
from lightning_accel.reports.layers import layers_of, totals_of
from lightning_accel.reports.markup import Markup, join, tag
from lightning_accel.reports.model import Report, Row
from lightning_accel.reports.run_report import plain
from lightning_accel.reports.svg import bar, curve, pareto_plot
from lightning_accel.reports.tables import exact, passed, share, table, under

_MOST_CURVES = 24


def before_after(report: Report) -> Markup | None:
    """The table of networks, and accuracy against latency and size."""
    rows = report.rows
    if not rows:
        return None
    metrics = list(dict.fromkeys(name for row in rows for name in row.metrics))
    million = [report.cost_of_a_million(row) for row in rows]
    priced = any(cost is not None for cost in million)
    # On a phone the first columns are in sight: what a network is worth, and how much faster it is.
    scored = ["accuracy", *metrics] if any(row.accuracy is not None for row in rows) or not metrics else metrics
    titles = ["network", scored[0], "speed-up", *scored[1:], "p50, ms", "p90, ms", "size", "parameters"]
    titles += ["cost of a million"] if priced else []
    lines = []
    for row, cost in zip(rows, million, strict=True):
        interval, speed = row.accuracy_interval, (row.speedup_low, row.speedup_high)
        cells: dict[str, Any] = {name: _number(row.metrics.get(name), ".4f") for name in metrics}
        cells["accuracy"] = under(
            share(row.accuracy), None if interval is None else _interval(*(100 * end for end in interval))
        )
        lines.append(
            [
                under(row.name, row.engine, row.note),
                cells[scored[0]],
                under(_times(row.speedup), None if None in speed or row is rows[0] else _interval(*speed)),
                *(cells[name] for name in scored[1:]),
                _number(row.p50_ms, ".3f"),
                _number(row.p90_ms, ".3f"),
                None if row.file_bytes is None else size(row.file_bytes),
                _number(row.parameters, ","),
                *([None if cost is None else price(cost)] if priced else []),
            ]
        )
    ships = [index for index, row in enumerate(rows) if row.name == report.ships]
    caption = f"Accuracy on held-out data; speed-ups are over {rows[0].name}. Intervals are 95 %."
    shown = table(caption, titles, lines, marked=ships)
    refused = None if report.verdict is None else report.verdict.refused
    others = (
        table("Networks that don't ship, and why.", ["network", "reason"], refused.items(), wide=(1,))
        if refused
        else None
    )
    told = tag("p", cost_line(report), class_="lead") if priced else None
    return join([shown, told, others, _plots(_points_of_rows(rows, report.ships), "networks")])


def variants(report: Report) -> Markup | None:
    """The comparison of runtime variants."""
    comparison = report.comparison
    if not comparison:
        return None
    found = comparison["variants"]
    ran = [variant for variant in found if variant["status"] == "ran"]
    decision = comparison.get("decision") or {}
    parts: list[Any] = []
    parts += [tag("p", f"{null_line(point)}.", class_="lead") for point in comparison["null"]["points"]]
    lines: list[list[Any]] = []
    marked: list[int] = []
    for variant in ran:
        for place, point in enumerate(variant.get("points") or [{}]):
            marked += [len(lines)] if variant["name"] == decision.get("ship") else []
            once = place == 0  # what doesn't depend on batch and callers stands in the first line
            itself = variant["name"] == comparison["baseline"]
            ends = (None, None) if itself else (point.get("speedup_low"), point.get("speedup_high"))
            lines.append(
                [
                    variant["name"],
                    point.get("batch"),
                    point.get("callers"),
                    _number(point.get("p50_ms"), ".3f"),
                    _number(point.get("p90_ms"), ".3f"),
                    _number(point.get("p99_ms"), ".3f"),
                    _number(point.get("throughput"), ",.0f"),
                    under(_times(point.get("speedup")), None if None in ends else _interval(*ends)),
                    under(share(variant.get("accuracy")), _of(variant.get("samples"))) if once else "",
                    share(variant.get("agreement")) if once else "",
                    size(variant["file_bytes"]) if once and variant.get("file_bytes") else "",
                    size(variant["peak_memory_bytes"]) if once and variant.get("peak_memory_bytes") else "",
                    _number(variant.get("first_ms"), ".0f") if once else "",
                ]
            )
    titles = ["variant", "batch", "callers", "p50, ms", "p90, ms", "p99, ms", "samples/s", "speed-up"]
    scores = score_titles(comparison["settings"])
    titles += [*scores, "size", "memory, peak", "first call, ms"]
    if lines:
        caption = f"Speed-ups are over {comparison['baseline']}."
        parts += [
            table(caption, titles, lines, marked=marked),
            _plots(_points_of_variants(ran, comparison), "variants", scores[0], _limits(comparison)),
        ]
    if left := [variant for variant in found if variant["status"] != "ran"]:
        rows = [[variant["name"], variant["status"], variant.get("reason")] for variant in left]
        parts.append(
            table("Variants without numbers, and why.", ["variant", "status", "reason"], rows, text=(1,), wide=(2,))
        )
    if refused := decision.get("refused"):
        parts.append(table("Variants that don't ship, and why.", ["variant", "reason"], refused.items(), wide=(1,)))
    return join(parts)


def training(report: Report) -> Markup | None:
    """Logged metrics over the phases of the run."""
    points = report.curves
    if not points:
        return None
    metrics: dict[str, list[tuple[float, float]]] = {}
    for point in points:
        for name, value in point["metrics"].items():
            metrics.setdefault(name, []).append((point["epoch"] + 1, value))
    last = points[-1]
    epoch_of = (last["epoch"] + 1) / max(last["step"], 1)
    spans = [(span.phase, span.start * epoch_of, (span.end or last["step"]) * epoch_of) for span in report.timeline]
    legend = [tag("li", tag("span", class_=f"swatch c{i % 6}"), name) for i, (name, _, _) in enumerate(spans)]
    figures = [
        tag("figure", tag("h3", name), curve(values, name, spans), tag("figcaption", f"{name}, by epoch"))
        for name, values in list(metrics.items())[:_MOST_CURVES]
    ]
    rest = list(metrics)[_MOST_CURVES:]
    more = tag("p", f"Not drawn, in report.json: {', '.join(rest)}.", class_="lead") if rest else None
    return join(
        [tag("ul", *legend, class_="legend") if legend else None, tag("div", *figures, class_="plots small"), more]
    )


def layers(report: Report) -> Markup | None:
    """Each layer: channels, zeros, int8 or float with the reason."""
    found = layers_of(report)
    if not found:
        return None
    rows = []
    for name, layer in found.items():
        zeros = None if layer.zeros is None else bar(layer.zeros, f"{layer.zeros:.1%}")
        precision: Any = layer.precision or None
        if layer.precision:
            word, _, why = layer.precision.partition(": ")
            chip = tag("span", word, class_="chip good" if word == "int8" else "chip warn")
            precision = join([chip, f" {why}" if why else None])
        rows.append([name, layer.channels, zeros, precision])
    caption = "; ".join(f"{title}: {text}" for title, text in totals_of(report).items()) or "Each layer"
    return table(caption, ["layer", "channels", "zeros", "computed in"], rows, text=(2,), wide=(1, 3))


def verification(report: Report) -> Markup | None:
    """Comparisons with the trained network, the errors, and their distribution."""
    checks = report.verification
    if not checks:
        return None
    rows = []
    for check in checks:
        limit = check.get("tolerance") or {}
        metric = [
            f"{name}: {a:.4f} in PyTorch, {b:.4f} in the engine" for name, (a, b) in (check.get("metric") or {}).items()
        ]
        notes = [plain(check[key]) for key in ("note", "first_divergence", "failures") if check.get(key)]
        outputs = check.get("outputs") or {}
        each = [_output(name, line) for name, line in outputs.items()] if len(outputs) > 1 else []
        rows.append(
            [
                under(check["engine"], *metric, *each, *notes),
                passed(check.get("passed")),
                check.get("samples"),
                under(exact(check.get("median_error")), _limit("at most", exact(limit.get("median")))),
                under(exact(check.get("p99_error")), _limit("at most", exact(limit.get("p99")))),
                under(exact(check.get("max_error")), _limit("at most", exact(limit.get("maximum")))),
                under(share(check.get("agreement")), _limit("at least", share(limit.get("agreement")))),
            ]
        )
    titles = ["compared with the trained network", "result", "samples", "median error", "99 %", "largest", "agreement"]
    shown = table("Errors are shares of the output's range; below each its limit.", titles, rows, text=(1,))
    spread = [check for check in checks if check.get("distribution")]
    if not spread:
        return shown
    shares = list(dict.fromkeys(key for check in spread for key in check["distribution"]))
    lines = [[check["engine"], *(exact(check["distribution"].get(key)) for key in shares)] for check in spread]
    caption = "Divergence: that share of all errors is at most as large."
    return join([shown, table(caption, ["compared", *shares], lines)])


def _output(name: str, line: Mapping[str, Any]) -> str:
    """One output of several: what it holds, and its largest error or the share of equal values."""
    if "equal" in line:
        return f"{name} ({line['kind']}): {share(line['equal'])} equal"
    return f"{name} ({line['kind']}): largest error {exact(line.get('maximum'))}"


def engines(report: Report) -> Markup | None:
    """Engines in the bundle, and whether they ran on this machine."""
    found = report.engines
    if not found:
        return None
    keys = ("engine", "status", "precision", "file", "library", "version")
    rows = [[line.get(key) for key in keys] for line in found]
    told = [tag("p", f"{line['engine']}: {line['decision']}") for line in found if line.get("decision")]
    commands = [
        join([tag("h3", f"{line['engine']}, with the vendor's own tool"), tag("pre", line["command"], tabindex=0)])
        for line in found
        if line.get("command")
    ]
    return join([table("Engines in the bundle", list(keys), rows, text=(1, 2, 3, 4, 5)), *told, *commands])


def making(report: Report) -> Markup | None:
    """Command and configuration of the run, and the command that repeats the export."""
    run = report.run
    parts: list[Any] = []
    if run.get("command"):
        parts += [tag("h3", "The run"), tag("pre", run["command"], tabindex=0)]
    if report.command:
        parts += [tag("h3", "The export again"), tag("pre", report.command, tabindex=0)]
    if run.get("config"):
        parts += [tag("h3", "Configuration"), tag("pre", run["config"], tabindex=0, aria_label="configuration")]
    settings = [
        [f"{owner}: {name}", plain(v)] for owner, of in (run.get("settings") or {}).items() for name, v in of.items()
    ]
    if settings:
        parts.append(table("Settings", ["setting", "value"], settings, wide=(1,)))
    if phases := report.phases:
        parts += [tag("h3", "Phases"), tag("ul", *(tag("li", line) for line in phases), class_="notes")]
    return join(parts) if parts else None


def machine(report: Report) -> Markup | None:
    """The machine, and further notes."""
    parts: list[Any] = []
    if report.environment:
        rows = [[name.replace("_", " "), _words(value)] for name, value in report.environment.items()]
        parts.append(table("Where it was measured", ["", "value"], rows, wide=(1,)))
    if report.notes:
        parts += [tag("h3", "Notes"), tag("ul", *(tag("li", note.line) for note in report.notes), class_="notes")]
    return join(parts) if parts else None


def _limits(comparison: Mapping[str, Any]) -> dict[str, float | None]:
    """Budgets of the decision, where they lie in the plots: latency in ms, size in bytes, and the lowest score as a share."""
    budgets = (comparison.get("decision") or {}).get("budgets") or {}
    base: Mapping[str, Any] = next((v for v in comparison["variants"] if v["name"] == comparison["baseline"]), {})
    drop, score = budgets.get("max_drop"), base.get("accuracy")
    lowest = None if drop is None or score is None else score - drop / 100
    return {"latency": budgets.get("max_latency_ms"), "size": budgets.get("max_bytes"), "score": lowest}


def _plots(
    points: Mapping[str, Sequence[ParetoPoint]],
    what: str,
    score: str = "accuracy",
    limits: Mapping[str, float | None] | None = None,
) -> Markup | None:
    """The two Pareto plots with their keys; a plot needs two points."""
    figures = []
    for cost, of in points.items():
        if len(of) < 2:
            continue
        front = pareto_front(of)
        keys = [
            tag("li", tag("b", point.number), point.name, " ships" if point.ships else None, _on(point, front))
            for point in of
        ]
        title = f"{score.capitalize()} against {cost.partition(',')[0]}"
        figures.append(
            tag(
                "figure",
                tag("h3", title),
                pareto_plot(
                    of,
                    f"{title} of the {what}",
                    cost,
                    score,
                    (limits or {}).get(cost.partition(",")[0]),
                    (limits or {}).get("score"),
                ),
                tag("ul", *keys, class_="keys"),
                tag(
                    "figcaption",
                    "Filled and along the dashed line: no other is both better and cheaper. Bars: 95 %."
                    + (" Dotted: the budgets." if any((limits or {}).values()) else ""),
                ),
            )
        )
    return tag("div", *figures, class_="plots") if figures else None


def _on(point: ParetoPoint, front: Sequence[ParetoPoint]) -> str:
    return " (front)" if point in front else ""


def _points_of_rows(rows: Sequence[Row], ships: str) -> dict[str, list[ParetoPoint]]:
    found: dict[str, list[ParetoPoint]] = {"latency, ms (p50)": [], "size, bytes": []}
    for number, row in enumerate(rows, 1):
        if row.accuracy is None:
            continue
        low, high = row.accuracy_interval or (row.accuracy, row.accuracy)
        name = f"{row.name}, {row.engine}" if row.engine and row.engine not in row.name else row.name
        for title, cost in zip(found, (row.p50_ms, row.file_bytes), strict=True):
            if cost:
                found[title].append(ParetoPoint(str(number), name, cost, row.accuracy, low, high, row.name == ships))
    return found


def _points_of_variants(
    ran: Sequence[Mapping[str, Any]], comparison: Mapping[str, Any]
) -> dict[str, list[ParetoPoint]]:
    """Points at the batch size of the decision, or else the largest, with the fewest callers."""
    decision = comparison.get("decision") or {}
    measured = [(point["batch"], point["callers"]) for variant in ran for point in variant.get("points") or ()]
    batch, callers = max(measured, key=lambda key: (key[0], -key[1]), default=(1, 1))
    batch = (decision.get("budgets") or {}).get("batch") or batch
    found: dict[str, list[ParetoPoint]] = {f"latency, ms (p50, batch {batch})": [], "size, bytes": []}
    for number, variant in enumerate(ran, 1):
        accuracy = variant.get("accuracy")
        points = [p for p in variant.get("points") or () if (p["batch"], p["callers"]) == (batch, callers)]
        if accuracy is None or not points:
            continue
        costs = (points[0].get("p50_ms"), variant.get("file_bytes"))
        for title, cost in zip(found, costs, strict=True):
            if cost:
                ships = variant["name"] == decision.get("ship")
                found[title].append(
                    ParetoPoint(str(number), variant["name"], cost, accuracy, accuracy, accuracy, ships)
                )
    return found


def _number(value: float | None, form: str) -> str | None:
    return None if value is None else format(value, form)


def _times(value: float | None) -> str | None:
    return None if value is None else f"{value:.2f}x"


def _interval(low: float | None, high: float | None) -> str:
    return f"{low:.2f} to {high:.2f}"


def _limit(word: str, value: str | None) -> str | None:
    return None if value is None else f"{word} {value}"


def _of(samples: int | None) -> str | None:
    return None if samples is None else f"of {samples:,}"


def _words(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {plain(v)}" for name, v in value.items())
    return "unknown" if value is None else plain(value)
