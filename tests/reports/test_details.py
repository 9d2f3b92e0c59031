"""Sections for decision makers: class by class, predictions that changed, since the last bundle, time per layer, costs, budgets."""

import base64
import json
from io import BytesIO

import numpy as np
import pytest

from lightning_accel.benchmarking.layer_times import layer_times
from lightning_accel.benchmarking.pareto import ParetoPoint
from lightning_accel.engines.base import load_runner
from lightning_accel.export.class_report import classes_of, flipped_of, picture
from lightning_accel.export.evaluate import Predicted
from lightning_accel.reports.facts import facts
from lightning_accel.reports.page import render_html
from lightning_accel.reports.run_report import render_markdown
from lightning_accel.reports.svg import pareto_plot
from tests.reports.browser import BROWSER, look_at
from tests.reports.whole import NASTY, Page, comparison, whole_report
from tests.support.onnx_models import linear

DETAILS = ["previous", "classes", "flipped", "times"]


def detailed():
    report = whole_report()
    image = picture(np.arange(64, dtype=np.float32).reshape(1, 8, 8))
    names = [NASTY, "dog", "bird"]
    report.classes = {
        "names": names,
        "network": "student int8",
        "baseline": "teacher",
        "confusion": [[7, 3, 0], [1, 9, 0], [0, 0, 0]],
        "accuracy": [0.7, 0.9, None],
        "baseline_accuracy": [0.8, 0.9, None],
    }
    line = {"index": 4, "label": 0, "before": 0, "after": 1, "picture": image}
    report.flipped = {"network": "student int8", "baseline": "student fp32", "count": 3, "samples": 20}
    report.flipped |= {"better": 1, "worse": 2, "neither": 0, "shown": [line]}
    report.layer_times = {"file": "model.onnx", "calls": 10, "threads": 2, "batch": 32, "total_ms": 1.0}
    report.layer_times["layers"] = [{"name": f"conv{i}", "kind": "Conv", "ms": 0.03, "share": 0.03} for i in range(33)]
    row = {"name": "x", "accuracy": 0.95, "p50_ms": 2.0, "file_bytes": 1000, "speedup": 1.0}
    report.previous = {"path": "artifacts", "version": "0.1.0", "phases": ["pruned"], "ships": "int8, openvino"}
    report.previous |= {"change": 0.01, "low": -0.01, "high": 0.03, "same": 0.97}
    report.previous |= {
        "row": row,
        "now": {**row, "accuracy": 0.96, "speedup": 2.0, "speedup_low": 1.9, "speedup_high": 2.1},
    }
    report.price_per_hour = 3.6
    return report


def test_the_page_has_all_sections_and_nothing_becomes_markup():
    page = Page(render_html(detailed()))
    assert page.problems == []
    assert [name for name in page.ids if name in DETAILS] == DETAILS
    text = render_html(detailed())
    assert "<script" not in text
    for said in (
        "+1.00 points",
        "2.00x the speed",
        "3 of 20 held-out samples",
        "2 were right before",
        "8 others",
        "before: pruned",
    ):
        assert said in text
    assert "70.0 %" in text
    assert "-10.00" in text  # points of class 0
    assert all(given["src"].startswith("data:image/png;base64,") for given in page.all("img"))


def test_markdown_says_the_same():
    text = render_markdown(detailed())
    assert "| accuracy    | 95.00 % | 96.00 % | +1.00 points [-1.00, +3.00] |" in text
    assert "3 of 20 held-out samples" in text
    assert "| dog " in text
    assert "## Time per layer" in text
    assert text.count("conv") == 30
    assert not any(title in render_markdown(whole_report()) for title in ("## Class by class", "## Since the last"))


def test_without_the_data_nothing_is_said():
    page = Page(render_html(whole_report()))
    assert not set(DETAILS) & set(page.ids)
    assert not any(fact.title == "Cost of a million" for fact in facts(whole_report()))


def test_a_million_samples_cost_their_time():
    report = detailed()
    shipped = next(row for row in report.rows if row.name == report.ships)
    # 31,250 calls of 5 ms are 156.25 s, at 3.6 an hour
    assert report.cost_of_a_million(shipped) == pytest.approx(0.15625)
    (fact,) = (fact for fact in facts(report) if fact.title == "Cost of a million")
    assert (fact.value, fact.detail) == ("0.16", "instead of 0.13 with teacher")


def test_the_last_bundle_that_can_t_be_compared_says_why():
    report = detailed()
    report.previous = {"path": "old", "reason": "its inputs are ['a'], and those of this one ['b']"}
    assert "Not compared with the bundle at old: its inputs are [&#x27;a&#x27;]" in render_html(report)


def test_nothing_is_shown_as_json():
    report = detailed()
    report.run = {"command": "fit", "settings": {"Net": {"layers": {"a": [1, 2], "b": {"c": 0.5}}}}}
    assert "a 1, 2, b c 0.5" in render_html(report)
    assert "    - b\n      - c: 0.5" in render_markdown(report)
    for text in (render_html(report), render_markdown(report)):
        assert '{"' not in text
        assert "{&quot;" not in text


def test_many_classes_show_the_worst_and_the_most_frequent_confusions():
    report = detailed()
    count = 40
    matrix = (np.eye(count, dtype=int) * 9).tolist()
    matrix[7][3] = 5
    accuracy = [9 / sum(line) for line in matrix]
    report.classes = {
        "names": [f"c{i}" for i in range(count)],
        "network": "n",
        "confusion": matrix,
        "accuracy": accuracy,
    }
    text = render_html(report)
    assert "The 30 classes with the lowest accuracy of 40" in text
    assert "c7 taken for c3" in text


def test_classes_and_flips_are_counted():
    labels = np.array([0, 0, 1, 1, 2])
    predicted = Predicted(labels, 3, {"fp32": np.array([0, 1, 1, 1, 2]), "int8": np.array([0, 0, 1, 0, 1])})
    found = classes_of(predicted, "int8", "fp32", ["a", "b", "c"])
    assert found["confusion"] == [[2, 0, 0], [1, 1, 0], [0, 1, 0]]
    assert (found["accuracy"], found["baseline_accuracy"]) == ([1.0, 0.5, 0.0], [0.5, 1.0, 1.0])
    flips = flipped_of(predicted, "int8", "fp32", None, 0)
    assert (flips["count"], flips["better"], flips["worse"], flips["neither"]) == (3, 1, 2, 0)
    assert "shown" not in flips
    assert flipped_of(predicted, "fp32", "fp32", None, 0) == {}
    assert classes_of(predicted, "gone", "fp32") == {}


@pytest.mark.parametrize("shape", [(8, 6), (1, 8, 6), (3, 8, 6), (8, 6, 3)])
def test_pictures_are_the_samples(shape):
    from PIL import Image

    sample = np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)
    sample.flat[0], sample.flat[1] = 0, 255
    shown = Image.open(BytesIO(base64.b64decode(picture(sample).partition(",")[2])))
    want = sample.transpose(1, 2, 0) if shape[0] in (1, 3) and len(shape) == 3 else sample
    np.testing.assert_array_equal(np.asarray(shown), want.squeeze())


def test_what_is_no_image_is_no_picture():
    assert picture(np.zeros((5, 8, 8))) == ""
    assert picture(np.zeros(16)) == ""
    assert picture(np.full((8, 8), np.nan)) == ""


def test_large_pictures_are_thinned():
    from PIL import Image

    shown = Image.open(BytesIO(base64.b64decode(picture(np.zeros((3, 224, 100))).partition(",")[2])))
    assert shown.size == (50, 56)


def test_budgets_are_lines():
    points = [ParetoPoint("1", "a", 2.0, 0.9, 0.9, 0.9), ParetoPoint("2", "b", 1.0, 0.8, 0.8, 0.8)]
    assert pareto_plot(points, "t", "ms").count('class="budget"') == 0
    drawn = pareto_plot(points, "t", "ms", most=4.0, least=0.7)
    assert drawn.count('class="budget"') == 2
    assert "Budget: at most 4." in drawn
    assert "Budget: at least 70.00 %." in drawn
    report = whole_report()
    report.comparison = comparison()
    report.comparison["decision"]["budgets"] = {"max_drop": 0.5, "max_bytes": 9000, "batch": 1}
    assert render_html(report).count('class="budget"') == 3  # the score in both, the size in one


def test_layer_times_name_each_operator(tmp_path):
    path = linear(tmp_path / "m.onnx")
    with load_runner(path, "onnxruntime") as runner:
        feeds = {spec.name: np.zeros([size or 2 for size in spec.shape], spec.dtype) for spec in runner.inputs}
    found = layer_times(path, feeds, threads=1)
    assert found["calls"] == 10
    assert found["layers"]
    assert sum(layer["share"] for layer in found["layers"]) == pytest.approx(1)
    assert any("MatMul" in layer["kind"] or "Gemm" in layer["kind"] for layer in found["layers"])
    json.dumps(found, allow_nan=False)


@pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")
@pytest.mark.parametrize("width", [360, 1280])
def test_it_fits_the_width(tmp_path, width):
    (tmp_path / "report.html").write_text(render_html(detailed()))
    found = look_at(tmp_path, "report.html", width)
    assert (found["content"], found["wide"]) == (width, [])
    assert found["console"] == []
