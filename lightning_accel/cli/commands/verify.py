"""Check every file of a bundle against its manifest, and hold what its engines compute on this machine against the proven file.

Exit code: 0 all engines passed; 1 one failed, or the bundle is damaged; 3 none failed, but not all could be run here.
"""

import argparse
import json
from pathlib import Path

from lightning_accel.benchmarking.environment import environment
from lightning_accel.cli.arrays import load_arrays
from lightning_accel.engines.manifest import read_manifest


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    parser.add_argument("--data", type=Path, help="samples: .npz by input name, or .npy; default: those in the bundle")
    parser.add_argument("--engine", action="append", help="an engine to run, several times; default: all")
    parser.add_argument("--batch", type=int, action="append", help="a batch size, several times; default: 1, 7, 32")
    parser.add_argument("--json", type=Path, help="write the numbers there")
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
    print(f"{arguments.bundle}: {len(manifest['files'])} files are those that were written")
    for proof in proofs:
        print(proof)
    result = {"lines": [proof.to_dict() for proof in proofs], "environment": environment()}
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    statuses = {proof.status for proof in proofs}
    if arguments.record and "failed" not in statuses:
        record_verification(arguments.bundle, result)
    return 1 if "failed" in statuses else 3 if "not run here" in statuses else 0
