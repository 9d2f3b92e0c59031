"""The zoo of ordinary networks: a cell's outcome is recorded whatever happens to it; the networks themselves run in `make zoo`."""

import json

import pytest

from experiments.real_zoo import COLUMNS, RESULTS, cells, measured, recorded, table
from tests.support.forked import run_module


def line(network, column, seed, outcome="ships", reason=""):
    seconds = {"preflight": 5.0, "export": 10.0 + seed, "total": 20.0}
    found = {"outcome": outcome, "reason": reason, "seconds": seconds, "peak_mb": 900 + seed, "pixels": 64}
    return {"network": network, "column": column, "seed": seed, **found}


def test_a_network_ships_and_a_run_goes_on_where_it_stopped(tmp_path):
    pytest.importorskip("transformers", reason="transformers is an optional package")
    results = tmp_path / "results.jsonl"
    first = run_module("experiments.real_zoo", "--quick", "--results", str(results))
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[-1] == "cells run: 1, shipped: 1", first.stdout
    found = recorded(results)
    ((key, cell),) = found.items()
    assert key == ("BERT-tiny", "QAT onnxruntime", 0)
    assert list(cell["seconds"]) == ["build", "preflight", "training", "export", "check", "total"]
    assert cell["peak_mb"] >= max(cell["mb"].values()) > 100
    assert cell["engines"].keys() == cell["sqnr_db"].keys() == {"onnxruntime", "openvino"}
    assert all(db > 10 for db in cell["sqnr_db"].values())
    assert {"torch", "onnxruntime", "transformers"} <= cell["versions"].keys()
    again = run_module("experiments.real_zoo", "--quick", "--results", str(results))
    assert again.returncode == 0, again.stderr
    assert again.stdout.splitlines() == ["cells run: 0, shipped: 0"]


def test_a_limit_and_an_error_are_results():
    slow = measured("BERT-tiny", "fp32", 0, samples=8, seconds=1.0, megabytes=8000)
    assert slow["outcome"] == "failed"
    assert slow["reason"].endswith("more than 1 s")
    large = measured("BERT-tiny", "fp32", 0, samples=8, seconds=600.0, megabytes=50)
    assert large["reason"].endswith("more than 50 MB")
    assert large["peak_mb"] > 50
    refused = measured("BERT-tiny", "QAT abacus", 0, samples=8, seconds=600.0, megabytes=8000)
    assert refused["outcome"] == "refused"
    assert refused["reason"].startswith("InvalidArgumentError: Argument `target` must be one of")
    unknown = measured("BERT-huge", "fp32", 0, samples=8, seconds=600.0, megabytes=8000)
    assert (unknown["outcome"], unknown["reason"]) == ("failed", "KeyError: 'BERT-huge'")


def test_the_newest_line_of_a_cell_counts(tmp_path):
    path = tmp_path / "results.jsonl"
    lines = [line("A", "fp32", 0, "failed", "x"), line("B", "fp32", 0), line("A", "fp32", 0)]
    path.write_text("".join(json.dumps(entry) + "\n" for entry in lines))
    assert {key: found["outcome"] for key, found in recorded(path).items()} == {
        ("A", "fp32", 0): "ships",
        ("B", "fp32", 0): "ships",
    }
    assert recorded(tmp_path / "none") == {}


def test_columns_are_complete_before_the_next_begins():
    assert list(cells(["A", "B"], ["fp32", "fp16"], [0]))[:3] == [("A", "fp32", 0), ("B", "fp32", 0), ("A", "fp16", 0)]


def test_table_numbers_each_reason_once():
    entries = [
        line("A", "fp32", 0),
        line("A", "fp32", 1, "refused", "too odd"),
        line("B", "fp32", 0, "failed", "crash"),
        line("B", "fp16", 0, "refused", "too odd"),
    ]
    shown = table({(e["network"], e["column"], e["seed"]): e for e in entries}).splitlines()
    assert shown == [
        "| network | size | fp32 | fp16 | export, s | peak, MB |",
        "|---|--:|---|---|--:|--:|",
        "| A | 64 | 1 of 2 ship, refused 1 | - | 11 | 901 |",
        "| B | 64 | 0 of 1 ship, failed 2 | 0 of 1 ship, refused 1 | 10 | 900 |",
        "",
        "1. too odd",
        "2. crash",
    ]


def test_what_is_recorded_is_of_columns_that_exist():
    if RESULTS.is_file():
        assert {column for _, column, _ in recorded(RESULTS)} <= set(COLUMNS)
