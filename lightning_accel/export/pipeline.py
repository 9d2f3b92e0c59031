"""The steps from a trained network to a bundle: convert, export, verify, build, verify engines, benchmark, report.

:class:`~lightning_accel.export.callback.ModelExport` calls this function when ``fit`` ends.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_info

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.layer_times import layer_times
from lightning_accel.benchmarking.measure import BenchmarkResult
from lightning_accel.bundle.model_card import MODEL_CARD, model_card
from lightning_accel.bundle.revision import git_revision
from lightning_accel.bundle.writer import staged, write_manifest
from lightning_accel.calls.contexts import mode
from lightning_accel.core.progress import progress_of
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import sha256_of
from lightning_accel.export.bundle_reports import kept_float, notes, verification_line, write_reports
from lightning_accel.export.candidates import (
    Candidates,
    choose_candidate,
    list_candidates,
    manifest_default,
    row_that_ships,
    run_all,
)
from lightning_accel.export.class_report import classes_of, flipped_of
from lightning_accel.export.default_engine import decide_default, output_kind_of
from lightning_accel.export.file_size import why_not_smaller
from lightning_accel.export.files import MODEL, REFERENCE, Files, write_files
from lightning_accel.export.previous import since
from lightning_accel.export.spec import ExportSpec
from lightning_accel.export.verdict import verdict_of, with_budgets
from lightning_accel.quantization.graph.prepare import quantization_map
from lightning_accel.quantization.ptq import quantized_after_training
from lightning_accel.reports.model import INCOMPLETE, QAT_BENEFIT, SIZE, UNUSED_INPUTS, Note, Report


def write_bundle(spec: ExportSpec, dirpath: str | Path) -> Report:
    """Export, verify, build, measure, and write the bundle; a failed step leaves no files behind.

    Args:
        spec: the export.
        dirpath: the bundle's folder; an earlier bundle there is replaced.

    Returns:
        The report.

    Raises:
        VerificationError: an exported file differs from the trained network, or every engine does.
        MissingPackageError: an engine isn't installed.
    """
    steps = {"write and verify files": 4.0, "build engines": 2.0, "verify engines and measure": 4.0}
    steps |= {} if spec.budgets is None else {"compare runtime variants": 10.0}
    progress = progress_of(spec.data.trainer, "ModelExport", {**steps, "write the report": 1.0})
    with progress, staged(dirpath) as folder, mode(spec.module, False), tempfile.TemporaryDirectory() as scratch:
        progress.step("write and verify files")
        whole = spec.whole
        files = write_files(spec, whole, spec.example(whole), folder)
        progress.step("build engines")
        candidates = list_candidates(spec, files, folder, Path(scratch))
        progress.step("verify engines and measure")
        measured = run_all(candidates, spec, files, whole, folder)
        report = _report(spec, files, candidates, measured, _of_the_file(files, folder))
        choice = choose_candidate(candidates, measured, spec)
        default = manifest_default(candidates, choice.ships)
        report.failed = candidates.failures.replaced(spec.engines, default["engine"])
        content: dict[str, Any] = {
            "default": default,
            "engines": {line["engine"]: line for line in candidates.lines},
            "failed": {f.engine: {"step": f.step, "reason": f.reason} for f in report.failed},
            "model": MODEL,
            "precision": spec.precision,
            "trained": "int8" if spec.precision == "int8" and not quantized_after_training(spec.module) else "fp32",
            "output_kind": output_kind_of(spec, files, labelled=candidates.labelled),
            "inputs": list(files.shipped.input_names),
            "outputs": list(files.shipped.output_names),
            "batch_axes": files.layout.axes,
            "input_ranges": _ranges(files),
            "unused_inputs": list(files.shipped.unused),
        }
        if spec.budgets is not None:
            progress.step("compare runtime variants")
            content |= decide_default(spec, files, folder, content, report)
            comparison = report.comparison or {}
            choice = with_budgets(choice, comparison.get("decision"), comparison.get("baseline", ""))
        progress.step("write the report")
        report.ships = row_that_ships(candidates, content["default"], spec, files, folder)
        report.rows = list(candidates.rows.values())
        report.verdict = verdict_of(candidates, choice, report, spec)
        _add_details(report, spec, files, candidates, folder, content["default"], dirpath)
        write_reports(folder, report)
        written = report.to_dict()
        content |= {
            "ships": report.ships,
            "axes": {n: {str(a): s for a, s in of_input.items()} for n, of_input in files.shipped.axes.items()},
            "metadata": dict(spec.metadata),
            "complete": not spec.unfinished,
            "unfinished": list(spec.unfinished),
            "git": git_revision(),
            "run": {"id": spec.run.get("id"), "checkpoint": _checkpoint(spec.checkpoint)},
            **{key: written[key] for key in ("phases", "layers", "verification", "proofs", "environment")},
            "benchmark": {**report.benchmark, "rows": written["rows"], "threads": candidates.threads},
        }
        name = report.title.partition(",")[0]
        # Its inputs and outputs are those of any precision, and ONNX Runtime's CPU can't load bf16.
        with load_runner(files.shipped.path, "onnxruntime", emulate=True) as runner:
            card = model_card(name, content, runner.inputs, runner.outputs)
        (folder / MODEL_CARD).write_text(card, encoding="utf-8")
        write_manifest(folder, content)
    return report


def _add_details(
    report: Report,
    spec: ExportSpec,
    files: Files,
    candidates: Candidates,
    folder: Path,
    default: dict[str, Any],
    dirpath: str | Path,
) -> None:
    """Add what a reader asks next: class by class, what changed, time per layer, costs, and the bundle before."""
    report.price_per_hour = spec.price_per_hour
    verdict, seen = report.verdict, candidates.predicted
    if seen is not None:
        baseline = "" if verdict is None else verdict.baseline
        report.classes = classes_of(seen, report.ships, baseline, spec.metadata.get("class_names"))
        report.flipped = flipped_of(seen, report.ships, candidates.float32, spec, spec.flipped)
    shipped = candidates.rows[report.ships]
    file = folder / default["file"]
    if shipped.p50_ms is None:  # it doesn't run on this machine
        return
    if default["engine"] == "onnxruntime":
        feeds = files.layout.sized(files.samples, spec.batch_size)
        report.layer_times = {**layer_times(file, feeds, candidates.threads), "batch": spec.batch_size}
    earlier = Path(spec.previous or dirpath)
    report.previous = since(earlier, shipped, file, files, spec, candidates.threads, classify=seen is not None)


def _ranges(files: Files) -> dict[str, list[float]]:
    """Smallest and largest number of each input among the samples; what comes later may be held against them."""
    found = {}
    for name, array in files.samples.items():
        finite = array[np.isfinite(array)] if array.dtype.kind == "f" else array
        if finite.size and array.dtype.kind in "iuf":
            found[name] = [float(finite.min()), float(finite.max())]
    return found


def _checkpoint(path: str) -> dict[str, Any] | None:
    """Name and SHA-256 of the checkpoint that a bundle was made from; ``None`` without one, as where weights were never saved."""
    if not Path(path).is_file():
        return None
    return {"file": Path(path).name, "sha256": sha256_of(path)}


def _of_the_file(files: Files, folder: Path) -> list[Note]:
    """Notes on the inputs and the size of the file that ships."""
    found = []
    if files.shipped.unused:
        left_out = ", ".join(f"`{name}`" for name in files.shipped.unused)
        found.append(Note(UNUSED_INPUTS, f"The file has no inputs for {left_out}: no output depends on them."))
    if files.shipped.trained and (why := why_not_smaller(folder / MODEL, folder / REFERENCE)):
        rank_zero_info(f"ModelExport: {why}")
        found.append(Note(SIZE, why))
    return found


def _report(
    spec: ExportSpec, files: Files, candidates: Candidates, measured: BenchmarkResult, of_the_file: list[Note]
) -> Report:
    """The report without its rows and the one that ships."""
    return Report(
        title=f"{type(spec.module).__name__.removeprefix('Distilled')}, as it ships",
        command=spec.command,
        batch_size=spec.batch_size,
        threads=candidates.threads,
        verification=[verification_line(check) for check in files.checks],
        proofs=files.proofs,
        engines=candidates.lines,
        layers=[*spec.compression, *kept_float(spec.module), *files.kept],
        quantization=quantization_map(spec.module),
        phases=list(spec.history),
        timeline=list(spec.timeline),
        curves=[dict(point) for point in spec.curves],
        run=dict(spec.run),
        benchmark={
            "null_ratio": [measured.null.low, measured.null.high],
            "rounds": measured.rounds,
            "noisy": measured.noisy,
        },
        environment=environment(),
        notes=[
            *(Note(INCOMPLETE, reason) for reason in spec.unfinished),
            *(Note(QAT_BENEFIT, line) for line in candidates.earned),
            *of_the_file,
            *notes(spec, files.samples, files.proofs, measured, candidates.threads),
        ],
    )
