"""The scripts run and print what they claim last; no time is asserted, since a busy machine would make it wrong."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RATIO = r"\d+\.\d{4} \[\d+\.\d{4}, \d+\.\d{4}\]"


@pytest.mark.parametrize(
    ("script", "target", "says"),
    [
        ("idle_overhead", "1.01", "weights after 16 steps with idle callbacks and without: bit-identical"),
        ("qat_step", "1.5", "ResNet-8 w16, float: p50"),
    ],
)
def test_benchmark(script, target, says):
    process = subprocess.run(
        [sys.executable, "-m", f"benchmarks.{script}", "--quick"], capture_output=True, text=True, cwd=ROOT, check=False
    )
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert any(line.startswith("cpu: ") for line in lines)
    assert any(line.startswith(says) for line in lines)
    assert re.search(rf"null run .*: {RATIO}", process.stdout)
    assert re.fullmatch(rf".+: {RATIO} \(target: at most {target}, (reached|missed)\)", lines[-1])
