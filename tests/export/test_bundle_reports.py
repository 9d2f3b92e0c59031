import os
import shlex
import subprocess
import sys

from lightning_accel.export.bundle_reports import summary
from lightning_accel.reports.model import Report, Row

WRITE = """
import sys
from pathlib import Path
from lightning_accel.reports.model import Report, Row
from lightning_accel.export.bundle_reports import write_reports
rows = [Row("network fp32", "onnxruntime", file_bytes=9)]
write_reports(Path(sys.argv[1]), Report(title="M", rows=rows, ships="network fp32"))
"""


def test_the_command_that_finishes_the_proof_can_be_pasted_whatever_the_folder_is_called():
    report = Report(
        rows=[Row("network fp32", "onnxruntime", file_bytes=9)],
        engines=[{"engine": "tensorrt", "status": "built here, not run", "runs_here": False}],
    )
    told = next(line for line in summary(report, "my bundles/it's").splitlines() if line.startswith("Finish"))
    command = shlex.split(told.partition(": ")[2])
    assert command == ["lightning-accel", "verify", "my bundles/it's", "--data", "SAMPLES.npz"]


def test_the_report_is_utf_8_whatever_the_locale_is(tmp_path):
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    subprocess.run([sys.executable, "-c", WRITE, str(tmp_path)], env={**os.environ, **plain}, check=True)
    assert "| —" in (tmp_path / "report.md").read_text(encoding="utf-8").replace("  ", "")
