"""Inline SVG for the page: Pareto plots, curves and bars."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_accel.benchmarking.pareto import ParetoPoint, pareto_front
from lightning_accel.reports.axes import Axis, axis_of, short
from lightning_accel.reports.markup import Markup, join, tag

_WIDTH, _LEFT, _RIGHT = 360.0, 46.0, 12.0
_NEAR = 11.0  # markers closer than this share a number
_FEW = 30.0  # a factor between costs beyond which the axis is logarithmic


def pareto_plot(
    points: Sequence[ParetoPoint],
    title: str,
    cost: str,
    score: str = "accuracy",
    most: float | None = None,
    least: float | None = None,
) -> Markup:
    """Accuracy against a cost, with the front marked; filled points are on it.

    Args:
        points: at least one; costs above 0.
        title: title of the plot.
        cost: title of the horizontal axis.
        score: name of the score.
        most: largest cost within the budget, drawn as a line.
        least: lowest score within the budget, as a share, drawn as a line.
    """
    height, top, bottom = 264.0, 14.0, 42.0
    costs = [*(point.cost for point in points), *([] if most is None else [most])]
    x = axis_of(costs, _LEFT, _WIDTH - _RIGHT, zero=True)
    if max(costs) > _FEW * min(costs):
        x = axis_of(costs, _LEFT, _WIDTH - _RIGHT, log=True)
    scores = [*(v for p in points for v in (p.low, p.high)), *([] if least is None else [least])]
    y = axis_of([100 * v for v in scores], height - bottom, top)
    front = pareto_front(points)
    marks = []
    for point in sorted(points, key=lambda p: p in front):
        px = x(point.cost)
        bar = tag("line", x1=px, x2=px, y1=y(100 * point.low), y2=y(100 * point.high), class_="interval")
        marks.append(bar)
    for number, members in _groups(points, x, y):
        first = members[0]
        kind = "on" if any(member in front for member in members) else "off"
        kind += " ships" if any(member.ships for member in members) else ""
        names = ", ".join(member.name for member in members)
        px, py = x(first.cost), y(100 * first.accuracy)
        wide = 8 + 3.2 * max(len(number) - 1, 0)
        marks.append(
            tag(
                "g",
                tag("title", f"{names}: {100 * first.accuracy:.2f} %, {short(first.cost)}"),
                tag("rect", x=px - wide, y=py - 8, width=2 * wide, height=16, rx=8, class_=f"point {kind}"),
                tag("text", number, x=px, y=py + 3.6, class_=f"number {kind}", text_anchor="middle"),
            )
        )
    path = _steps([(x(p.cost), y(100 * p.accuracy)) for p in front], _WIDTH - _RIGHT)
    line = tag("path", d=path, class_="front")
    names = ", ".join(point.name for point in front)
    says = f"{title}. On the front: {names}."
    lines = []
    if most is not None:
        lines.append(tag("line", x1=x(most), x2=x(most), y1=top, y2=height - bottom, class_="budget"))
        says += f" Budget: at most {short(most)}."
    if least is not None:
        lines.append(tag("line", x1=_LEFT, x2=_WIDTH - _RIGHT, y1=y(100 * least), y2=y(100 * least), class_="budget"))
        says += f" Budget: at least {100 * least:.2f} %."
    return _figure(height, says, _frame(x, y, height - bottom, cost, f"{score}, %"), join(lines), line, join(marks))


def curve(values: Sequence[tuple[float, float]], title: str, phases: Sequence[tuple[str, float, float]]) -> Markup:
    """One logged metric over the epochs.

    Args:
        values: epoch and value, by rising epoch; at least one.
        title: name of the metric.
        phases: name, first and last epoch of each phase, drawn as bands behind the curve.
    """
    height, top, bottom = 150.0, 12.0, 26.0
    last = max(max(epoch for epoch, _ in values), 1.0)
    x = Axis(0.0, last, _LEFT, _WIDTH - _RIGHT)
    y = axis_of([value for _, value in values], height - bottom, top)
    bands = [
        tag(
            "rect",
            tag("title", f"{name}: epoch {first:g} to {end:g}"),
            x=x(first),
            y=top,
            width=max(x(min(end, last)) - x(first), 1.5),
            height=height - bottom - top,
            class_=f"band c{index % 6}",
        )
        for index, (name, first, end) in enumerate(phases)
        if first <= last
    ]
    places = [(x(epoch), y(value)) for epoch, value in values]
    path = "M" + "L".join(f"{px:.1f},{py:.1f}" for px, py in places)
    dots = [tag("circle", cx=px, cy=py, r=2.2, class_="dot") for px, py in places] if len(places) <= 40 else []
    says = f"{title}: from {short(values[0][1])} to {short(values[-1][1])} in epoch {values[-1][0]:g}."
    frame = _frame(x, y, height - bottom, "", "", count=5)
    return _figure(height, says, join(bands), frame, tag("path", d=path, class_="curve"), join(dots))


def bar(share: float, label: str) -> Markup:
    """A share in [0, 1] as a bar for a table's cell."""
    filled = tag("span", style=f"width:{100 * min(max(share, 0.0), 1.0):.1f}%")
    return tag("span", tag("span", filled, class_="bar", aria_hidden="true"), " ", label, class_="barred")


def _groups(points: Sequence[ParetoPoint], x: Axis, y: Axis) -> list[tuple[str, list[ParetoPoint]]]:
    """Points whose markers would cover each other, with the numbers of all."""
    groups: list[list[ParetoPoint]] = []
    for point in points:
        place = (x(point.cost), y(100 * point.accuracy))
        near = (g for g in groups if math.dist(place, (x(g[0].cost), y(100 * g[0].accuracy))) < _NEAR)
        group = next(near, None)
        if group is None:
            groups.append([point])
        else:
            group.append(point)
    return [(",".join(point.number for point in group), group) for group in groups]


def _steps(places: Sequence[tuple[float, float]], end: float) -> str:
    """The Pareto front as a staircase; no variant lies left of it or above it."""
    path = f"M{places[0][0]:.1f},{places[0][1]:.1f}"
    for px, py in places[1:]:
        path += f"H{px:.1f}V{py:.1f}"
    return f"{path}H{end:.1f}"


def _frame(x: Axis, y: Axis, bottom: float, xlabel: str, ylabel: str, count: int = 5) -> Markup:
    """Grid, numbers and titles of the axes."""
    parts: list[Markup] = []
    for value in y.ticks(count):
        place = y(value)
        parts.append(tag("line", x1=x.start, x2=x.end, y1=place, y2=place, class_="grid"))
        parts.append(tag("text", short(value), x=x.start - 5, y=place + 3.6, text_anchor="end"))
    numbers = (tag("text", short(value), x=x(value), y=bottom + 14, text_anchor="middle") for value in x.ticks(5))
    parts.extend(numbers)
    parts.append(tag("line", x1=x.start, x2=x.end, y1=bottom, y2=bottom, class_="axis"))
    if xlabel:
        parts.append(tag("text", xlabel, x=(x.start + x.end) / 2, y=bottom + 32, text_anchor="middle", class_="label"))
    if ylabel:
        middle = (y.start + y.end) / 2
        turned = f"rotate(-90 11 {middle:.1f})"
        parts.append(tag("text", ylabel, x=11, y=middle, transform=turned, text_anchor="middle", class_="label"))
    return join(parts)


def _figure(height: float, says: str, *parts: Any) -> Markup:
    box: Mapping[str, Any] = {"viewBox": f"0 0 {_WIDTH:g} {height:g}", "role": "img", "aria_label": says}
    return tag("svg", *parts, **box)
