"""What each logger gets of a bundle; W&B's part is in the integration tests, in a process of its own."""

import csv

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lightning_accel.export.logging import log_bundle, scalars
from lightning_accel.reports.page import render_html
from lightning_accel.reports.plots import plot_comparison
from lightning_accel.reports.run_report import Row, render_markdown
from tests.reports.whole import whole_report


@pytest.fixture
def report(tmp_path):
    """A report whose rows are as the export writes them, and its files."""
    report = whole_report()
    rows = [Row(**row) for row in report["rows"]]
    report["rows"] = [row.to_dict() for row in rows]
    plot_comparison(rows, tmp_path / "report.png")
    (tmp_path / "report.html").write_text(render_html(report))
    (tmp_path / "report.md").write_text(render_markdown(report))
    return report


def test_names_of_what_ships_stay_whatever_ships(report):
    found = scalars(report)
    assert {name: value for name, value in found.items() if name.startswith("shipped/")} == {
        "shipped/accuracy": 0.97,
        "shipped/latency_ms": 5.0,
        "shipped/bytes": 31200.0,
        "shipped/parameters": 272474.0,
        "shipped/speedup": 0.842,
    }
    assert found["export/student_int8_not_trained_(PTQ)/accuracy"] == 0.951
    assert "export/student_int8_tensorrt/p50_ms" not in found
    report["ships"] = "student int8, tensorrt"
    assert {n for n in scalars(report) if n.startswith("shipped/")} == {"shipped/bytes"}


def test_tensorboard_gets_numbers_plot_and_text(report, tmp_path):
    logger = TensorBoardLogger(tmp_path / "logs", name="run")
    log_bundle([logger], report, tmp_path, 7)
    logger.finalize("success")
    events = EventAccumulator(logger.log_dir)
    events.Reload()
    (point,) = events.Scalars("shipped/accuracy")
    assert (point.step, point.value) == (7, pytest.approx(0.97))
    (image,) = events.Images("report")
    assert image.width > 1000
    (text,) = events.Tensors("report/text_summary")
    assert b"Runtime variants" in text.tensor_proto.string_val[0]


def test_a_csv_logger_gets_numbers_and_the_page(report, tmp_path):
    logger = CSVLogger(tmp_path / "logs")
    log_bundle([logger], report, tmp_path, 7)
    logger.finalize("success")
    with (tmp_path / "logs" / "lightning_logs" / "version_0" / "metrics.csv").open() as file:
        (line,) = csv.DictReader(file)
    assert float(line["shipped/bytes"]) == 31200
    assert (tmp_path / "logs" / "lightning_logs" / "version_0" / "report.html").read_text() == render_html(report)


def test_a_logger_of_another_kind_is_named(report, tmp_path, caplog):
    with caplog.at_level("INFO"):
        log_bundle([DummyLogger()], report, tmp_path, 7)
    assert "The report isn't logged to DummyLogger: it has the scalars alone." in caplog.text
