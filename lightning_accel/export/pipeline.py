"""Pipeline: convert -> ONNX -> check -> verify -> engines -> verify again -> benchmark -> report, into one bundle.

What :class:`~lightning_accel.export.callback.ModelExport` schedules, as a plain function.
"""

import tempfile
from pathlib import Path
from typing import Any

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import BenchmarkResult
from lightning_accel.bundle.revision import git_revision
from lightning_accel.bundle.writer import staged, write_manifest
from lightning_accel.calls.contexts import mode
from lightning_accel.export.bundle_reports import kept_float, notes, verification_line, write_reports
from lightning_accel.export.candidates import LineUp, line_up, row_that_ships, run_all
from lightning_accel.export.default_engine import decide_default, output_kind_of
from lightning_accel.export.files import MODEL, Files, write_files
from lightning_accel.export.spec import Order
from lightning_accel.quantization.graph.prepare import quantization_map
from lightning_accel.quantization.ptq import quantized_after_training
from lightning_accel.reports.model import INCOMPLETE, QAT_BENEFIT, Note, Report


def write_bundle(order: Order, dirpath: str | Path) -> Report:
    """Export, prove, build, measure, and write the bundle; nothing is left behind if a step fails.

    Args:
        order: what to ship.
        dirpath: the bundle's folder; an earlier bundle there is replaced.

    Returns:
        The report.

    Raises:
        VerificationError: what was written isn't what was trained.
        MissingPackageError: an engine isn't installed.
    """
    with staged(dirpath) as folder, mode(order.module, False), tempfile.TemporaryDirectory() as scratch:
        whole = order.whole
        files = write_files(order, whole, order.example(whole), folder)
        made = line_up(order, files, folder, Path(scratch))
        measured = run_all(made, order, files, whole, folder)
        report = _report(order, files, made, measured)
        default = next((line for line in made.lines if line["runs_here"]), made.lines[0])
        content: dict[str, Any] = {
            "default": {"engine": default["engine"], "file": default["file"]},
            "engines": {line["engine"]: line for line in made.lines},
            "model": MODEL,
            "precision": order.precision,
            "trained": "int8" if order.precision == "int8" and not quantized_after_training(order.module) else "fp32",
            "output_kind": output_kind_of(order, files, labelled=made.labelled),
            "inputs": list(files.shipped.input_names),
            "outputs": list(files.shipped.output_names),
        }
        if order.budgets is not None:
            content |= decide_default(order, files, folder, content, report)
        report.ships = row_that_ships(made, content["default"], order, files, folder)
        report.rows = list(made.rows.values())
        write_reports(folder, report)
        written = report.to_dict()
        write_manifest(
            folder,
            {
                **content,
                "axes": {n: {str(a): s for a, s in of_input.items()} for n, of_input in files.shipped.axes.items()},
                "metadata": dict(order.metadata),
                "complete": not order.unfinished,
                "unfinished": list(order.unfinished),
                "git": git_revision(),
                **{key: written[key] for key in ("phases", "layers", "verification", "proofs", "environment")},
                "benchmark": {**report.benchmark, "rows": written["rows"], "threads": made.threads},
            },
        )
    return report


def _report(order: Order, files: Files, made: LineUp, measured: BenchmarkResult) -> Report:
    """The report, but for the rows and which one ships."""
    return Report(
        title=f"{type(order.module).__name__.removeprefix('Distilled')}, as it ships",
        command=order.command,
        batch_size=order.batch_size,
        threads=made.threads,
        verification=[verification_line(check) for check in files.checks],
        proofs=files.proofs,
        engines=made.lines,
        layers=[*order.compression, *kept_float(order.module), *files.kept],
        quantization=quantization_map(order.module),
        phases=list(order.history),
        timeline=list(order.timeline),
        curves=[dict(point) for point in order.curves],
        run=dict(order.run),
        benchmark={
            "null_ratio": [measured.null.low, measured.null.high],
            "rounds": measured.rounds,
            "noisy": measured.noisy,
        },
        environment=environment(),
        notes=[
            *(Note(INCOMPLETE, reason) for reason in order.unfinished),
            *(Note(QAT_BENEFIT, line) for line in made.earned),
            *notes(order, files.samples, files.proofs, measured, made.threads),
        ],
    )
