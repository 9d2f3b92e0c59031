"""The report in a real browser, at the width of a phone and of a desk."""

import pytest

from lightning_accel.reports.page import render_html
from tests.reports.browser import BROWSER, look_at
from tests.reports.test_page import SECTIONS
from tests.reports.whole import NASTY, whole_report

pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium, chromium-browser or google-chrome is installed")


@pytest.mark.parametrize("width", [360, 1280])
def test_it_opens_without_errors_requests_or_overflow(tmp_path, width):
    report = whole_report()
    report.run["config"] += f"  long: {'x' * 400}\n"
    (tmp_path / "report.html").write_text(render_html(report))
    found = look_at(tmp_path, "report.html", width)
    assert found["title"] == f"Net {NASTY}"
    assert (found["width"], found["content"], found["wide"]) == (width, width, [])
    assert (found["console"], found["fetched"]) == ([], [])
    assert found["asked"] == [f"/probe{width}.html", "/report.html"]
    assert found["sections"] == SECTIONS
    assert found["small"] >= 9  # pixels


def test_the_look_finds_what_is_wrong(tmp_path):
    page = """<!doctype html><title>bad</title><body><div class="wide" style="width:900px">x</div><img src="gone.png">
    <svg><text>x</text></svg><script>console.error("it broke")</script></body>"""
    (tmp_path / "bad.html").write_text(page)
    found = look_at(tmp_path, "bad.html", 360)
    assert found["content"] > 360
    assert found["wide"] == ["DIV.wide"]
    assert [name.rpartition("/")[2] for name in found["fetched"]] == ["gone.png"]
    assert "/gone.png" in found["asked"]
    assert any("it broke" in line for line in found["console"])


def test_the_page_s_own_policy_stops_what_it_would_fetch(tmp_path):
    text = render_html(whole_report()).replace("<main>", '<main><img src="tracker.png">')
    (tmp_path / "report.html").write_text(text)
    found = look_at(tmp_path, "report.html", 360)
    assert "/tracker.png" not in found["asked"]
    assert any("Content Security Policy" in line for line in found["console"])
