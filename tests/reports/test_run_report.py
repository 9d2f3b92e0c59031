import json

import pytest

from lightning_accel.reports.model import Row
from lightning_accel.reports.run_report import comparison_table, render_markdown

TEACHER = Row(
    "teacher fp32",
    "onnxruntime",
    correct=981,
    total=1000,
    parameters=272474,
    file_bytes=1101344,
    p50_ms=4.21,
    p90_ms=4.9,
)
INT8 = Row(
    "student int8",
    "onnxruntime",
    correct=970,
    total=1000,
    parameters=20010,
    file_bytes=31200,
    p50_ms=5.0,
    p90_ms=5.25,
    speedup=0.842,
    speedup_low=0.8,
    speedup_high=0.881,
)
ENGINE = Row("student int8", "tensorrt", parameters=20010, file_bytes=99999, note="built here, not run")


def test_row_takes_its_accuracy_from_the_counts():
    assert INT8.accuracy == 0.97
    assert Row("x").accuracy_interval is None
    assert Row(**json.loads(json.dumps(INT8.to_dict()))) == INT8
    with pytest.raises(ValueError, match=r"must be correct / total = 0.970000, but got 0.990000"):
        Row("x", accuracy=0.99, correct=970, total=1000)
    with pytest.raises(ValueError, match=r"Argument `accuracy` must be in \[0, 1\], but got 97.0"):
        Row("x", accuracy=97.0)


def test_comparison_table_exactly():
    assert comparison_table([TEACHER, INT8, ENGINE]).splitlines() == [
        "| name             | engine      |        accuracy [95 %] | parameters | file, bytes | p50, ms | p90, ms |    speed-up [95 %] |",
        "| ---------------- | ----------- | ---------------------: | ---------: | ----------: | ------: | ------: | -----------------: |",
        "| teacher fp32     | onnxruntime | 98.10 % [97.05, 98.78] |    272,474 |   1,101,344 |   4.210 |   4.900 |              1.00x |",
        "| student int8     | onnxruntime | 97.00 % [95.75, 97.89] |     20,010 |      31,200 |   5.000 |   5.250 | 0.84x [0.80, 0.88] |",
        "| student int8 [1] | tensorrt    |                      — |     20,010 |      99,999 |       — |       — |                  — |",
        "",
        "[1] built here, not run",
    ]


def test_missing_values_without_a_note_are_named():
    table = comparison_table(
        [Row("a", "onnxruntime", accuracy=0.5, parameters=1, file_bytes=1), Row("b|c", note="why\nnot")]
    )
    assert "[1] not measured: p50, p90, speed-up" in table
    assert "| b\\|c [2] | —" in table
    assert [line.split("|")[3].strip() for line in table.splitlines()[2:4]] == ["50.00 %", "—"]
    with pytest.raises(ValueError, match="Argument `rows` must have at least one row"):
        comparison_table([])


def test_own_metrics_become_columns():
    table = comparison_table([Row("a", metrics={"f1": 0.25}), Row("b", metrics={"f1": 0.5, "auc": 0.75})])
    head, _, first, second, *_ = (line.replace(" ", "").split("|") for line in table.splitlines())
    assert head[4:6] == ["f1", "auc"]
    assert first[4:6] == ["0.2500", "—"]
    assert second[4:6] == ["0.5000", "0.7500"]


def test_full_report_has_every_section_and_ends_with_tensorrt():
    report = {
        "title": "Quickstart",
        "command": "lightning-accel fit --config configs/quickstart.yaml",
        "rows": [TEACHER.to_dict(), INT8],
        "verification": [
            {
                "engine": "onnxruntime",
                "batch_sizes": {1: 64, 7: 63},
                "samples": 512,
                "max_error": 0.00123456,
                "agreement": 0.998,
                "passed": True,
                "tolerance": {"median": 1e-6, "maximum": 0.01, "agreement": 0.995},
            },
        ],
        "engines": [{"engine": "tensorrt", "status": "built here, not run", "gpu": None}],
        "layers": [{"kind": "sparsity", "name": "weights", "values": {"conv1": 0.25}, "total": 0.5}],
        "phases": ["pruning: epochs 0 to 3"],
        "notes": [{"kind": "method", "text": "one note"}],
        "environment": {"cpu": "some", "cores": 2},
    }
    text = render_markdown(report)
    headings = [line for line in text.splitlines() if line.startswith("#")]
    assert headings == [
        "# Quickstart",
        "## Comparison",
        "## Verification",
        "## Engines",
        "## Compression, measured",
        "## Phases",
        "## Notes",
        "## Environment",
    ]
    assert comparison_table([TEACHER, INT8]) in text
    (line,) = (line for line in text.splitlines() if line.startswith("| onnxruntime | "))
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    limits = "median 1e-06, max 0.01, agreement 0.995"
    assert cells == ["onnxruntime", "1 (64), 7 (63)", "512", "0.001235", "0.998", "yes", limits]
    assert "- sparsity (weights)\n  - conv1: 0.25\n  - all: 0.5" in text
    assert "- pruning: epochs 0 to 3" in text
    assert text.endswith("\n\nTensorRT: built here, not run\n")


def test_sections_without_content_do_not_appear():
    assert render_markdown({"rows": [], "engines": [{"engine": "onnxruntime"}]}) == (
        "# Report\n\n## Engines\n\n| engine      |\n| ----------- |\n| onnxruntime |\n"
    )
    assert render_markdown({"title": "T"}) == "# T\n"


def test_names_with_markup_stay_names():
    """A metric or a layer is named by the user; a page would take `<i>` for a tag and a new line for a heading."""
    row = Row("network | <i>", metrics={"a<b>": 0.5})
    report = {"rows": [row], "run": {"command": "x", "settings": {"Net": {"note": "one\n# two <script>"}}}}
    text = render_markdown({**report, "quantization": {"a|b<script>": "int8"}})
    assert "| network \\| \\<i>" in text
    assert "a\\<b>" in text
    assert "  - note: one # two \\<script>" in text.splitlines()
    assert "- a|b\\<script>: int8" in text.splitlines()
