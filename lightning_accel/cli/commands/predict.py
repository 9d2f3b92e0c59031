"""Compute the outputs of a bundle for all rows of files, and write them as Parquet; without torch.

  lightning-accel predict artifacts --data rows.parquet --keep id --out predictions
  lightning-accel predict artifacts --data images/ --out predictions --workers 4

A call that was interrupted or killed is repeated as it was, and goes on. `predict -c CONFIG.yaml` is the Trainer's predict loop.
Exit code: 0 once every row is there; 1 for data that doesn't fit, or an engine that fails; 130 after Ctrl-C.
"""

import argparse
import sys
from pathlib import Path

from lightning_accel.cli.options import add_list_option


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("bundle", type=Path, help="the bundle's folder")
    add_list_option(
        parser, "--data", Path, help="files (.parquet, .csv, .npz, .npy), folders of them, or folders of images"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, new or of the same call")
    parser.add_argument("--engine", help="engine to run; default: the one in the manifest")
    parser.add_argument("--batch", type=int, default=256, help="rows in a call of the engine; default: 256")
    parser.add_argument("--workers", type=int, help="processes; default: one for each core")
    parser.add_argument("--threads", type=int, default=1, help="threads of each worker's engine; default: 1")
    add_list_option(parser, "--columns", help="columns with the values of each row, for one input (N, F)")
    add_list_option(parser, "--keep", help="columns that are copied to the output, such as identifiers")
    parser.add_argument(
        "--pixel-scale", type=float, help="factor on the values 0 to 255 of images, for inputs in floating point"
    )
    parser.add_argument(
        "--rows-per-part", type=int, help="rows in a file; default: inputs of 64 MB, at most 65,536 rows"
    )
    parser.add_argument(
        "--ray", action="store_true", help="compute on Ray: the cluster of RAY_ADDRESS, or this machine"
    )
    parser.add_argument("--no-canary", action="store_true", help="compute without reproducing the kept samples")


def run(arguments: argparse.Namespace) -> int:
    """Compute and print."""
    from lightning_accel.cli.errors import UsageError
    from lightning_accel.serving.bulk.predict import predict_files

    if not arguments.data:
        raise UsageError("predict needs --data: files, or folders of files or images")
    found = predict_files(
        arguments.bundle,
        arguments.data,
        arguments.out,
        engine=arguments.engine,
        batch=arguments.batch,
        workers=arguments.workers,
        threads=arguments.threads,
        columns=arguments.columns or (),
        keep=arguments.keep or (),
        pixel_scale=arguments.pixel_scale,
        rows_per_part=arguments.rows_per_part,
        canary=not arguments.no_canary,
        ray=arguments.ray,
        progress=sys.stderr.isatty(),
    )
    there = found.parts - found.computed
    before = f", {there} of them from before" if there else ""
    died = f"; {found.restarts} workers died and were replaced" if found.restarts else ""
    proven = "kept samples reproduced" if found.proven else "NOT CHECKED: the bundle's samples weren't run"
    print(f"{arguments.out}: {found.rows:,} rows in {found.parts} parts{before}, {found.engine}, {proven}{died}")
    return 0
