"""The comparison as a picture: accuracy against latency, and the sizes of the files."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_accel.core.optional import require
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.reports.run_report import Row

# Told apart by people with any colour vision (Okabe and Ito); the first row, the reference, is grey.
_COLORS = ("#6b6b6b", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK, _SOFT = "#222222", "#dddddd"

_Point = tuple[int, str, Row, float, float]  # index of the row, its name, the row, latency in ms, accuracy in %


def plot_comparison(rows: Sequence[Row], path: str | Path) -> Path:
    """Draw accuracy against median latency, and file sizes, as a PNG.

    A row without accuracy or latency is left out of the first panel and named below it.

    Args:
        rows: the variants; at least one with accuracy and latency, or with a size.
        path: the ``.png`` file; written atomically.

    Returns:
        The path.

    Raises:
        MissingPackageError: matplotlib is not installed; the message names the extra.
        InvalidArgumentError: nothing to draw, or another suffix.
    """
    path = Path(path)
    if path.suffix != ".png":
        raise InvalidArgumentError(f"Argument `path` must end in .png, but got {path.name!r}.")
    names = _distinct_names(rows)
    points = [
        (index, names[index], row, row.p50_ms, 100 * row.accuracy)
        for index, row in enumerate(rows)
        if row.accuracy is not None and row.p50_ms is not None
    ]
    sizes = [(i, names[i], row.file_bytes / 1000) for i, row in enumerate(rows) if row.file_bytes is not None]
    if not points and not sizes:
        raise InvalidArgumentError(
            "Argument `rows` must have accuracy and latency, or sizes, to draw; but got neither."
        )
    figure_module = require("matplotlib.figure", "report", "`plot_comparison`")
    agg = require("matplotlib.backends.backend_agg", "report", "`plot_comparison`")
    # A figure with a canvas of its own: pyplot's global state and the user's backend are left alone.
    figure = figure_module.Figure(figsize=(11, 4.4), dpi=150, layout="constrained", facecolor="white")
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.12)
    canvas = agg.FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    _draw_accuracy(left, points, [name for name in names if name not in {point[1] for point in points}])
    _draw_sizes(right, sizes)
    canvas.draw()  # fixes the layout, which the labels are placed in
    _place_labels(left, canvas.get_renderer(), points)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        figure.savefig(temporary, format="png", metadata={"Software": None})
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    return path


def _draw_accuracy(axes: Any, points: Sequence[_Point], left_out: Sequence[str]) -> None:
    _style(
        axes, "Accuracy and latency", "median latency of a call, ms (bars: up to p90)", "accuracy, % (95 % interval)"
    )
    for index, _, row, latency, percent in points:
        low, high = _interval(row, percent)
        axes.errorbar(
            latency,
            percent,
            yerr=[[max(percent - low, 0)], [max(high - percent, 0)]],
            xerr=[[0], [_reach(row, latency) - latency]],
            fmt="o",
            markersize=9,
            markeredgecolor="white",
            color=_color(index),
            elinewidth=1.4,
            capsize=3,
        )
    if points:
        axes.set_xlim(0, 1.25 * max(_reach(row, latency) for _, _, row, latency, _ in points))
        axes.margins(y=0.25)
    if left_out:
        axes.annotate(
            f"not measured: {', '.join(left_out)}", (0.01, 0.02), xycoords="axes fraction", fontsize=8, color="#666666"
        )


def _draw_sizes(axes: Any, sizes: Sequence[tuple[int, str, float]]) -> None:
    _style(axes, "Size of the file", "kB (1 kB = 1000 bytes)", "")
    values = [size for _, _, size in sizes]
    positions = range(len(sizes))
    axes.barh(positions, values, color=[_color(index) for index, _, _ in sizes], height=0.55)
    axes.set_yticks(positions, [name for _, name, _ in sizes], color=_INK)
    axes.set_ylim(len(sizes) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", length=0)
    axes.set_xlim(0, 1.2 * max(values, default=1))
    for position, value in zip(positions, values, strict=True):
        text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
        axes.annotate(text, (value, position), (5, 0), textcoords="offset points", va="center", fontsize=9, color=_INK)


def _place_labels(axes: Any, renderer: Any, points: Sequence[_Point]) -> None:
    """Write each point's name where it covers no other name and no point or interval, and stays in the panel."""
    transforms = require("matplotlib.transforms", "report", "`plot_comparison`")
    effects = require("matplotlib.patheffects", "report", "`plot_comparison`")
    taken = []
    for _, _, row, latency, percent in points:
        ends = axes.transData.transform([(latency, end) for end in _interval(row, percent)])
        taken.append(transforms.Bbox(ends).padded(4))
    for index, name, row, latency, percent in points:
        low, high = _interval(row, percent)
        beside = [(percent, dx, dy, "left" if dx > 0 else "right") for dy in (9, -17, 26, -34) for dx in (10, -10)]
        ends = [(high, -4, 9, "left"), (low, -4, -17, "left"), (high, 4, 9, "right"), (low, 4, -17, "right")]
        # In a crowd no place is free; then the first is taken, in spite of what it covers.
        for place in [*beside, *ends, beside[0]]:
            height, dx, dy, align = place
            label = axes.annotate(
                name,
                (latency, height),
                (dx, dy),
                textcoords="offset points",
                ha=align,
                fontsize=9.5,
                fontweight="bold",
                color=_color(index),
                path_effects=[effects.withStroke(linewidth=3, foreground="white")],
            )
            box = label.get_window_extent(renderer)
            inside = all(axes.bbox.contains(x, y) for x, y in box.corners())
            if inside and not any(box.overlaps(other) for other in taken):
                break
            label.remove()
        else:
            axes.add_artist(label)
        taken.append(box)


def _style(axes: Any, title: str, xlabel: str, ylabel: str) -> None:
    axes.set_title(title, loc="left", fontsize=12, fontweight="bold", color=_INK)
    axes.set_xlabel(xlabel, color=_INK)
    axes.set_ylabel(ylabel, color=_INK)
    axes.grid(color=_SOFT, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=_INK)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color("#999999")


def _color(index: int) -> str:
    return _COLORS[index % len(_COLORS)]


def _reach(row: Row, latency: float) -> float:
    return max(row.p90_ms or 0.0, latency)


def _interval(row: Row, percent: float) -> tuple[float, float]:
    low, high = row.accuracy_interval or (percent / 100, percent / 100)
    return 100 * low, 100 * high


def _distinct_names(rows: Sequence[Row]) -> list[str]:
    names = [row.name for row in rows]
    return [f"{row.name} ({row.engine})" if names.count(row.name) > 1 and row.engine else row.name for row in rows]
