"""The line-up: the networks that a report sets side by side, which of them run here, and what is found about each."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from lightning_accel.benchmarking.comparison import usable_cores
from lightning_accel.benchmarking.measure import BenchmarkResult, benchmark
from lightning_accel.benchmarking.scores import VALUES
from lightning_accel.calls.example import Call
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.registry import engine_named
from lightning_accel.errors import VerificationError
from lightning_accel.export.evaluate import count_correct, through_engine, user_metrics
from lightning_accel.export.files import MODEL, REFERENCE, Files, build_line
from lightning_accel.export.fp16_alternative import build_rival, choose_precision, verify_rival
from lightning_accel.export.ptq_baseline import beside_untrained
from lightning_accel.export.spec import Order
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.reports.run_report import Row
from lightning_accel.verification import tolerances
from lightning_accel.verification.compare import FACTOR, Verification
from lightning_accel.verification.engine import prove_engine

RIVAL = "network fp16, tensorrt"


@dataclass
class LineUp:
    """The teacher, the float32 file, what each engine runs, and the engine that int8 has to beat on a GPU.

    Args:
        name: what the shipped network is called: ``"student"`` or ``"network"``.
        parameters: its number of parameters.
        threads: of each engine.
        rows: by label, in the order of the report.
        paths: file of each row that runs here, by label.
        precisions: of the engines that ship and run here, by label.
        lines: of the manifest, one for each engine.
        labels: label of each engine's row.
        rival: line of the fp16 engine beside an int8 engine for a GPU that is here.
        labelled: whether held-out labels are classes of the first output.
        earned: whether quantization-aware training was worth it, in sentences.
    """

    name: str
    parameters: int
    threads: int
    rows: dict[str, Row] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    rival: dict[str, Any] | None = None
    labelled: bool = False
    earned: list[str] = field(default_factory=list)


def line_up(order: Order, files: Files, call: Call, folder: Path, scratch: Path) -> LineUp:
    """Build the engines, and list what is set side by side; nothing is run yet.

    Args:
        order: what is shipped.
        files: the bundle's files.
        call: arguments of the network.
        folder: where the files lie.
        scratch: for the teacher's file, which doesn't ship.
    """
    name = "network" if order.teacher is None else "student"
    made = LineUp(name, sum(p.numel() for p in order.part.parameters()), usable_cores())
    rows = made.rows
    if order.teacher is not None:
        teacher = surrounded(order.teacher, order.preprocess, order.postprocess)
        exported = export_onnx(teacher, call, scratch / "teacher.onnx", input_names=files.shipped.input_names)
        made.paths["teacher"] = exported.path
        rows["teacher"] = Row("teacher", "onnxruntime", parameters=sum(p.numel() for p in order.teacher.parameters()))
    if (folder / REFERENCE).is_file():
        label = f"{name} fp32"
        made.paths[label] = folder / REFERENCE
        rows[label] = Row(label, "onnxruntime", parameters=made.parameters)
    made.lines = [build_line(engine, files, folder) for engine in order.engines]
    # Speed-ups refer to the first row, so an engine that can't run here doesn't come first.
    for line in sorted(made.lines, key=lambda line: not line["runs_here"]):
        if not line["runs_here"] and set(made.paths) <= {"teacher"}:  # nothing else says how good the network is
            _add_reference(made, folder, order)
        label = f"{name} {order.precision}"
        label = label if label not in rows else f"{label}, {line['engine']}"
        file = folder / line["file"]
        made.labels[line["engine"]] = label
        rows[label] = Row(label, line["engine"], parameters=made.parameters, file_bytes=file.stat().st_size)
        if line["runs_here"]:
            made.paths[label] = file
            made.precisions[label] = line["precision"]
        else:
            rows[label].note = line["status"]
    if "int8+fp16" in made.precisions.values():  # a GPU is here: int8 has to prove that it is worth it
        made.rival = build_rival(folder, REFERENCE, files.samples)
        made.paths[RIVAL] = folder / made.rival["file"]
        rows[RIVAL] = Row(RIVAL, "tensorrt", parameters=made.parameters)
    return made


def _add_reference(made: LineUp, folder: Path, order: Order) -> None:
    """Measure the bundle's float32 file in ONNX Runtime, where none of the engines asked for runs."""
    assert order.precision == "fp32"  # every other precision has a float32 reference of its own
    label = f"{made.name} fp32"
    made.paths[label] = folder / MODEL
    made.rows[label] = Row(label, "onnxruntime", parameters=made.parameters)


def run_all(made: LineUp, order: Order, files: Files, whole: nn.Module, folder: Path) -> BenchmarkResult:
    """Verify the engines, and find accuracy, size and latency of every row that runs here.

    Args:
        made: its rows are filled in.
        order: what is shipped.
        files: get the comparisons.
        whole: the trained network.
        folder: where the files lie.

    Returns:
        The latencies.

    Raises:
        VerificationError: an engine doesn't compute what was trained.
    """
    runners: dict[str, Runner] = {}
    try:
        for label, file in made.paths.items():
            engine = made.rows[label].engine
            runners[label] = _load(file, engine, made.threads)
            made.rows[label].file_bytes = file.stat().st_size
        files.checks += [
            _verify_engine(order, files, runners[label], precision, folder)
            for label, precision in made.precisions.items()
        ]
        if made.rival is not None:
            check = verify_rival(runners[RIVAL], folder / REFERENCE, files.samples, (1, 7, order.batch_size))
            check.raise_if_failed(order.command)
            files.checks.append(check)
        networks = {label: runner.run for label, runner in runners.items()}
        counts = {} if order.output_kind == VALUES else count_correct(networks, files.shipped, whole, order.data)
        made.labelled = bool(counts)
        made.rows |= {label: replace(made.rows[label], correct=c, total=n) for label, (c, n) in counts.items()}
        if not made.labelled and order.bare:  # what else would say how good each is
            for label, runner in runners.items():
                made.rows[label].metrics = _metrics_through(order, files.shipped, runner)
        made.rows, made.earned = beside_untrained(made.rows, f"{made.name} {order.precision}", order, whole)
        measured = _measure_latency(made.rows, runners, files.samples, order.batch_size)
    finally:
        for runner in runners.values():
            runner.close()
    if made.rival is not None:
        _choose_engine(made, made.rival, measured)
    return measured


def _choose_engine(made: LineUp, rival: dict[str, Any], measured: BenchmarkResult) -> None:
    """int8 or fp16 on a GPU: the line of the manifest names the faster."""
    int8 = next(label for label, precision in made.precisions.items() if precision == "int8+fp16")
    decision = choose_precision(measured[RIVAL].samples, measured[int8].samples)
    made.rows[RIVAL].note = decision.why
    line = next(line for line in made.lines if line["engine"] == "tensorrt")
    others = rival if decision.int8 else {key: line[key] for key in rival}
    line |= {**({} if decision.int8 else rival), "decision": decision.why, "alternative": others}


def row_that_ships(made: LineUp, ships: Mapping[str, Any], order: Order, files: Files, folder: Path) -> str:
    """Label of the row that the manifest's default is; one that isn't there yet is measured and added."""
    file = folder / ships["file"]
    ran = {(made.rows[label].engine, path): label for label, path in made.paths.items()}
    if (label := ran.get((ships["engine"], file))) is not None:
        return label
    if "precision" not in ships:  # built, and not run here
        return made.labels[ships["engine"]]
    label = f"{made.name} {ships['precision']}, {ships['engine']}"  # decided, and the run asked for no such engine
    row = Row(label, ships["engine"], parameters=made.parameters, file_bytes=file.stat().st_size)
    made.rows[label] = _beside_first(made, row, file, files, order)
    return label


def _verify_engine(order: Order, files: Files, runner: Runner, precision: str, folder: Path) -> Verification:
    """The engine's own kernels against PyTorch: regions of the file, outputs, predictions, and the user's metric."""
    check, kernels = prove_engine(
        files.network,
        runner,
        files.samples,
        file=folder / MODEL,
        precision=precision,
        null=files.null,
        tolerance=tolerances.ENGINES[precision],
        batch_sizes=(1, 7, order.batch_size),
        axes=files.shipped.axes,
    )
    if kernels is not None:
        files.proofs.setdefault("kernels", {})[runner.engine] = kernels.to_dict()
    if not order.bare:
        check.note = (
            "the user's metric was not measured through the engine, whose inputs or outputs aren't the network's"
        )
    elif check.passed:
        _measure_metric(order, files, runner, check, None if kernels is None else kernels.noise)
    check.raise_if_failed(order.command)
    return check


def _metrics_through(order: Order, export: OnnxExport, runner: Runner) -> dict[str, float]:
    """The user's metrics with a runner in the place of ``forward``; empty where they can't be had in this way."""
    try:
        with through_engine(order.part, export, runner.run) as calls:
            found = user_metrics(order.module, order.data)
    except Exception:  # the user's own code; the comparisons of the engines that ship say what it raised
        return {}
    return {name: value for name, value in found.items() if calls[0] and math.isfinite(value)}


def _measure_metric(
    order: Order, files: Files, runner: Runner, check: Verification, steps: Mapping[str, float] | None
) -> None:
    """The user's own metric, by PyTorch and through the engine."""
    try:
        before = user_metrics(order.module, order.data)
        with through_engine(order.part, files.shipped, runner.run) as calls:
            after = user_metrics(order.module, order.data)
    except VerificationError:
        raise
    except Exception as error:  # the user's own validation code, run outside of the run it was written for
        check.note = f"the user's metric could not be measured through the engine: {error}"
        return
    if before and not calls[0]:
        check.note = "`validation_step` does not call the exported forward, so its metric can't go through the engine"
        return
    own: dict[str, float] | None = None  # by how much each differs when nothing but roundings change
    for name in sorted(before.keys() & after.keys()):
        one, two = before[name], after[name]
        finite = math.isfinite(one) and math.isfinite(two)
        if not finite and (one == two or (math.isnan(one) and math.isnan(two))):
            told = f"the metric `{name}` is {one} by PyTorch and through the engine: there is nothing to compare"
            check.note = f"{check.note}; {told}" if check.note else told
            continue
        check.metric[name] = (one, two)
        limit = check.tolerance.metric * max(1.0, abs(one)) + 1e-12
        if finite and (name.endswith("loss") or abs(one - two) <= limit):
            continue
        if finite and own is None:
            own = _null_metrics(order, files, before, steps) if check.null else {}
        if own is None or not finite or abs(one - two) > FACTOR * own.get(name, 0.0):
            check.failures.append(f"the metric `{name}` is {two:.4f} instead of {one:.4f}")


def _null_metrics(
    order: Order, files: Files, before: Mapping[str, float], steps: Mapping[str, float] | None
) -> dict[str, float]:
    """By how much the user's metrics differ between the network and itself with noise."""
    found: dict[str, float] = {}
    with files.null.runners(steps=steps) as runners:
        for name, runner in runners.items():
            if name == "as written":
                continue
            with through_engine(order.part, files.shipped, runner.run):
                for metric, value in user_metrics(order.module, order.data).items():
                    found[metric] = max(found.get(metric, 0.0), abs(value - before.get(metric, value)))
    return found


def _beside_first(made: LineUp, row: Row, file: Path, files: Files, order: Order) -> Row:
    """A row for one more way, measured beside the first of those that ran."""
    first, path = next(iter(made.paths.items()))
    with (
        _load(path, made.rows[first].engine, made.threads) as before,
        _load(file, row.engine, made.threads) as runner,
    ):
        counts = count_correct({row.name: runner.run}, files.shipped, order.whole, order.data) if made.labelled else {}
        correct, total = counts.get(row.name, (None, None))
        pair = {first: replace(made.rows[first]), row.name: replace(row, correct=correct, total=total)}
        _measure_latency(pair, {first: before, row.name: runner}, files.samples, order.batch_size)
        if not made.labelled and order.bare:
            pair[row.name].metrics = _metrics_through(order, files.shipped, runner)
    return pair[row.name]


def _load(file: Path, engine: str | None, threads: int) -> Runner:
    chosen = threads if engine is None or engine_named(engine).threads else None
    return load_runner(file, engine, threads=chosen)


def _measure_latency(
    rows: dict[str, Row], runners: Mapping[str, Runner], samples: Mapping[str, np.ndarray], batch: int
) -> BenchmarkResult:
    feeds = {name: np.resize(array, (batch, *array.shape[1:])) for name, array in samples.items()}
    measured = benchmark({label: partial(runner.run, feeds) for label, runner in runners.items()})
    for m in measured.measurements:
        row = rows[m.name]
        row.p50_ms, row.p90_ms = m.p50_ms, m.p90_ms
        row.speedup, row.speedup_low, row.speedup_high = m.speedup.value, m.speedup.low, m.speedup.high
    return measured
