"""The page: whole, self-contained, escaped, with every section; and the numbers in it are the report's."""

import re
from dataclasses import replace

import pytest

from lightning_accel.reports.facts import decision_of, facts
from lightning_accel.reports.layers import layers_of, totals_of
from lightning_accel.reports.markup import join, tag
from lightning_accel.reports.model import INCOMPLETE, Note
from lightning_accel.reports.page import render_html
from lightning_accel.reports.run_report import render_markdown
from lightning_accel.reports.verdict import verdict_line
from tests.reports.whole import NASTY, Page, comparison, whole_report

SECTIONS = ["summary", "comparison", "variants", "verification", "layers", "training", "engines", "making", "machine"]


def test_the_whole_page_is_well_formed_and_fetches_nothing():
    page = Page(render_html(whole_report()))
    assert page.problems == []
    assert page.ids == SECTIONS
    assert page.all("html") == [{"lang": "en"}]
    assert {"name": "viewport", "content": "width=device-width, initial-scale=1"} in page.all("meta")
    (policy,) = (meta["content"] for meta in page.all("meta") if "http-equiv" in meta)
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("<p><b>x</p>", "</p> closes nothing"),
        ("<p id=a></p><p id=a></p>", "id a twice"),
        ("<div>", "<div> is not closed"),
        ('<link href="https://x.org/a.css">', "href=https://x.org/a.css"),
        ("<style>@import 'x'</style>", "the style fetches something"),
        ('<a href="#gone">x</a>', "link to #gone"),
        ("<p onclick=x()></p>", "onclick of <p>"),
        ("<script></script>", "<script>"),
    ],
)
def test_the_reader_finds_what_is_wrong(text, problem):
    assert problem in Page(text).problems


def test_nothing_of_a_report_becomes_markup():
    text = render_html(whole_report())
    assert "<script" not in text
    page = Page(text)
    assert f"Net {NASTY}" in "".join(page.words["title"])
    assert f"Net {NASTY}" in "".join(page.words["h1"])
    assert tag("a", "<", title='"') == '<a title="&quot;">&lt;</a>'
    assert tag("p", tag("b", "x"), None, hidden=False, tabindex=0, open=True) == '<p tabindex="0" open><b>x</b></p>'
    assert join(["<", tag("br")]) == "&lt;<br>"


def test_tables_have_captions_and_headers_and_scroll_in_their_own_box():
    page = Page(render_html(whole_report()))
    boxes = [given for given in page.all("div") if given.get("class") == "scroll"]
    assert len(boxes) == len(page.all("table")) == len(page.all("caption")) > 6
    assert all(box["role"] == "region" and box["aria-label"] and box["tabindex"] == "0" for box in boxes)
    assert {given.get("scope") for given in page.all("th")} == {"col", "row"}
    assert all(given["role"] == "img" and given["aria-label"] for given in page.all("svg"))


def test_only_what_there_is_to_say_is_said():
    page = Page(render_html({"title": "Nothing"}))
    assert (page.problems, page.ids) == ([], ["summary"])
    report = whole_report()
    report.comparison, report.curves = None, []
    assert Page(render_html(report)).ids == [s for s in SECTIONS if s not in ("variants", "training")]


def test_the_summary_comes_first_and_says_what_is_measured():
    report = whole_report()
    said = {fact.title: fact for fact in facts(report)}
    assert next(iter(said)) == "Ships"
    assert said["Ships"].detail == verdict_line(report)
    assert said["Accuracy"].value == "97.00 %"
    assert said["Accuracy"].detail == "[95.75, 97.89] on 1,000 held-out samples; -1.10 points [-2.00, -0.20] to teacher"
    assert not said["Accuracy"].good  # worse, beyond its interval
    assert str(said["Size"]) == "Size: 31.2 kB (35.3x smaller than teacher)"
    assert said["Latency"].detail == "0.84x [0.80, 0.88] the speed of teacher; batch 32, 2 threads"
    assert not said["Latency"].good  # slower, beyond its interval
    assert said["Proof"].value == "2 of 2 comparisons passed"
    assert said["Proof"].detail == "1,668 integers bit for bit, 16 of 16 nodes one by one"
    assert said["Not run here"].value == "tensorrt"
    assert not said["Noise"].good
    assert decision_of(report) == "Ship openvino int8: the fastest within 0.5 points of the baseline."
    report.comparison["decision"] |= {"ship": None, "why": "No variant fits the budgets."}
    assert decision_of(report) == "No variant fits the budgets."
    report = whole_report()
    text = render_html(report)
    assert text.index("Ship openvino int8") < text.index('id="comparison"')
    assert "proven: what ships is what was trained" in text
    assert "training cost accuracy" not in text
    report.verdict = replace(report.verdict, good=False)
    assert "quantization-aware training cost accuracy" in render_html(report)


def test_what_is_not_proven_or_not_complete_is_said_first():
    report = whole_report()
    report.verification[0]["passed"] = False
    assert "not proven" in render_html(report)
    assert "proven: what ships" not in render_html(report)
    report = whole_report()
    report.notes.append(Note(INCOMPLETE, "sparsity is 0.3."))
    assert "incomplete: targets not reached" in render_html(report)
    assert "proven: what ships" not in render_html(report)


def test_each_output_of_several_has_its_error():
    report = whole_report()
    outputs = {"boxes": {"kind": "values", "maximum": 2.5e-4}, "mask": {"kind": "integers", "equal": 0.999}}
    report.verification[0]["outputs"] = outputs
    text = render_html(report)
    assert "boxes (values): largest error 2.5e-04" in text
    assert "mask (integers): 99.90 % equal" in text
    assert "boxes (values), mask (integers)" in render_markdown(report)
    del outputs["mask"]
    assert "boxes (values): largest error" not in render_html(report)


def test_each_variant_has_its_numbers_or_its_reason():
    text = render_html(whole_report())
    section = text[text.index('id="variants"') : text.index('id="verification"')]
    for said in ("2.00x", "1.90 to 2.10", "10,000", "99.20 %", "81 MB", "no NVIDIA GPU", "took over 20 s"):
        assert said in section
    assert "slower than openvino int8" in section
    assert "too noisy for fine distinctions" in section
    assert section.count('<tr class="ships">') == 2  # one for each number of callers


def test_layers_are_gathered_from_the_tables():
    layers = layers_of(whole_report())
    assert list(layers) == ["body.0", NASTY, "lstm"]
    body, lstm = layers["body.0"], layers["lstm"]
    assert (body.channels, body.zeros, body.precision) == ("16 -> 12", 0.25, "int8")
    assert (lstm.channels, lstm.zeros, lstm.precision) == ("", None, "float: no integer kernel")
    assert totals_of(whole_report()) == {
        "sparsity (weights)": "50.0% zeros",
        "channels (channels)": "2,884 -> 1,732 parameters",
    }
    assert "width:25.0%" in render_html(whole_report())


def test_phases_stand_behind_the_curves():
    text = render_html(whole_report())
    section = text[text.index('id="training"') : text.index('id="engines"')]
    titles = re.findall(r"<title>(.*?)</title>", section)
    assert titles == ["WeightPruning.weights: epoch 0 to 2", "QuantizationAwareTraining.qat: epoch 3 to 4"] * 2
    assert 'aria-label="val/accuracy: from 0.5 to 0.8 in epoch 4."' in section


def test_markdown_has_the_same_beginning_and_the_variants():
    text = render_markdown(replace(whole_report(), title="Net"), ["Ships: student int8"])
    assert text.startswith("# Net\n\n- Ships: student int8\n\n")
    assert "## Runtime variants\n\n| variant " in text
    assert "not here: no NVIDIA GPU" in text
    assert "lstm: float: no integer kernel" in text
    assert "```\nlightning-accel fit -c run.yaml\n```" in text
    assert len(comparison()["variants"]) == 4


def test_variants_are_drawn_at_the_batch_size_that_is_decided_at_and_values_by_their_r_squared():
    report = whole_report()
    comparison = report.comparison
    comparison["settings"]["output_kind"] = "values"
    for variant in comparison["variants"][:2]:
        variant["points"] = [{**variant["points"][0], "batch": 8, "p50_ms": 7.125}, *variant["points"]]
    page = render_html(report)
    assert "R² against latency of the variants" in page
    assert "latency, ms (p50, batch 8)" in page
    comparison["decision"]["budgets"]["batch"] = 1
    assert "latency, ms (p50, batch 1)" in render_html(report)
