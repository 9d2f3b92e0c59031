"""Pipeline: convert -> ONNX -> check -> verify -> engines -> verify again -> benchmark -> report, into one bundle.

What :class:`~lightning_accel.export.callback.ModelExport` schedules, as a plain function.
"""

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.facts import decision_of, facts
from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.benchmarking.page import render_html
from lightning_accel.benchmarking.plots import plot_comparison
from lightning_accel.benchmarking.report import Row, comparison_table, render_markdown
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.export import tolerances
from lightning_accel.export.bundle import staged, write_manifest
from lightning_accel.export.deciding import decide_default
from lightning_accel.export.evaluate import count_correct, through_engine, user_metrics
from lightning_accel.export.files import MODEL, REFERENCE, SAMPLES, Files, build_line, write_files
from lightning_accel.export.onnx import OnnxExport, export_onnx
from lightning_accel.export.order import Order
from lightning_accel.export.revision import git_revision
from lightning_accel.export.rival import build_rival, decide, verify_rival
from lightning_accel.export.surrounded import surrounded
from lightning_accel.export.tolerances import Tolerance
from lightning_accel.export.untrained import beside_untrained
from lightning_accel.export.verification import Verification, VerificationError, verify
from lightning_accel.inputs import mode
from lightning_accel.quantization.prepare import quantization_map, quantized_forwards

RIVAL = "network fp16, tensorrt"
REPORT_SCHEMA = 1  # docs/report.md
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
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
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
            "verification": [_verification_line(check) for check in files.checks],
            "proofs": files.proofs,
            "engines": engines,
            "compression": {**order.compression, **_kept_float(order.module), **files.kept},
            "quantization": quantization_map(order.module),
            "phases": list(order.history),
            "timeline": [dict(span) for span in order.timeline],
            "curves": [dict(point) for point in order.curves],
            "run": dict(order.run),
            "benchmark": measurement,
            "environment": environment(),
            "notes": [*order.marks, *earned, *_notes(order, samples, files.proofs, measured, threads)],
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
        report["ships"] = f"{name} fp32" if ships["file"] == REFERENCE else labels[ships["engine"]]
        _write_reports(folder, report, list(rows.values()))
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
    for name in before.keys() & after.keys():
        check.metric[name] = (before[name], after[name])
        scale = max(1.0, abs(before[name]))
        if not abs(before[name] - after[name]) <= check.tolerance.metric * scale + 1e-12 and not name.endswith("loss"):
            check.failures.append(f"the metric `{name}` is {after[name]:.4f} instead of {before[name]:.4f}")


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
    if "lowered" in proofs:
        n = proofs["lowered"]
        notes.append(
            f"{n['precision']}: {n['nodes']} nodes and {n['constants']} constants are those of the file before, rounded; "
            f"{n['kept']} nodes stay in float32."
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
    (folder / "report.html").write_text(render_html(report), encoding="utf-8")
    (folder / "report.json").write_text(json.dumps(report, indent=2, allow_nan=False) + "\n")
    first = [decision_of(report), *map(str, facts(report))]
    readable = {
        **report,
        "summary": list(filter(None, first)),
        "verification": [_readable(line) for line in report["verification"]],
    }
    (folder / "report.md").write_text(render_markdown(readable) + "\n![accuracy and latency](report.png)\n")


def summary(report: Mapping[str, Any], dirpath: str | Path) -> str:
    """The report's table and where the rest is, for the terminal."""
    lines = [comparison_table([Row(**row) for row in report["rows"]])]
    if decision := report.get("comparison", {}).get("decision"):
        lines.append(f"Decision: {decision['why']}")
    lines += [f"TensorRT: {e['status']}" for e in report["engines"] if e["engine"] == "tensorrt"]
    if any(not line["runs_here"] for line in report["engines"]):
        data = "" if (Path(dirpath) / SAMPLES).is_file() else " --data SAMPLES.npz"
        lines.append(f"Finish the proof on the machine that runs it: lightning-accel verify {dirpath}{data}")
    return "\n".join([*lines, f"Report: {Path(dirpath) / 'report.html'}"])
