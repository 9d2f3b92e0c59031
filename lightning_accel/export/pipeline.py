"""Pipeline: convert -> ONNX -> check -> verify -> engines -> verify again -> benchmark -> report, into one bundle.

What :class:`~lightning_accel.export.callback.ModelExport` schedules, as a plain function.
"""

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from torch import nn

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.benchmarking.plots import plot_comparison
from lightning_accel.benchmarking.report import Row, comparison_table, render_markdown
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.tensorrt import build_engine, has_gpu
from lightning_accel.export.bundle import staged, write_manifest
from lightning_accel.export.evaluate import count_correct, module_network, through_engine, user_metrics
from lightning_accel.export.held_out import HeldOut
from lightning_accel.export.integers import check_integers
from lightning_accel.export.onnx import OnnxExport, export_onnx
from lightning_accel.export.proof import prove_file
from lightning_accel.export.tolerances import EMULATED_INT8, FLOAT, KERNEL_INT8, Tolerance
from lightning_accel.export.verification import Network, Verification, VerificationError, verify
from lightning_accel.inputs import mode, own_forward
from lightning_accel.quantization.prepare import quantized_forwards

MODEL, REFERENCE = "model.onnx", "reference.onnx"
ENGINES = ("onnxruntime", "openvino", "tensorrt")


@dataclass
class Order:
    """What is to be shipped, and how it is to be checked.

    Args:
        module: the LightningModule.
        part: the submodule whose ``forward`` is exported; ``module`` itself, usually.
        data: held-out batches.
        engines: engines to ship to.
        samples: held-out samples to verify on, or all if there are fewer.
        batch_size: samples in a call of the benchmark.
        teacher: network to compare with, called as ``part`` is; ``None`` for none.
        history: lines for the report: what was done to the network and when.
        compression: measured values for the report.
        command: command that repeats the export.
        marks: reasons why the network isn't what was asked for; they go into manifest and report.
    """

    module: L.LightningModule
    part: nn.Module
    data: HeldOut
    engines: Sequence[str]
    samples: int = 512
    batch_size: int = 32
    teacher: nn.Module | None = None
    history: Sequence[str] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    marks: Sequence[str] = ()


def write_bundle(order: Order, dirpath: str | Path) -> dict[str, Any]:
    """Export, prove, build, measure, and write the bundle; nothing is left behind if a step fails.

    Args:
        order: what to ship.
        dirpath: the bundle's folder; an earlier bundle there is replaced.

    Returns:
        The report, as in ``report.json``.

    Raises:
        VerificationError: what was written isn't what was trained.
        ModuleNotFoundError: an engine isn't installed.
    """
    with staged(dirpath) as folder, mode(order.module, False), tempfile.TemporaryDirectory() as scratch:
        call = order.data.first_call(order.part)
        quantized = bool(quantized_forwards(order.module))
        shipped = export_onnx(order.part, call, folder / MODEL)
        proofs: dict[str, Any] = {"integers": check_integers(shipped.path, shipped.trained)} if quantized else {}
        samples = order.data.samples(order.part, shipped.input_names, order.samples)
        trained = module_network(order.part, shipped, call)
        sizes, tolerance = (1, 7, order.batch_size), EMULATED_INT8 if quantized else FLOAT
        check, proofs["nodes"] = prove_file(
            shipped, trained, samples, tolerance=tolerance, batch_sizes=sizes, repeat=order.command
        )
        checks = [check]
        if quantized:
            with _float(order.module):
                floating = export_onnx(order.part, call, folder / REFERENCE, quantized=False)
                plain = module_network(order.part, floating, call)
                check, _ = prove_file(
                    floating,
                    plain,
                    samples,
                    tolerance=FLOAT,
                    what="fp32 reference (as written)",
                    batch_sizes=sizes,
                    repeat=order.command,
                )
                checks.append(check)

        runners: dict[str, Runner] = {}
        files: dict[str, Path] = {}
        rows: dict[str, Row] = {}
        parameters = sum(p.numel() for p in order.part.parameters())
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        if order.teacher is not None:
            teacher = export_onnx(order.teacher, call, Path(scratch) / "teacher.onnx", input_names=shipped.input_names)
            files["teacher"] = teacher.path
            rows["teacher"] = Row(
                "teacher", "onnxruntime", parameters=sum(p.numel() for p in order.teacher.parameters())
            )
        name = "student" if order.teacher is not None else "network"
        if quantized:
            files[f"{name} fp32"] = folder / REFERENCE
            rows[f"{name} fp32"] = Row(f"{name} fp32", "onnxruntime", parameters=parameters)
        kind = "int8" if quantized else "fp32"
        engines = [_build(engine, shipped.path, folder) for engine in order.engines]
        shipped_rows = []
        for line in engines:
            label = f"{name} {kind}" if f"{name} {kind}" not in rows else f"{name} {kind}, {line['engine']}"
            file = folder / line["file"]
            rows[label] = Row(label, line["engine"], parameters=parameters, file_bytes=file.stat().st_size)
            if line["runs_here"]:
                files[label] = file
                shipped_rows.append(label)
            else:
                rows[label].note = line["status"]
        try:
            for label, file in files.items():
                runners[label] = load_runner(file, rows[label].engine, threads=threads)
                rows[label].file_bytes = file.stat().st_size
            limits = KERNEL_INT8 if quantized else FLOAT
            checks += [
                _verify_engine(order, shipped, trained, runners[label], samples, limits) for label in shipped_rows
            ]
            counts = count_correct(
                {label: runner.run for label, runner in runners.items()}, shipped, order.part, order.data
            )
            rows |= {label: replace(rows[label], correct=c, total=n) for label, (c, n) in counts.items()}
            measured = _measure_latency(rows, runners, samples, order.batch_size)
        finally:
            for runner in runners.values():
                runner.close()

        report = {
            "title": f"{type(order.module).__name__.removeprefix('Distilled')}, as it ships",
            "command": order.command,
            "rows": [row.to_dict() for row in rows.values()],
            "batch_size": order.batch_size,
            "threads": threads,
            "verification": [_verification_line(check) for check in checks],
            "proofs": proofs,
            "engines": engines,
            "compression": {**order.compression, **_kept_float(order.module)},
            "phases": list(order.history),
            "benchmark": {
                "null_ratio": [measured.null.low, measured.null.high],
                "rounds": measured.rounds,
                "noisy": measured.noisy,
            },
            "environment": environment(),
            "notes": [*order.marks, *_notes(order, samples, proofs, measured, threads)],
        }
        _write_reports(folder, report, list(rows.values()))
        default = next((line for line in engines if line["runs_here"]), engines[0])
        write_manifest(
            folder,
            {
                "default": {"engine": default["engine"], "file": default["file"]},
                "engines": {line["engine"]: line for line in engines},
                "inputs": list(shipped.input_names),
                "outputs": list(shipped.output_names),
                "complete": not order.marks,
                "marks": list(order.marks),
                "verification": report["verification"],
                "environment": report["environment"],
            },
        )
    return report


def _float(module: nn.Module) -> ExitStack:
    """The float network under the fake-quants."""
    stack = ExitStack()
    for path in quantized_forwards(module):
        stack.enter_context(own_forward(module.get_submodule(path)))
    return stack


def _verify_engine(
    order: Order,
    export: OnnxExport,
    network: Network,
    runner: Runner,
    samples: Mapping[str, np.ndarray],
    tolerance: Tolerance,
) -> Verification:
    """The engine's own kernels against PyTorch: outputs, predictions, and the user's metric."""
    check = verify(
        network,
        runner.run,
        samples,
        engine=f"{runner.engine} (its kernels)",
        tolerance=tolerance,
        batch_sizes=(1, 7, order.batch_size),
    )
    try:
        before = user_metrics(order.module, order.data)
        with through_engine(order.part, export, runner.run) as calls:
            after = user_metrics(order.module, order.data)
    except VerificationError:
        raise
    except Exception as error:  # the user's own validation code, run outside of the run it was written for
        check.note = f"the user's metric could not be measured through the engine: {error}"
        before = after = {}
        calls = [1]
    if before and not calls[0]:
        check.note = "`validation_step` does not call the exported forward, so its metric can't go through the engine"
        before = {}
    for name in before.keys() & after.keys():
        check.metric[name] = (before[name], after[name])
        scale = max(1.0, abs(before[name]))
        if not abs(before[name] - after[name]) <= tolerance.metric * scale + 1e-12 and not name.endswith("loss"):
            check.failures.append(f"the metric `{name}` is {after[name]:.4f} instead of {before[name]:.4f}")
    if not check.passed:
        check.first_divergence = "The file as written passed, so the difference lies in this engine's kernels."
    check.raise_if_failed(order.command)
    return check


def _build(engine: str, model: Path, folder: Path) -> dict[str, Any]:
    """Build what an engine needs; returns the report's line."""
    if engine != "tensorrt":
        return {"engine": engine, "status": "verified and measured here", "file": MODEL, "runs_here": True}
    info = build_engine(model, folder / "engines" / "model.engine")
    runs = has_gpu()
    return {
        "engine": engine,
        "status": "built, verified and measured here" if runs else "built here, not run",
        "file": f"engines/{info.path.name}",
        "runs_here": runs,
        "library": info.library,
        "version": info.version,
        "precision": info.precision,
    }


def _measure_latency(
    rows: dict[str, Row], runners: Mapping[str, Runner], samples: Mapping[str, np.ndarray], batch: int
) -> Any:
    feeds = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in samples.items()}
    measured = benchmark({label: partial(runner.run, feeds) for label, runner in runners.items()})
    for m in measured.measurements:
        row = rows[m.name]
        row.p50_ms, row.p90_ms = m.p50_ms, m.p90_ms
        row.speedup, row.speedup_low, row.speedup_high = m.speedup.value, m.speedup.low, m.speedup.high
    return measured


def _verification_line(check: Verification) -> dict[str, Any]:
    line = check.to_dict()
    del line["tolerance"]["why"]
    return {k: v for k, v in line.items() if v not in ("", [], {})}


def _readable(line: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the verification for a table: nested values in words."""
    words = {
        "batch_sizes": lambda v: ", ".join(f"{size} ({count})" for size, count in v.items()),
        "tolerance": lambda v: f"median {v['median']:g}, max {v['maximum']:g}, agreement {v['agreement']:g}",
        "metric": lambda v: ", ".join(f"{name} {a:.4f} -> {b:.4f}" for name, (a, b) in v.items()),
    }
    titles = {"batch_sizes": "batch sizes (samples)", "metric": "metric, PyTorch -> engine"}
    return {titles.get(k, k): words[k](v) if k in words else v for k, v in line.items()}


def _kept_float(module: nn.Module) -> dict[str, Any]:
    kept = {name: why for f in quantized_forwards(module).values() for name, why in f.kept_float.items()}
    return {"kept in float": kept} if kept else {}


def _notes(
    order: Order, samples: Mapping[str, np.ndarray], proofs: Mapping[str, Any], measured: Any, threads: int
) -> list[str]:
    count = len(next(iter(samples.values())))
    notes = [
        f"Verified on {count} samples of the {order.data.source}; accuracy over all of it.",
        f"Latency of one call with a batch of {order.batch_size} and {threads} threads, interleaved; the engine alone.",
    ]
    if "integers" in proofs:
        n = proofs["integers"]
        notes.append(
            f"Bit for bit: {n['integers']} integers in {n['weights']} weights, {n['activations']} activation scales and zero points, "
            f"and {n['nodes']} Q/DQ nodes fed the same inputs equal the trained ones."
        )
    nodes = proofs["nodes"]
    notes.append(
        f"Node by node: {nodes['compared']} of the file's {nodes['of']} nodes, each fed the same inputs, compute what PyTorch does; "
        f"the largest error is {nodes['largest_error']:.1e} of the node's range."
    )
    if measured.noisy:
        notes.append(
            "This machine was too noisy for fine distinctions: a network compared with itself gave an interval beyond 10 %."
        )
    return notes


def _write_reports(folder: Path, report: dict[str, Any], rows: list[Row]) -> None:
    plot_comparison(rows, folder / "report.png")
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    readable = {**report, "verification": [_readable(line) for line in report["verification"]]}
    (folder / "report.md").write_text(render_markdown(readable) + "\n![accuracy and latency](report.png)\n")


def summary(report: Mapping[str, Any], dirpath: str | Path) -> str:
    """The report's table and where the rest is, for the terminal."""
    lines = [comparison_table([Row(**row) for row in report["rows"]])]
    lines += [f"TensorRT: {e['status']}" for e in report["engines"] if e["engine"] == "tensorrt"]
    return "\n".join([*lines, f"Report: {Path(dirpath) / 'report.md'}"])
