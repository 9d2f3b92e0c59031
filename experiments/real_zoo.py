"""Ordinary networks, each shipped from `Trainer.fit`: which go through, which are refused and why, in what time and memory.

A cell is a network, a column (a precision or a recipe) and a seed. Each runs in a process of its own, so that a crash, a hang or
too much memory is a result like any other, and adds a line to `experiments/results/real_zoo.jsonl`. A run goes on where the last one
stopped. Weights and data are random; what is asked is whether the library takes a network and whether its file is right, not how
accurate it is.

    make zoo                                                      # everything that is missing, in an environment of its own
    python -m experiments.real_zoo --minutes 30                    # for half an hour
    python -m experiments.real_zoo --networks ResNet-50 --columns fp32 --seeds 0 --again
    python -m experiments.real_zoo --table                         # what is known, as Markdown

Outcomes: `ships`; `refused`: the library said no, by an error of its own; `failed`: another error, a crash, or a limit of time or memory.
"""

import argparse
import datetime
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results" / "real_zoo.jsonl"
COLUMNS = (
    "fp32",
    "fp16",
    "PTQ openvino",
    "PTQ onnxruntime",
    "QAT onnxruntime",
    "QAT tensorrt",
    "QAT portable",
    "channels, QAT",
    "distilled",
)
QUICK = (("BERT-tiny",), ("QAT onnxruntime",), (0,))
PACKAGES = ("torchvision", "timm", "transformers")
_BATCHES = 4  # of training, in each epoch


class Gauge:
    """Seconds and peak memory of each step of a cell, written to a file at its end, so that a killed process leaves them."""

    def __init__(self, path: Path) -> None:
        self.path, self.found = path, {"seconds": {}, "mb": {}, "step": ""}
        self._began = time.monotonic()
        self.begin("build")

    def begin(self, step: str) -> None:
        """End the step that was, and begin another."""
        now = time.monotonic()
        if self.found["step"]:
            self.found["seconds"][self.found["step"]] = round(now - self._began, 2)
            self.found["mb"][self.found["step"]] = _peak_mb()
        _reset_peak()
        self._began, self.found["step"] = now, step
        self.write()

    def write(self, **more: Any) -> None:
        """Keep what is known by now."""
        self.found |= more
        self.path.write_text(json.dumps(self.found))


def _peak_mb() -> int:
    """Peak resident memory since `_reset_peak`; since the process began on systems without /proc."""
    status = Path("/proc/self/status")
    if status.is_file():
        return int(status.read_text().split("VmHWM:")[1].split()[0]) // 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def _reset_peak() -> None:
    clear = Path("/proc/self/clear_refs")
    if clear.is_file():
        clear.write_text("5")


def run_cell(network: str, column: str, seed: int, samples: int, path: Path) -> None:
    """Ship one network, in this process, and write what happened."""
    import logging
    import warnings

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    gauge = Gauge(path)
    try:
        gauge.write(outcome="ships", reason="", **_ship(network, column, seed, samples, gauge))
    except Exception as error:  # whatever it is, it is this cell's result
        gauge.write(outcome="refused" if _refused(error) else "failed", reason=_said(error))
        traceback.print_exc()
    gauge.begin("end")


def _refused(error: Exception) -> bool:
    """Whether the library raised it on purpose."""
    from lightning_accel.errors import LightningAccelError

    return isinstance(error, LightningAccelError)


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _ship(name: str, column: str, seed: int, samples: int, gauge: Gauge) -> dict[str, Any]:
    """Train, compress and export; then run the bundle once more as its user would."""
    import lightning as L
    import torch
    from torch.utils.data import DataLoader

    import lightning_accel as la
    from experiments.real_networks import NETWORKS, sample, twin_settings
    from tests.support.networks import with_statistics

    network = NETWORKS[name]
    torch.manual_seed(seed)
    training, held_out = network.data(_BATCHES * network.batch, 2 * seed), network.data(samples, 2 * seed + 1)
    example = sample(training, network.batch)

    def made() -> torch.nn.Module:
        module = network.build()
        if isinstance(example, dict):
            return with_statistics(module, **example)
        return with_statistics(module, *example)

    module: L.LightningModule = network.task(made(), network.loss)
    if column == "distilled":
        teacher = network.task(made(), network.loss)
        settings = twin_settings(network, teacher.network)
        module = la.DistillationModule(student=module, teacher=teacher, **settings)
    callbacks, engines, epochs = _recipe(column)

    class Clock(L.Callback):
        """Where training begins and ends."""

        def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            gauge.begin("training")

        def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            gauge.begin("export")

    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export = la.ModelExport(
            str(bundle), engines=engines, samples=samples, precision="fp16" if column == "fp16" else None
        )
        trainer = L.Trainer(
            accelerator="cpu",
            max_epochs=epochs,
            callbacks=[Clock(), *callbacks, export],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            num_sanity_val_steps=0,
            default_root_dir=folder,
        )
        gauge.begin("preflight")
        trainer.fit(module, DataLoader(training, network.batch), DataLoader(held_out, network.batch))
        gauge.begin("check")
        assert export.report is not None
        return {
            "engines": {line["engine"]: line["status"] for line in export.report["engines"]},
            "errors": {c["engine"]: [c["median_error"], c["p99_error"]] for c in export.report["verification"]},
            "sqnr_db": _held_again(module, bundle, export.report, sample(held_out, min(samples, 4))),
            "bundle_mb": round(sum(f.stat().st_size for f in bundle.rglob("*") if f.is_file()) / 1e6, 1),
        }


def _recipe(column: str) -> tuple[list[Any], list[str], int]:
    """Callbacks, engines and epochs of a column; engines that can't reproduce a target on this CPU are left out."""
    import lightning_accel as la
    from lightning_accel.quantization.arithmetic.targets import cannot_reproduce, target_of

    if column in ("fp32", "distilled"):
        return [], ["onnxruntime", "openvino", "tensorrt"], 1
    if column == "fp16":
        return [], ["onnxruntime", "tensorrt"], 1
    target = "onnxruntime" if column == "channels, QAT" else column.split()[1]
    natural = target_of(target).engines[0]
    others = [
        e for e in ("onnxruntime", "openvino") if not cannot_reproduce(target_of(target), e, forms=("concatenation",))
    ]
    engines = list(dict.fromkeys([natural, *others, *(["tensorrt"] if target == "portable" else [])]))
    if column.startswith("PTQ"):
        return [la.PostTrainingQuantization(target, calibration_batches=_BATCHES)], engines, 1
    if column == "channels, QAT":
        pruning = la.ChannelPruning(pruning_ratio=0.3, schedule="constant", start=0)
        return [pruning, la.QuantizationAwareTraining(target, start=1, calibration_batches=2)], engines, 2
    return [la.QuantizationAwareTraining(target, start=0, calibration_batches=2)], engines, 1


def _held_again(module: Any, bundle: Path, report: dict[str, Any], inputs: Any) -> dict[str, float]:
    """The bundle against the trained module, by means of this script alone: signal to noise of the worst output, in dB."""
    import numpy as np
    import torch
    from torch.utils import _pytree as pytree

    import lightning_accel as la

    module.eval()
    with torch.no_grad():
        result = module(**inputs) if isinstance(inputs, dict) else module(*inputs)
    wanted = [t.double().numpy() for t in pytree.tree_leaves(result) if isinstance(t, torch.Tensor)]
    arrays = [t.numpy() for t in pytree.tree_leaves(inputs)]
    found = {}
    for line in report["engines"]:
        if not line["runs_here"]:
            continue
        with la.load_runner(bundle, engine=line["engine"]) as runner:
            outputs = list(runner.run(dict(zip(runner.input_names, arrays, strict=True))).values())
        noise = [
            np.square(a - b).mean() / max(np.square(b).mean(), 1e-30) for a, b in zip(outputs, wanted, strict=True)
        ]
        found[line["engine"]] = round(float(-10 * np.log10(max(*noise, 1e-20, 1e-20))), 1)
    return found


def measured(network: str, column: str, seed: int, samples: int, seconds: float, megabytes: int) -> dict[str, Any]:
    """Run a cell in a process of its own, within limits, and say what happened."""
    with tempfile.TemporaryDirectory() as folder:
        path, log = Path(folder) / "result.json", Path(folder) / "log"
        cell = ["--cell", network, column, str(seed), str(path), "--samples", str(samples)]
        with log.open("w") as output:
            process = subprocess.Popen(
                [sys.executable, "-m", "experiments.real_zoo", *cell],
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=Path(__file__).parents[1],
                start_new_session=True,  # what it starts ends with it
            )
            try:
                over, peak, total = _watched(process, seconds, megabytes)
            except BaseException:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                raise
        found = json.loads(path.read_text()) if path.is_file() else {"seconds": {}, "mb": {}, "step": "start"}
        if "outcome" not in found:
            reason = over or f"the process ended with {process.returncode}: {' '.join(log.read_text().split())[-300:]}"
            found |= {"outcome": "failed", "reason": f"in step {found['step']}: {reason}"}
    found.pop("step")
    found["seconds"]["total"] = round(total, 2)
    return {"peak_mb": max(peak, *found["mb"].values(), 0), **found}


def _watched(process: subprocess.Popen, seconds: float, megabytes: int) -> tuple[str, int, float]:
    """Wait for a process, and end it at a limit: which one was passed, its peak memory in MB, its seconds."""
    began, over, peak = time.monotonic(), "", 0
    status = Path(f"/proc/{process.pid}/status")
    while process.poll() is None:
        time.sleep(0.2)
        try:
            now = int(status.read_text().split("VmRSS:")[1].split()[0]) // 1024
        except (OSError, IndexError):  # no such file system, or the process has just ended
            now = 0
        peak = max(peak, now)
        if now > megabytes:
            over = f"more than {megabytes} MB"
        elif time.monotonic() - began > seconds:
            over = f"more than {seconds:g} s"
        if over:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
    return over, peak, time.monotonic() - began


def recorded(path: Path) -> dict[tuple[str, str, int], dict[str, Any]]:
    """The newest line of each cell."""
    lines = [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []
    return {(line["network"], line["column"], line["seed"]): line for line in lines}


def cells(networks: Sequence[str], columns: Sequence[str], seeds: Sequence[int]) -> Iterator[tuple[str, str, int]]:
    """A whole column before the next one, so that a run that is stopped says something of every network."""
    for seed in seeds:
        for column in columns:
            for network in networks:
                yield network, column, seed


def table(lines: dict[tuple[str, str, int], dict[str, Any]]) -> str:
    """Networks by columns, seeds taken together: how many shipped; numbers below are the reasons of those that didn't."""
    networks = list(dict.fromkeys(network for network, _, _ in lines))
    columns = [c for c in COLUMNS if any(column == c for _, column, _ in lines)]
    reasons: dict[str, int] = {}
    rows = [
        f"| network | size | {' | '.join(columns)} | export, s | peak, MB |",
        "|---|--:|" + "---|" * len(columns) + "--:|--:|",
    ]
    for network in networks:
        shown = []
        of_network = [line for (n, _, _), line in lines.items() if n == network]
        for column in columns:
            found = [line for (n, c, _), line in lines.items() if (n, c) == (network, column)]
            shipped = sum(line["outcome"] == "ships" for line in found)
            notes = [
                f"{line['outcome']} {reasons.setdefault(line['reason'], len(reasons) + 1)}"
                for line in found
                if line["outcome"] != "ships"
            ]
            shown.append(", ".join([f"{shipped} of {len(found)} ship", *dict.fromkeys(notes)]) if found else "-")
        slowest = max((line["seconds"].get("export", 0.0) for line in of_network), default=0.0)
        memory = max((line["peak_mb"] for line in of_network), default=0)
        rows.append(f"| {network} | {of_network[0]['pixels']} | {' | '.join(shown)} | {slowest:.0f} | {memory:,} |")
    return "\n".join([*rows, "", *(f"{number}. {reason}" for reason, number in reasons.items())])


def main() -> None:
    """Run what is missing, or print what is known."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", nargs="+", metavar="NETWORK", help="these alone; default: all")
    parser.add_argument("--columns", nargs="+", choices=COLUMNS, default=COLUMNS, metavar="COLUMN", help="these alone")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--samples", type=int, default=32, help="held-out samples to verify on (default: 32)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no cell after so many minutes")
    parser.add_argument("--cell-seconds", type=float, default=900.0, help="limit of a cell (default: 900)")
    parser.add_argument("--cell-mb", type=int, default=8000, help="limit of a cell's memory (default: 8000)")
    parser.add_argument("--again", action="store_true", help="repeat cells that have a result")
    parser.add_argument("--table", action="store_true", help="print what is recorded as Markdown, and run nothing")
    parser.add_argument(
        "--results", type=Path, help=f"file with a JSON line for each cell (default: {RESULTS.name}, none if quick)"
    )
    parser.add_argument("--quick", action="store_true", help="one small cell: shows that it runs")
    parser.add_argument("--cell", nargs=4, metavar=("NETWORK", "COLUMN", "SEED", "PATH"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cell:
        network, column, seed, path = arguments.cell
        run_cell(network, column, int(seed), arguments.samples, Path(path))
        return
    if arguments.table:
        print(table(recorded(arguments.results or RESULTS)))
        return
    _run(parser, arguments)


def _run(parser: argparse.ArgumentParser, arguments: argparse.Namespace) -> None:
    names, pixels = _networks()
    networks = arguments.networks or names
    if unknown := sorted(set(networks) - set(names)):
        parser.error(f"argument --networks must be among {names}, but got {unknown}")
    columns, seeds, samples = arguments.columns, arguments.seeds, arguments.samples
    if arguments.quick:
        (networks, columns, seeds), samples = QUICK, 8
    began = time.monotonic()
    about = _about()
    results = arguments.results or (None if arguments.quick else RESULTS)
    known = recorded(results) if results is not None and not arguments.again else {}
    done: dict[tuple[str, str, int], dict[str, Any]] = {}
    for network, column, seed in cells(networks, columns, seeds):
        if (network, column, seed) in known:
            continue
        if time.monotonic() - began > 60 * arguments.minutes:
            break
        found = measured(network, column, seed, samples, arguments.cell_seconds, arguments.cell_mb)
        line = {
            "row": f"{network} / {column}",
            "network": network,
            "column": column,
            "seed": seed,
            "pixels": pixels[network],
            "samples": samples,
        }
        line |= {**found, "date": datetime.datetime.now().isoformat(timespec="seconds"), **about}
        done[network, column, seed] = line
        if results is not None:
            results.parent.mkdir(parents=True, exist_ok=True)
            with results.open("a") as file:
                file.write(json.dumps(line) + "\n")
        seconds = ", ".join(f"{step} {s:.0f}" for step, s in line["seconds"].items())
        said = f": {line['reason'][:300]}" if line["reason"] else ""
        print(
            f"{network}, {column}, seed {seed}: {line['outcome']}{said} (s: {seconds}; {line['peak_mb']} MB)",
            flush=True,
        )
    shipped = sum(line["outcome"] == "ships" for line in done.values())
    print(f"cells run: {len(done)}, shipped: {shipped}")


def _networks() -> tuple[list[str], dict[str, int]]:
    """Names and sizes, asked of a process of its own: one that has torch in memory would count in the memory of its children."""
    code = "import json; from experiments.real_networks import NETWORKS; print(json.dumps({n: v.pixels for n, v in NETWORKS.items()}))"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    pixels = json.loads(process.stdout.splitlines()[-1])
    return list(pixels), pixels


def _about() -> dict[str, Any]:
    """The machine and the versions."""
    from importlib.metadata import PackageNotFoundError, version

    from lightning_accel.benchmarking.environment import environment

    found = environment()
    versions = dict(found["packages"])
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cpu": found["cpu"],
        "cores": found["cores"],
        "threads": os.environ.get("OMP_NUM_THREADS"),
        "versions": versions,
    }


if __name__ == "__main__":
    main()
