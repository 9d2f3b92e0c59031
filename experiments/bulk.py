"""Bulk inference of a million small rows while a worker is killed: nothing lost, nothing twice, and at what rate.

A multilayer perceptron with random weights, ONNX Runtime, one thread for each worker; rows of 16 numbers in Parquet. Each result is
compared with the runner's, bit for bit, in the same calls. `--ray` computes with Ray Data, which must be installed.

    python -m experiments.bulk [--quick] [--ray] [--bundle BUNDLE]
"""

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

import lightning_accel as la
from experiments import print_environment

ROWS, QUICK, WIDTH, PART, BATCH = 1_000_000, 20_000, 16, 8192, 256


def write_bundle(folder: Path) -> Path:
    """Ship a network that was trained for a moment; the import needs torch, which the rest doesn't."""
    import torch
    from torch import nn
    from torch.utils.data import DataLoader, TensorDataset

    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(WIDTH, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 8)).eval()
    data = DataLoader(TensorDataset(torch.randn(256, WIDTH), torch.randint(0, 8, (256,))), 64)
    la.export_bundle(network, data, str(folder), keep_samples=16)
    return folder


def actors() -> list[int]:
    """Processes of Ray that hold an engine."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            command = (entry / "cmdline").read_bytes()
        except OSError:
            continue
        if command.startswith(b"ray::") and b"Comput" in command:
            found.append(int(entry.name))
    return found


def children(pid: int) -> list[int]:
    """Workers of a process."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    found = [one for task in tasks for one in (task / "children").read_text().split()]
    return [int(one) for one in found if b"spawn_main" in Path(f"/proc/{one}/cmdline").read_bytes()]


def kill_one(out: Path, process: subprocess.Popen[str], after: int, ray: bool, killed: list[int]) -> None:
    """Kill a worker once so many parts are there."""
    while process.poll() is None:
        if len(list(out.glob("part-*.parquet"))) >= after and (found := actors() if ray else children(process.pid)):
            os.kill(found[0], signal.SIGKILL)
            killed.append(found[0])
            return
        time.sleep(0.01)


def main() -> None:
    """Compute, kill, compare, and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="20,000 rows")
    parser.add_argument("--ray", action="store_true", help="with Ray Data instead of processes")
    parser.add_argument("--bundle", type=Path, help="a bundle of this script, where torch isn't installed")
    parser.add_argument("--write-bundle", type=Path, help="write that bundle and end")
    arguments = parser.parse_args()
    if arguments.write_bundle:
        write_bundle(arguments.write_bundle)
        return
    print_environment()
    count, part = (QUICK, 1024) if arguments.quick else (ROWS, PART)
    with tempfile.TemporaryDirectory() as scratch:
        folder, out = Path(scratch), Path(scratch) / "out"
        bundle = arguments.bundle or write_bundle(folder / "bundle")
        rows = np.random.default_rng(0).standard_normal((count, WIDTH)).astype(np.float32)
        table = pa.table({"id": np.arange(count) * 7, **{f"f{i}": rows[:, i] for i in range(WIDTH)}})
        pq.write_table(table, folder / "rows.parquet", row_group_size=65536)
        given = [
            "--data",
            folder / "rows.parquet",
            "--keep",
            "id",
            "--out",
            out,
            "--rows-per-part",
            part,
            "--batch",
            BATCH,
        ]
        command = [
            sys.executable,
            "-m",
            "lightning_accel",
            "predict",
            bundle,
            *given,
            *(["--ray"] if arguments.ray else []),
        ]
        began, killed = time.monotonic(), list[int]()
        process = subprocess.Popen(
            [str(one) for one in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        watch = threading.Thread(target=kill_one, args=(out, process, 3, arguments.ray, killed))
        watch.start()
        said, _ = process.communicate()
        seconds = time.monotonic() - began
        watch.join()
        print(said.strip().splitlines()[-1] if said.strip() else "nothing was said")
        if process.returncode:
            sys.exit(f"it ended with exit code {process.returncode}: {said}")
        found = pq.read_table(out).sort_by("row")
        numbers = np.array(found.column("row"))
        lost, doubled = count - len(np.unique(numbers)), len(numbers) - len(np.unique(numbers))
        same = bool(np.array_equal(np.array(found.column("id")), np.arange(count) * 7))
        began = time.monotonic()
        with la.load_runner(bundle, threads=1) as runner:
            calls = [
                rows[low : min(low + BATCH, start + part, count)]
                for start in range(0, count, part)
                for low in range(start, min(start + part, count), BATCH)
            ]
            wanted = np.concatenate([next(iter(runner.run({runner.input_names[0]: call}).values())) for call in calls])
        direct = time.monotonic() - began
        values = found.column(found.column_names[-1]).combine_chunks().flatten().to_numpy().reshape(count, -1)
        wrong = int((values != wanted).any(axis=1).sum())
    print(
        f"workers killed: {len(killed)}; rows whose identifier is another's: {0 if same else 'some'}; wrong rows: {wrong}"
    )
    print(
        f"{count / seconds:,.0f} rows a second with files and start, {count / direct:,.0f} by the runner alone in one process"
    )
    reached = "reached" if not (lost or doubled or wrong) and same and killed else "missed"
    print(f"of {count:,} rows lost: {lost}, doubled: {doubled} (target: 0 and 0, with one worker killed, {reached})")


if __name__ == "__main__":
    main()
