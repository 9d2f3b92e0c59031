"""Axes, the Pareto front, and where the pictures put things."""

import re

import numpy as np
import pytest

from lightning_accel.benchmarking.pareto import ParetoPoint, pareto_front
from lightning_accel.reports.axes import Axis, axis_of, short
from lightning_accel.reports.svg import bar, curve, pareto_plot


def point(number, cost, accuracy, **more):
    return ParetoPoint(number, f"variant {number}", cost, accuracy, accuracy - 0.01, accuracy + 0.01, **more)


def test_the_front_is_that_of_a_count_of_who_beats_whom():
    rng = np.random.default_rng(0)
    values = rng.integers(0, 12, (80, 2))
    points = [point(str(i), float(c), float(a)) for i, (c, a) in enumerate(values)]
    beaten = [
        np.any((values[:, 0] <= c) & (values[:, 1] >= a) & ((values[:, 0] < c) | (values[:, 1] > a))) for c, a in values
    ]
    front = pareto_front(points)
    assert {p.number for p in front} == {str(i) for i, b in enumerate(beaten) if not b}
    assert [p.cost for p in front] == sorted(p.cost for p in front)
    assert pareto_front([point("a", 1, 0.5), point("b", 1, 0.5)]) == [point("a", 1, 0.5), point("b", 1, 0.5)]


@pytest.mark.parametrize(
    ("axis", "ticks"),
    [
        (Axis(0, 10, 0, 100), [0, 2, 4, 6, 8, 10]),
        (Axis(0.87, 0.91, 0, 100), [0.87, 0.88, 0.89, 0.9, 0.91]),
        (Axis(0.3, 40, 0, 100, log=True), [0.5, 1, 2, 5, 10, 20]),
        (Axis(0.3, 40_000, 0, 100, log=True), [1, 10, 100, 1000, 10_000]),
    ],
)
def test_ticks_are_round_and_inside(axis, ticks):
    assert axis.ticks() == pytest.approx(ticks)


def test_an_axis_maps_its_ends_to_its_places():
    assert [Axis(10, 20, 5, 105)(v) for v in (10, 15, 20)] == [5, 55, 105]
    assert [round(Axis(1, 100, 0, 10, log=True)(v), 9) for v in (1, 10, 100)] == [0, 5, 10]
    constant = axis_of([3.0, 3.0], 0, 100)
    assert constant(3.0) == pytest.approx(50)
    assert axis_of([2.0, 4.0], 0, 1, zero=True).low == 0
    assert 0 < axis_of([0.0], 0, 1)(0.0) < 1


def test_numbers_are_short():
    assert [short(v) for v in (1234, 12345, 1.5e7, 2.5e-5, -0.25)] == ["1,234", "12.3k", "15M", "2.5e-5", "-0.25"]


def test_points_stand_where_their_values_are_and_share_a_marker_where_they_meet():
    points = [point("1", 4.0, 0.9), point("2", 2.0, 0.8), point("3", 2.0, 0.8), point("4", 5.0, 0.7, ships=True)]
    text = pareto_plot(points, "Accuracy against latency", "ms")
    assert 'aria-label="Accuracy against latency. On the front: variant 2, variant 3, variant 1."' in text
    markers = re.findall(r'<rect x="([\d.]+)" y="([\d.]+)".*?class="point (.*?)"></rect><text.*?>(.*?)</text>', text)
    assert [(kind, number) for _, _, kind, number in markers] == [("on", "1"), ("on", "2,3"), ("off ships", "4")]
    left, lower = (float(markers[0][i]) - float(markers[1][i]) for i in (0, 1))
    assert left > 0  # slower: to the right
    assert lower < 0  # more accurate: above


def test_costs_far_apart_have_a_logarithmic_axis():
    near, far = (pareto_plot([point("1", 1, 0.9), point("2", cost, 0.8)], "t", "ms") for cost in (20.0, 2000.0))
    assert ">1,000<" in far
    assert ">0<" in near
    assert ">0<" not in far


def test_a_curve_and_a_bar():
    text = curve([(1, 0.5), (2, 0.75)], "accuracy", [("QAT", 1, 2), ("later", 5, 6)])
    assert text.count("<circle") == 2
    assert "QAT: epoch 1 to 2" in text
    assert "later" not in text
    assert "width:100.0%" in bar(1.2, "all")
    assert bar(0.25, "25 %").endswith("</span> 25 %</span>")
    single = curve([(1, 0.5)], "once", [])
    assert "nan" not in single.lower()
