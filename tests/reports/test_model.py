"""The report as a typed value, and the schema of ``report.json``."""

import json
from importlib.resources import files

import jsonschema
import pytest
from pydantic import TypeAdapter

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.reports.model import INCOMPLETE, METHOD, Note, Report, as_report
from tests.reports.whole import whole_report

SCHEMA = json.loads((files("lightning_accel.reports") / "report.schema.json").read_text(encoding="utf-8"))


def described() -> dict:
    """The schema of the dataclasses: no further keys, and nothing that only describes."""

    def bare(node):
        if isinstance(node, list):
            return [bare(item) for item in node]
        if not isinstance(node, dict):
            return node
        kept = {
            key: bare(value)
            for key, value in node.items()
            if key not in ("title", "description") or isinstance(value, dict)
        }
        return {**kept, "additionalProperties": False} if "properties" in node else kept

    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **bare(TypeAdapter(Report).json_schema())}


def test_the_schema_file_is_that_of_the_dataclasses():
    """After a change of the report: write `json.dumps(described(), indent=1)` into the file, and raise `SCHEMA` if readers must know."""
    assert described() == SCHEMA


def test_a_report_with_everything_in_it_fits_the_schema_and_comes_back_equal():
    content = json.loads(json.dumps(whole_report().to_dict()))
    jsonschema.validate(content, SCHEMA)
    assert Report.from_dict(content) == whole_report()
    assert as_report(content) == whole_report()


@pytest.mark.parametrize("change", [{"rows": [{"engine": "onnxruntime"}]}, {"surprise": 1}, {"notes": ["a sentence"]}])
def test_another_content_does_not_fit_the_schema(change):
    content = {**json.loads(json.dumps(whole_report().to_dict())), **change}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(content, SCHEMA)


def test_another_schema_is_refused():
    with pytest.raises(InvalidArgumentError, match="must have schema 2, but got 1"):
        Report.from_dict({"schema": 1})


def test_notes_are_read_by_kind():
    report = Report(notes=[Note(INCOMPLETE, "sparsity is 0.3."), Note(METHOD, "INCOMPLETE is a word.")])
    assert report.notes_of(INCOMPLETE) == ["sparsity is 0.3."]
