"""Sections for decision makers: class by class, what changed in predictions, since the last bundle, and time per layer."""

from typing import Any

from lightning_accel.reports.facts import size
from lightning_accel.reports.markup import Markup, join, tag
from lightning_accel.reports.model import Report
from lightning_accel.reports.svg import bar
from lightning_accel.reports.tables import share, table, under

_MOST_CLASSES, _MOST_PAIRS, _MOST_LAYERS = 30, 20, 25


def classes(report: Report) -> Markup | None:
    """Accuracy of each class, and the confusion matrix; of many classes the worst, and the most frequent confusions."""
    found = report.classes
    if not found:
        return None
    names, matrix, accuracy = found["names"], found["confusion"], found["accuracy"]
    before = found.get("baseline_accuracy") or [None] * len(names)
    present = [i for i, value in enumerate(accuracy) if value is not None]
    chosen = sorted(present, key=lambda i: accuracy[i])[:_MOST_CLASSES] if len(present) > _MOST_CLASSES else present
    rows = [
        [
            names[i],
            bar(accuracy[i], f"{100 * accuracy[i]:.1f} %"),
            share(before[i]),
            None if before[i] is None else f"{100 * (accuracy[i] - before[i]):+.2f}",
            f"{sum(matrix[i]):,}",
        ]
        for i in chosen
    ]
    which = (
        f"The {len(chosen)} classes with the lowest accuracy of {len(present)}"
        if len(chosen) < len(present)
        else "Accuracy"
    )
    caption = f"{which} of {found['network']}, by class."
    baseline = found.get("baseline", "baseline")
    titles = ["class", "accuracy", baseline, "change, points", "samples"]
    return join([table(caption, titles, rows, text=(1,)), _confusion(names, matrix)])


def _confusion(names: list[str], matrix: list[list[int]]) -> Markup:
    if len(names) > _MOST_CLASSES:
        pairs = [(count, i, j) for i, line in enumerate(matrix) for j, count in enumerate(line) if i != j and count]
        rows = [
            [f"{names[i]} taken for {names[j]}", f"{count:,}"]
            for count, i, j in sorted(pairs, reverse=True)[:_MOST_PAIRS]
        ]
        return table("The most frequent confusions.", ["confusion", "samples"], rows)
    lines = []
    for i, line in enumerate(matrix):
        total = max(sum(line), 1)
        cells = [_shaded(count, count / total, i == j) for j, count in enumerate(line)]
        lines.append([names[i], *cells])
    return table("Confusion matrix: rows are the true classes, columns the predictions.", ["", *names], lines)


def _shaded(count: int, part: float, right: bool) -> Markup | str:
    if not count:
        return "0"
    return tag("span", f"{count:,}", class_="right" if right else "wrong", style=f"--part:{100 * part:.0f}%")


def flipped(report: Report) -> Markup | None:
    """Predictions that aren't the float32 network's, and some of the samples."""
    found = report.flipped
    if not found:
        return None
    names = report.classes.get("names") or []

    def name(index: int) -> str:
        return names[index] if index < len(names) else str(index)

    told = tag(
        "p",
        f"{found['count']:,} of {found['samples']:,} held-out samples are predicted otherwise than by {found['baseline']}: "
        f"{found['better']:,} are right now, {found['worse']:,} were right before, {found['neither']:,} are wrong both times.",
        class_="lead",
    )
    cards = []
    for line in found.get("shown", []):
        picture = line.get("picture")
        shown = tag("img", src=picture, alt=f"sample {line['index']}", width=96) if picture else None
        verdict = (
            "better" if line["after"] == line["label"] else "worse" if line["before"] == line["label"] else "neither"
        )
        text = f"{name(line['before'])} → {name(line['after'])}"
        small = tag("small", f"sample {line['index']}, is {name(line['label'])}")
        cards.append(tag("li", shown, tag("b", text), small, class_=f"flip {verdict}"))
    hint = None
    if not cards and found["count"]:
        hint = tag("p", "ModelExport(flipped=12) shows some of them; they are part of your data.", class_="lead")
    return join([told, tag("ul", *cards, class_="flips") if cards else None, hint])


def previous(report: Report) -> Markup | None:
    """What changed since the earlier bundle."""
    found = report.previous
    if not found:
        return None
    if "reason" in found:
        return tag("p", f"Not compared with the bundle at {found['path']}: {found['reason']}.", class_="lead")
    before, now = found["row"], found["now"]
    rows = [["ships", found.get("ships"), report.ships, None]]
    if found.get("change") is not None:
        interval = f"{100 * found['low']:+.2f} to {100 * found['high']:+.2f}"
        change = under(f"{100 * found['change']:+.2f} points", interval)
        rows.append(["accuracy", share(before["accuracy"]), share(now["accuracy"]), change])
        rows.append(["equal predictions", None, share(found["same"]), None])
    speed = None if now["speedup_low"] is None else f"{now['speedup_low']:.2f} to {now['speedup_high']:.2f}"
    times = [f"{row['p50_ms']:.3f}" for row in (before, now)]
    rows.append(["p50, ms", *times, under(f"{now['speedup']:.2f}x the speed", speed)])
    sizes = (before["file_bytes"], now["file_bytes"])
    rows.append(["size", size(sizes[0]), size(sizes[1]), f"{sizes[1] / sizes[0]:.2f}x"])
    caption = f"The bundle at {found['path']}, written by {found['version']}, beside this one: both ran in turns on the same held-out data."
    shown = table(caption, ["", "before", "now", "change"], rows)
    phases = found.get("phases") or []
    lines = [tag("li", f"before: {line}") for line in phases if line not in report.phases]
    lines += [tag("li", f"now: {line}") for line in report.phases if line not in phases]
    return join([shown, tag("ul", *lines, class_="notes") if lines else None])


def layer_times(report: Report) -> Markup | None:
    """Where the time of a call goes."""
    found: dict[str, Any] = report.layer_times
    if not found:
        return None
    all_layers = found["layers"]
    rows = [
        [layer["name"], layer["kind"], f"{layer['ms']:.4f}", bar(layer["share"], f"{layer['share']:.1%}")]
        for layer in all_layers[:_MOST_LAYERS]
    ]
    if rest := all_layers[_MOST_LAYERS:]:
        part = sum(layer["share"] for layer in rest)
        rows.append(
            [f"{len(rest)} others", None, f"{sum(layer['ms'] for layer in rest):.4f}", bar(part, f"{part:.1%}")]
        )
    caption = (
        f"ONNX Runtime's profile of {found['file']}: batch {found['batch']}, {found['threads']} threads, median of {found['calls']} calls; "
        "profiling costs time itself, and fused operators count as one."
    )
    return table(caption, ["operator", "kind", "ms", "share of a call"], rows, text=(1, 3))
