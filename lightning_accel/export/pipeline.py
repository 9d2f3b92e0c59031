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
from lightning_accel.calls.example import mode
from lightning_accel.export.bundle_reports import REPORT_SCHEMA, kept_float, notes, verification_line, write_reports
from lightning_accel.export.candidates import LineUp, line_up, row_that_ships, run_all
from lightning_accel.export.default_engine import decide_default, output_kind_of
from lightning_accel.export.files import MODEL, Files, write_files
from lightning_accel.export.spec import Order
from lightning_accel.quantization.graph.prepare import quantization_map
from lightning_accel.quantization.ptq import quantized_after_training


def write_bundle(order: Order, dirpath: str | Path) -> dict[str, Any]:
    """Export, prove, build, measure, and write the bundle; nothing is left behind if a step fails.

    Args:
        order: what to ship.
        dirpath: the bundle's folder; an earlier bundle there is replaced.

    Returns:
        The report, as in ``report.json``.

    Raises:
        VerificationError: what was written isn't what was trained.
        MissingPackageError: an engine isn't installed.
    """
    with staged(dirpath) as folder, mode(order.module, False), tempfile.TemporaryDirectory() as scratch:
        whole = order.whole
        call = order.data.first_call(whole)
        files = write_files(order, whole, call, folder)
        made = line_up(order, files, call, folder, Path(scratch))
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
        report["ships"] = row_that_ships(made, content["default"], order, files, folder)
        report["rows"] = [row.to_dict() for row in made.rows.values()]
        write_reports(folder, report, list(made.rows.values()))
        write_manifest(
            folder,
            {
                **content,
                "axes": {n: {str(a): s for a, s in of_input.items()} for n, of_input in files.shipped.axes.items()},
                "metadata": dict(order.metadata),
                "complete": not order.marks,
                "marks": list(order.marks),
                "git": git_revision(),
                **{key: report[key] for key in ("phases", "compression", "verification", "proofs", "environment")},
                "benchmark": {**report["benchmark"], "rows": report["rows"], "threads": made.threads},
            },
        )
    return report


def _report(order: Order, files: Files, made: LineUp, measured: BenchmarkResult) -> dict[str, Any]:
    """The content of ``report.json``, but for which row ships."""
    null = [measured.null.low, measured.null.high]
    return {
        "schema": REPORT_SCHEMA,
        "title": f"{type(order.module).__name__.removeprefix('Distilled')}, as it ships",
        "command": order.command,
        "rows": [],
        "batch_size": order.batch_size,
        "threads": made.threads,
        "verification": [verification_line(check) for check in files.checks],
        "proofs": files.proofs,
        "engines": made.lines,
        "compression": {**order.compression, **kept_float(order.module), **files.kept},
        "quantization": quantization_map(order.module),
        "phases": list(order.history),
        "timeline": [dict(span) for span in order.timeline],
        "curves": [dict(point) for point in order.curves],
        "run": dict(order.run),
        "benchmark": {"null_ratio": null, "rounds": measured.rounds, "noisy": measured.noisy},
        "environment": environment(),
        "notes": [*order.marks, *made.earned, *notes(order, files.samples, files.proofs, measured, made.threads)],
    }
