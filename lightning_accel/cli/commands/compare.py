"""Compare two bundles: their contents, and the accuracy and latency of their default engines on this machine.

Exit code: 0; 1 if one of them can't run here, or for an error; 130 after Ctrl-C, which prints the measurements so far.
"""

import argparse
import json
from pathlib import Path

from lightning_accel.cli.arrays import load_arrays, load_labels
from lightning_accel.cli.commands.benchmark import settings_of, show
from lightning_accel.cli.errors import INTERRUPTED
from lightning_accel.cli.options import add_list_option
from lightning_accel.engines.manifest import read_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("a", type=Path, help="a bundle")
    parser.add_argument("b", type=Path, help="another bundle with the same inputs")
    parser.add_argument("--data", type=Path, help="samples: .npz by input name, or .npy; default: those in a bundle")
    parser.add_argument("--labels", type=Path, help=".npy file with the class of each sample")
    add_list_option(parser, "--batch", int, help="samples in a call; default 1,32")
    add_list_option(parser, "--callers", int, help="number of threads that call at the same time; default 1,4")
    parser.add_argument("--threads", type=int, help="threads of each engine; default: one per core")
    parser.add_argument("--seconds", type=float, help="seconds for each batch size and number of callers; default 2")
    parser.add_argument("--limit", type=float, default=60.0, help="time limit for each bundle in seconds; default 60")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--markdown", type=Path, help="write the table to this file")


def run(arguments: argparse.Namespace) -> int:
    """Measure and print."""
    from lightning_accel.benchmarking.compare_bundles import compare_bundles

    data = None if arguments.data is None else load_arrays(arguments.data, read_manifest(arguments.a)["inputs"])
    labels = None if arguments.labels is None else load_labels(arguments.labels)
    found = compare_bundles(arguments.a, arguments.b, data, labels, settings=settings_of(arguments), progress=show)
    show("")
    print(found)
    if arguments.markdown is not None:
        arguments.markdown.write_text(f"{found}\n", encoding="utf-8")
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found.to_dict(), indent=2) + "\n")
    if found.comparison.interrupted:
        return INTERRUPTED
    return 0 if all(variant.status == "ran" for variant in found.comparison.variants) else 1
