"""The experiment on `effort="trained"` runs, and prints what it claims last."""

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_script_prints_the_smallest_gain():
    command = [sys.executable, "-m", "experiments.trained_integers", "--quick"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert process.returncode == 0, process.stderr
    lines = process.stdout.splitlines()
    assert sum(line.startswith("| ResNet-8 w16 | portable | 1 |") for line in lines) == 2
    last = r"smallest gain of `trained`: [+-]\d+\.\d+ ± .* dB \(ResNet-8 w16, portable; target: at least 0, \w+\)"
    assert re.fullmatch(last, lines[-1])
