"""One sentence: what ships, why, against one baseline, cost and benefit, and what was not run."""

from dataclasses import replace

from lightning_accel.reports.facts import facts
from lightning_accel.reports.model import Report, Row, Verdict
from lightning_accel.reports.run_report import render_markdown
from lightning_accel.reports.verdict import verdict_line
from tests.reports.whole import whole_report


def test_the_sentence_has_one_baseline_and_what_was_not_run():
    assert verdict_line(whole_report()) == (
        "Ships student int8 (onnxruntime), the fastest candidate that is not worse than float32 of the same network; against teacher: "
        "accuracy 97.00 % (-1.10 points [-2.00, -0.20]), 0.84x [0.80, 0.88] its speed, 35.3x smaller; not run on this machine: tensorrt; "
        "failed: openvino."
    )


def test_all_tiles_have_the_baseline_of_the_sentence():
    report = whole_report()
    assert [fact.title for fact in facts(report) if "student fp32" in fact.detail] == []
    assert [fact.title for fact in facts(report) if "teacher" in fact.detail] == [
        "Ships",
        "Accuracy",
        "Size",
        "Latency",
    ]


def test_without_a_baseline_that_ran_it_says_so():
    report = whole_report()
    report.ships = "student int8, tensorrt"
    assert "Ships student int8, tensorrt, the" in verdict_line(report)
    assert "neither its accuracy nor its speed was measured" in verdict_line(report)
    assert verdict_line(Report(rows=[Row("network fp32")])) == ""
    assert verdict_line(Report(verdict=Verdict("the only candidate"))) == ""


def test_the_baseline_itself_has_nothing_to_compare_with():
    row = Row("network fp32", "onnxruntime", correct=9, total=10, p50_ms=1.0)
    report = Report(rows=[row], ships="network fp32", verdict=Verdict("the only candidate", "network fp32"))
    assert verdict_line(report) == "Ships network fp32 (onnxruntime), the only candidate; accuracy 90.00 %."


def test_a_metric_of_the_user_stands_for_accuracy():
    report = whole_report()
    report.verdict = replace(report.verdict, score="val_mae", change=-0.01, low=-0.02, high=0.0)
    for row, value in zip(report.rows, (0.25, 0.26, 0.27, 0.28, 0.29), strict=True):
        row.metrics = {"val_mae": value}
    assert "against teacher: `val_mae` 0.28 instead of 0.25, 0.84x" in verdict_line(report)
    report.verdict = replace(report.verdict, score="", change=None)
    assert "of unknown accuracy" in verdict_line(report)


def test_the_table_of_those_that_do_not_ship_is_in_the_report():
    assert "- student fp32 doesn't ship: slower" in render_markdown(whole_report())
