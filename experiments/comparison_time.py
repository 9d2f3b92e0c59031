"""How long the default comparison of a small CNN takes, from the command line, as anybody runs it.

The network of `experiments.int8_zoo` named CNN w32, in int8 for OpenVINO beside its float32 file: `lightning-accel benchmark BUNDLE
--max-drop 100`, three times, imports and loading included.

    python -m experiments.comparison_time [--quick]
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from experiments import print_environment
from experiments.decision_zoo import bundle

NETWORK, TARGET_S, REPEATS = "CNN w32", 180, 3


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="once, at one batch size, with short turns: shows that it runs"
    )
    quick = parser.parse_args().quick
    warnings.simplefilter("ignore")
    print_environment()
    with tempfile.TemporaryDirectory() as scratch:
        command = [
            sys.executable,
            "-m",
            "lightning_accel",
            "benchmark",
            str(bundle(NETWORK, "openvino", Path(scratch))),
        ]
        command += ["--max-drop", "100", *(["--seconds", "0.05", "--batch", "32", "--callers", "1"] if quick else [])]
        times = []
        for _ in range(1 if quick else REPEATS):
            started = time.monotonic()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            times.append(time.monotonic() - started)
    found = statistics.median(times)
    shown = ", ".join(f"{seconds:.0f}" for seconds in times)
    word = "reached" if found <= TARGET_S else "missed"
    print(f"default comparison of {NETWORK}: {found:.0f} s ({shown}; target: at most {TARGET_S} s, {word})")


if __name__ == "__main__":
    main()
