"""Check every file of a bundle against its manifest, and compare its engines on this machine with its verified file.

Exit code: 0 all engines passed; 1 one failed, or the bundle is damaged; 3 none failed, but some can't run here.
"""

import argparse
import json
from pathlib import Path

from lightning_accel.benchmarking.environment import environment
from lightning_accel.cli.arrays import load_arrays
from lightning_accel.cli.options import add_list_option
from lightning_accel.engines.manifest import read_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--data", type=Path, help="samples: .npz by input name, or .npy; default: those in the bundle")
    add_list_option(parser, "--engine", help="engine to run; default: all")
    add_list_option(parser, "--batch", int, help="batch size; default: 1,7,32")
    parser.add_argument("--json", type=Path, help="write the results to this file")
    parser.add_argument("--record", action="store_true", help="add the result to the bundle's manifest")


def run(arguments: argparse.Namespace) -> int:
    """Verify and print."""
    from lightning_accel.bundle.writer import record_verification
    from lightning_accel.verification.bundle import verify_bundle

    manifest = read_manifest(arguments.bundle)
    samples = None if arguments.data is None else load_arrays(arguments.data, manifest["inputs"])
    proofs = verify_bundle(
        arguments.bundle, samples, engines=arguments.engine, batch_sizes=tuple(arguments.batch or (1, 7, 32))
    )
    print(f"{arguments.bundle}: {len(manifest['files'])} files match the manifest")
    for proof in proofs:
        print(proof)
    result = {"lines": [proof.to_dict() for proof in proofs], "environment": environment()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    statuses = {proof.status for proof in proofs}
    if arguments.record and "failed" not in statuses:
        record_verification(arguments.bundle, result)
    return 1 if "failed" in statuses else 3 if "not run here" in statuses else 0
