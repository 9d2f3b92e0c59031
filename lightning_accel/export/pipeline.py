"""Pipeline: convert -> ONNX -> check -> verify -> engines -> verify again -> benchmark -> report, into one bundle.

What :class:`~lightning_accel.export.callback.ModelExport` schedules, as a plain function.
"""

import math
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import usable_cores
from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.benchmarking.report import Row
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.export import tolerances
from lightning_accel.export.bundle import staged, write_manifest
from lightning_accel.export.deciding import decide_default
from lightning_accel.export.evaluate import count_correct, through_engine, user_metrics
from lightning_accel.export.files import MODEL, REFERENCE, Files, build_line, write_files
from lightning_accel.export.onnx import OnnxExport, export_onnx
from lightning_accel.export.order import Order
from lightning_accel.export.reports import REPORT_SCHEMA, kept_float, notes, verification_line, write_reports
from lightning_accel.export.revision import git_revision
from lightning_accel.export.rival import build_rival, decide, verify_rival
from lightning_accel.export.surrounded import surrounded
from lightning_accel.export.tolerances import Tolerance
from lightning_accel.export.untrained import beside_untrained
from lightning_accel.export.verification import Verification, VerificationError, verify
from lightning_accel.inputs import mode
from lightning_accel.quantization.prepare import quantization_map

RIVAL = "network fp16, tensorrt"
ENGINES = ("onnxruntime", "openvino", "tensorrt", "pytorch")


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
        whole = order.whole
        call = order.data.first_call(whole)
        files = write_files(order, whole, call, folder)
        shipped, samples = files.shipped, files.samples
        runners: dict[str, Runner] = {}
        paths: dict[str, Path] = {}
        rows: dict[str, Row] = {}
        parameters = sum(p.numel() for p in order.part.parameters())
        threads = usable_cores()
        if order.teacher is not None:
            teacher = surrounded(order.teacher, order.preprocess, order.postprocess)
            path = Path(scratch) / "teacher.onnx"
            paths["teacher"] = export_onnx(teacher, call, path, input_names=shipped.input_names).path
            rows["teacher"] = Row(
                "teacher", "onnxruntime", parameters=sum(p.numel() for p in order.teacher.parameters())
            )
        name = "student" if order.teacher is not None else "network"
        if (folder / REFERENCE).is_file():
            paths[f"{name} fp32"] = folder / REFERENCE
            rows[f"{name} fp32"] = Row(f"{name} fp32", "onnxruntime", parameters=parameters)
        engines = [build_line(engine, files, folder) for engine in order.engines]
        shipped_rows, labels = {}, {}
        for line in engines:
            label = f"{name} {order.precision}"
            label = label if label not in rows else f"{label}, {line['engine']}"
            file = folder / line["file"]
            labels[line["engine"]] = label
            rows[label] = Row(label, line["engine"], parameters=parameters, file_bytes=file.stat().st_size)
            if line["runs_here"]:
                paths[label] = file
                shipped_rows[label] = line["precision"]
            else:
                rows[label].note = line["status"]
        int8 = next((label for label, precision in shipped_rows.items() if precision == "int8+fp16"), None)
        if int8 is not None:  # a GPU is here: int8 has to prove that it is worth it
            rival = build_rival(folder, REFERENCE, samples)
            paths[RIVAL], rows[RIVAL] = folder / rival["file"], Row(RIVAL, "tensorrt", parameters=parameters)
        try:
            for label, file in paths.items():
                engine = rows[label].engine
                runners[label] = load_runner(file, engine, threads=None if engine == "tensorrt" else threads)
                rows[label].file_bytes = file.stat().st_size
            files.checks += [
                _verify_engine(order, files, runners[label], tolerances.ENGINES[precision])
                for label, precision in shipped_rows.items()
            ]
            if int8 is not None:
                check = verify_rival(runners[RIVAL], folder / REFERENCE, samples, (1, 7, order.batch_size))
                check.raise_if_failed(order.command)
                files.checks.append(check)
            networks = {label: runner.run for label, runner in runners.items()}
            counts = count_correct(networks, shipped, whole, order.data)
            rows |= {label: replace(rows[label], correct=c, total=n) for label, (c, n) in counts.items()}
            rows, earned = beside_untrained(rows, f"{name} {order.precision}", order, whole)
            measured = _measure_latency(rows, runners, samples, order.batch_size)
        finally:
            for runner in runners.values():
                runner.close()

        if int8 is not None:
            decision = decide(measured[RIVAL].samples, measured[int8].samples)
            rows[RIVAL].note = decision.why
            line = next(line for line in engines if line["engine"] == "tensorrt")
            others = {key: line[key] for key in rival} if not decision.int8 else rival
            line |= {**({} if decision.int8 else rival), "decision": decision.why, "alternative": others}
        null = [measured.null.low, measured.null.high]
        measurement = {"null_ratio": null, "rounds": measured.rounds, "noisy": measured.noisy}
        report: dict[str, Any] = {
            "schema": REPORT_SCHEMA,
            "title": f"{type(order.module).__name__.removeprefix('Distilled')}, as it ships",
            "command": order.command,
            "rows": [row.to_dict() for row in rows.values()],
            "batch_size": order.batch_size,
            "threads": threads,
            "verification": [verification_line(check) for check in files.checks],
            "proofs": files.proofs,
            "engines": engines,
            "compression": {**order.compression, **kept_float(order.module), **files.kept},
            "quantization": quantization_map(order.module),
            "phases": list(order.history),
            "timeline": [dict(span) for span in order.timeline],
            "curves": [dict(point) for point in order.curves],
            "run": dict(order.run),
            "benchmark": measurement,
            "environment": environment(),
            "notes": [*order.marks, *earned, *notes(order, samples, files.proofs, measured, threads)],
        }
        default = next((line for line in engines if line["runs_here"]), engines[0])
        content: dict[str, Any] = {
            "default": {"engine": default["engine"], "file": default["file"]},
            "engines": {line["engine"]: line for line in engines},
            "model": MODEL,
            "precision": order.precision,
            "inputs": list(shipped.input_names),
            "outputs": list(shipped.output_names),
        }
        if order.budgets is not None:
            content |= decide_default(order, files, folder, content, report, labelled=bool(counts))
        ships = content["default"]
        ran = {(rows[label].engine, file): label for label, file in paths.items()}
        report["ships"] = ran.get((ships["engine"], folder / ships["file"]))
        if report["ships"] is None and "precision" in ships:  # decided, and the run asked for no such engine or file
            label = f"{name} {ships['precision']}, {ships['engine']}"
            row = Row(label, ships["engine"], parameters=parameters, file_bytes=(folder / ships["file"]).stat().st_size)
            rows[label] = _beside_first(rows, paths, row, folder / ships["file"], files, order)
            report |= {"ships": label, "rows": [row.to_dict() for row in rows.values()]}
        elif report["ships"] is None:  # built, and not run here
            report["ships"] = labels[ships["engine"]]
        write_reports(folder, report, list(rows.values()))
        write_manifest(
            folder,
            {
                **content,
                "axes": {n: {str(a): s for a, s in of_input.items()} for n, of_input in shipped.axes.items()},
                "metadata": dict(order.metadata),
                "complete": not order.marks,
                "marks": list(order.marks),
                "git": git_revision(),
                **{key: report[key] for key in ("phases", "compression", "verification", "proofs", "environment")},
                "benchmark": {**measurement, "rows": report["rows"], "threads": threads},
            },
        )
    return report


def _verify_engine(order: Order, files: Files, runner: Runner, tolerance: Tolerance) -> Verification:
    """The engine's own kernels against PyTorch: outputs, predictions, and the user's metric."""
    check = verify(
        files.network,
        runner.run,
        files.samples,
        engine=f"{runner.engine} (its kernels)",
        tolerance=tolerance,
        batch_sizes=(1, 7, order.batch_size),
        axes=files.shipped.axes,
    )
    if not order.bare:
        check.note = (
            "the user's metric was not measured through the engine, whose inputs or outputs aren't the network's"
        )
    else:
        _measure_metric(order, files.shipped, runner, check)
    if not check.passed:
        check.first_divergence = "The file as written passed, so the difference lies in this engine's kernels."
    check.raise_if_failed(order.command)
    return check


def _measure_metric(order: Order, export: OnnxExport, runner: Runner, check: Verification) -> None:
    """The user's own metric, by PyTorch and through the engine."""
    try:
        before = user_metrics(order.module, order.data)
        with through_engine(order.part, export, runner.run) as calls:
            after = user_metrics(order.module, order.data)
    except VerificationError:
        raise
    except Exception as error:  # the user's own validation code, run outside of the run it was written for
        check.note = f"the user's metric could not be measured through the engine: {error}"
        return
    if before and not calls[0]:
        check.note = "`validation_step` does not call the exported forward, so its metric can't go through the engine"
        return
    for name in sorted(before.keys() & after.keys()):
        one, two = before[name], after[name]
        finite = math.isfinite(one) and math.isfinite(two)
        if not finite and (one == two or (math.isnan(one) and math.isnan(two))):
            told = f"the metric `{name}` is {one} by PyTorch and through the engine: there is nothing to compare"
            check.note = f"{check.note}; {told}" if check.note else told
            continue
        check.metric[name] = (one, two)
        near = finite and (
            name.endswith("loss") or abs(one - two) <= check.tolerance.metric * max(1.0, abs(one)) + 1e-12
        )
        if not near:
            check.failures.append(f"the metric `{name}` is {two:.4f} instead of {one:.4f}")


def _beside_first(
    rows: Mapping[str, Row], paths: Mapping[str, Path], row: Row, file: Path, files: Files, order: Order
) -> Row:
    """A row for one more way, measured beside the first of those that ran."""
    first = next(iter(paths))
    threads = usable_cores()
    with (
        load_runner(paths[first], rows[first].engine, threads=threads) as before,
        load_runner(file, row.engine, threads=threads) as runner,
    ):
        counts = count_correct({row.name: runner.run}, files.shipped, order.whole, order.data)
        correct, total = counts.get(row.name, (None, None))
        pair = {first: replace(rows[first]), row.name: replace(row, correct=correct, total=total)}
        _measure_latency(pair, {first: before, row.name: runner}, files.samples, order.batch_size)
    return pair[row.name]


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
