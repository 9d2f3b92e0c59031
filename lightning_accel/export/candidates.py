"""The networks and engines that a report compares, and their measurements."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from lightning_accel.benchmarking.comparison import BenchmarkSettings, usable_cores
from lightning_accel.benchmarking.measure import BenchmarkResult, benchmark
from lightning_accel.calls.example import ExampleCall
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.registry import engine_named
from lightning_accel.errors import VerificationError
from lightning_accel.export.default_rule import Choice, choose_default, speed_ratios
from lightning_accel.export.evaluate import Predicted, predicted, through_engine, user_metrics
from lightning_accel.export.failures import ARITHMETIC, BUILD, LOAD, VERIFY, EngineFailures
from lightning_accel.export.files import MODEL, REFERENCE, Files, build_line, engine_file
from lightning_accel.export.fp16_alternative import build_alternative, choose_precision, verify_alternative
from lightning_accel.export.ptq_baseline import beside_untrained
from lightning_accel.export.quality import ACCURACY, Change, Scores, metric_blocks, metrics_through, monitored
from lightning_accel.export.spec import ExportSpec
from lightning_accel.onnx.export import export_onnx
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.reports.model import Row
from lightning_accel.verification import tolerances
from lightning_accel.verification.channels import FACTOR
from lightning_accel.verification.engine import prove_engine
from lightning_accel.verification.result import Verification

FP16_ALTERNATIVE = "network fp16, tensorrt"


@dataclass
class Candidates:
    """The networks that a report compares: teacher, float32 file, each engine, and the fp16 alternative to int8 on a GPU.

    Args:
        name: what the shipped network is called: ``"student"`` or ``"network"``.
        parameters: its number of parameters.
        threads: of each engine.
        rows: by label, in the order of the report.
        paths: file of each row that runs here, by label.
        precisions: of the engines that ship and run here, by label.
        lines: of the manifest, one for each engine.
        labels: label of each engine's row.
        alternative: line of the fp16 engine beside an int8 engine for a GPU that is here.
        failures: engines that failed, and aren't among the others.
        scores: quality of each network that ran, by label.
        earned: whether quantization-aware training was worth it, in sentences.
        gained: change of accuracy by quantization-aware training; ``None`` where it isn't known.
        predicted: predictions of all held-out data by each network that ran, by label; ``None`` without classes.
    """

    name: str
    parameters: int
    threads: int
    rows: dict[str, Row] = field(default_factory=dict)
    paths: dict[str, Path] = field(default_factory=dict)
    precisions: dict[str, str] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    labels: dict[str, str] = field(default_factory=dict)
    alternative: dict[str, Any] | None = None
    failures: EngineFailures = field(default_factory=EngineFailures)
    scores: dict[str, Scores] = field(default_factory=dict)
    earned: list[str] = field(default_factory=list)
    gained: Change | None = None
    predicted: Predicted | None = None

    @property
    def labelled(self) -> bool:
        """Whether held-out labels are classes of the first output."""
        return any(found.right is not None for found in self.scores.values())

    @property
    def float32(self) -> str:
        """Label of the shipped network in float32: the first of the engines that runs here."""
        plain = f"{self.name} fp32"
        return plain if plain in self.paths else next((n for n, p in self.precisions.items() if p == "fp32"), plain)


def list_candidates(spec: ExportSpec, files: Files, folder: Path, scratch: Path) -> Candidates:
    """Build the engines and list the candidates, without running them.

    Args:
        spec: the export.
        files: the bundle's files.
        folder: where the files lie.
        scratch: for the teacher's file, which doesn't ship.
    """
    name = "network" if spec.teacher is None else "student"
    parameters, failures = sum(p.numel() for p in spec.part.parameters()), EngineFailures(spec.strict)
    candidates = Candidates(name, parameters, usable_cores(), failures=failures)
    rows = candidates.rows
    if spec.teacher is not None:
        shipped = files.shipped.example
        teacher = surrounded(spec.teacher, spec.preprocess, spec.postprocess)
        example = ExampleCall.of(teacher, shipped.call, names=shipped.tensor_names).without(shipped.unused or ())
        exported = export_onnx(teacher, example, scratch / "teacher.onnx")
        candidates.paths["teacher"] = exported.path
        rows["teacher"] = Row("teacher", "onnxruntime", parameters=sum(p.numel() for p in spec.teacher.parameters()))
    if (folder / REFERENCE).is_file():
        label = f"{name} fp32"
        candidates.paths[label] = folder / REFERENCE
        rows[label] = Row(label, "onnxruntime", parameters=candidates.parameters)
    for engine in spec.engines:
        if engine in spec.refused:
            failures.add(engine, ARITHMETIC, spec.refused[engine])
            continue
        with failures.collect(engine, BUILD):
            candidates.lines.append(build_line(engine, files, folder))
        if engine in failures:
            _remove(engine_file(engine, folder))
    failures.require_others(spec.engines)
    # Speed-ups refer to the first row, so an engine that can't run here doesn't come first.
    for line in sorted(candidates.lines, key=lambda line: not line["runs_here"]):
        if not line["runs_here"] and set(candidates.paths) <= {"teacher"}:  # nothing else says how good the network is
            _add_reference(candidates, folder, spec)
        label = f"{name} {spec.precision}"
        label = label if label not in rows else f"{label}, {line['engine']}"
        file = folder / line["file"]
        candidates.labels[line["engine"]] = label
        rows[label] = Row(label, line["engine"], parameters=candidates.parameters, file_bytes=file.stat().st_size)
        if line["runs_here"]:
            candidates.paths[label] = file
            candidates.precisions[label] = line["precision"]
        else:
            rows[label].note = line["status"]
    if "int8+fp16" in candidates.precisions.values():  # a GPU is here: int8 has to prove that it is worth it
        candidates.alternative = build_alternative(folder, REFERENCE, files.layout.calls(files.samples))
        candidates.paths[FP16_ALTERNATIVE] = folder / candidates.alternative["file"]
        rows[FP16_ALTERNATIVE] = Row(FP16_ALTERNATIVE, "tensorrt", parameters=candidates.parameters)
    return candidates


def _add_reference(candidates: Candidates, folder: Path, spec: ExportSpec) -> None:
    """Add the bundle's float32 file in ONNX Runtime as a candidate if none of the requested engines runs on this machine."""
    assert spec.precision == "fp32"  # every other precision has a float32 reference of its own
    label = f"{candidates.name} fp32"
    candidates.paths[label] = folder / MODEL
    row = Row(label, "onnxruntime", parameters=candidates.parameters)
    others = {name: other for name, other in candidates.rows.items() if name != "teacher"}
    for name in others:  # speed-ups refer to the first row, which comes before those of engines that don't run here
        del candidates.rows[name]
    candidates.rows |= {label: row, **others}


def run_all(candidates: Candidates, spec: ExportSpec, files: Files, whole: nn.Module, folder: Path) -> BenchmarkResult:
    """Verify the engines, and measure accuracy, size and latency of every candidate that runs on this machine.

    Args:
        candidates: its rows are filled in.
        spec: the export.
        files: get the comparisons.
        whole: the trained network.
        folder: where the files lie.

    Returns:
        The latencies.

    Raises:
        VerificationError: no engine computes what was trained, or one doesn't and failures are strict.
    """
    runners: dict[str, Runner] = {}
    try:
        _verify_engines(candidates, spec, files, runners, folder)
        for label, file in candidates.paths.items():
            if label not in runners:
                runners[label] = _load(file, candidates.rows[label].engine, candidates.threads)
            candidates.rows[label].file_bytes = file.stat().st_size
        runners = {label: runners[label] for label in candidates.paths}  # in the order of the report
        if candidates.alternative is not None:
            check = verify_alternative(
                runners[FP16_ALTERNATIVE],
                folder / REFERENCE,
                files.samples,
                (1, 7, spec.batch_size),
                check_agreement=spec.predicts,
                layout=files.layout,
            )
            check.raise_if_failed(spec.command)
            files.checks.append(check)
        networks = {label: runner.run for label, runner in runners.items()}
        candidates.predicted = predicted(networks, files.shipped, whole, spec.data) if spec.predicts else None
        right = {} if candidates.predicted is None else candidates.predicted.right
        candidates.scores = {label: Scores(right.get(label)) for label in runners}
        candidates.rows |= {
            label: replace(candidates.rows[label], correct=int(hits.sum()), total=len(hits))
            for label, hits in right.items()
        }
        if not candidates.labelled and spec.bare:  # what else would say how good each is
            _score_by_metrics(candidates, spec, files, runners)
        candidates.rows, candidates.earned, gained = beside_untrained(
            candidates.rows, f"{candidates.name} {spec.precision}", spec, whole
        )
        candidates.gained = None if gained is None else Change(ACCURACY, *gained)
        measured = measure_latency(candidates.rows, runners, files, spec.batch_size)
    finally:
        for runner in runners.values():
            runner.close()
    if candidates.alternative is not None:
        _choose_engine(candidates, candidates.alternative, measured)
    return measured


def _score_by_metrics(candidates: Candidates, spec: ExportSpec, files: Files, runners: Mapping[str, Runner]) -> None:
    """Measure the user's metrics with every network; over parts of the data as well, where there are networks to choose from."""
    several = len(candidates.labels) > 1 or candidates.float32 not in candidates.labels.values()
    for label, runner in runners.items():
        found = metrics_through(spec, files.shipped, runner)
        blocks = metric_blocks(spec, files.shipped, runner) if found and several else []
        candidates.rows[label].metrics = found
        candidates.scores[label] = Scores(metrics=found, blocks=blocks)


def choose_candidate(candidates: Candidates, measured: BenchmarkResult, spec: ExportSpec) -> Choice:
    """Choose what ships without budgets, see :func:`~lightning_accel.export.default_rule.choose_default`.

    Where none of the requested engines runs on this machine, the first one stays the default: what a CPU measures says nothing
    about the machine that the bundle is for.
    """
    ran = [label for label in candidates.paths if label in candidates.labels.values()]
    if not ran:
        return Choice(candidates.labels[candidates.lines[0]["engine"]], "which was asked for")
    float32 = candidates.float32
    labels = list(dict.fromkeys([*([float32] if float32 in candidates.paths else []), *ran]))
    trained = {} if candidates.gained is None else dict.fromkeys((label for label in ran), candidates.gained)
    return choose_default(
        labels,
        float32,
        candidates.scores,
        speed_ratios(measured, labels, float32),
        measured.null.high,
        modes=monitored(getattr(spec.data.trainer, "callbacks", ())),
        exact=[label for label in ran if candidates.precisions.get(label) == "fp32"],
        trained=trained,
    )


def manifest_default(candidates: Candidates, ships: str) -> dict[str, str]:
    """The manifest's default for the candidate that ships."""
    for line in candidates.lines:
        if candidates.labels[line["engine"]] == ships:
            return {"engine": line["engine"], "file": line["file"]}
    return {"engine": "onnxruntime", "file": REFERENCE, "precision": "fp32"}


def _verify_engines(
    candidates: Candidates, spec: ExportSpec, files: Files, runners: dict[str, Runner], folder: Path
) -> None:
    """Load and verify each engine; those that fail are no candidates any more.

    Raises:
        VerificationError: all of them failed.
    """
    for label, precision in list(candidates.precisions.items()):
        engine = str(candidates.rows[label].engine)
        with candidates.failures.collect(engine, LOAD):
            runners[label] = _load(candidates.paths[label], engine, candidates.threads)
        if label in runners:
            with candidates.failures.collect(engine, VERIFY):
                files.checks.append(_verify_engine(spec, files, runners[label], precision, folder))
        if engine in candidates.failures:
            _drop(candidates, engine, runners, folder)
            files.proofs.get("kernels", {}).pop(engine, None)
    candidates.failures.require_others(spec.engines)
    if set(candidates.paths) <= {"teacher"}:
        _add_reference(candidates, folder, spec)


def _drop(candidates: Candidates, engine: str, runners: dict[str, Runner], folder: Path) -> None:
    """Remove a failed engine, and its own file, from the bundle."""
    label = candidates.labels.pop(engine)
    if label in runners:
        runners.pop(label).close()
    for known in (candidates.rows, candidates.paths, candidates.precisions):
        known.pop(label, None)
    line = next(line for line in candidates.lines if line["engine"] == engine)
    candidates.lines.remove(line)
    if line["file"] not in (MODEL, *(other["file"] for other in candidates.lines)):
        _remove(folder / line["file"])


def _remove(file: Path) -> None:
    """Remove an engine's file and what lies beside it under the same name."""
    for found in file.parent.glob(f"{file.name}*"):
        found.unlink()


def _choose_engine(candidates: Candidates, alternative: dict[str, Any], measured: BenchmarkResult) -> None:
    """Choose between int8 and fp16 on a GPU; the manifest names the faster one."""
    int8 = next(label for label, precision in candidates.precisions.items() if precision == "int8+fp16")
    decision = choose_precision(measured[FP16_ALTERNATIVE].samples, measured[int8].samples)
    candidates.rows[FP16_ALTERNATIVE].note = decision.why
    line = next(line for line in candidates.lines if line["engine"] == "tensorrt")
    others = alternative if decision.int8 else {key: line[key] for key in alternative}
    line |= {**({} if decision.int8 else alternative), "decision": decision.why, "alternative": others}


def row_that_ships(
    candidates: Candidates, ships: Mapping[str, Any], spec: ExportSpec, files: Files, folder: Path
) -> str:
    """Label of the row of the manifest's default; it is measured and added if missing."""
    file = folder / ships["file"]
    ran = {(candidates.rows[label].engine, path): label for label, path in candidates.paths.items()}
    if (label := ran.get((ships["engine"], file))) is not None:
        return label
    if "precision" not in ships:  # built, and not run here
        return candidates.labels[ships["engine"]]
    label = (
        f"{candidates.name} {ships['precision']}, {ships['engine']}"  # decided, and the run asked for no such engine
    )
    row = Row(label, ships["engine"], parameters=candidates.parameters, file_bytes=file.stat().st_size)
    candidates.rows[label] = _beside_first(candidates, row, file, files, spec)
    return label


def _verify_engine(spec: ExportSpec, files: Files, runner: Runner, precision: str, folder: Path) -> Verification:
    """The engine's own kernels against PyTorch: regions of the file, outputs, predictions, and the user's metric."""
    check, kernels = prove_engine(
        files.network,
        runner,
        files.samples,
        file=folder / MODEL,
        precision=precision,
        null=files.null,
        tolerance=tolerances.ENGINES[precision],
        batch_sizes=(1, 7, spec.batch_size),
        axes=files.shipped.axes,
        check_agreement=spec.predicts,
        layout=files.layout,
    )
    if kernels is not None:
        files.proofs.setdefault("kernels", {})[runner.engine] = kernels.to_dict()
    if not spec.bare:
        check.note = (
            "the user's metric was not measured through the engine, whose inputs or outputs aren't the network's"
        )
    elif check.passed:
        _measure_metric(spec, files, runner, check, None if kernels is None else kernels.noise)
    check.raise_if_failed(spec.command)
    return check


def _measure_metric(
    spec: ExportSpec, files: Files, runner: Runner, check: Verification, steps: Mapping[str, float] | None
) -> None:
    """The user's own metric, by PyTorch and through the engine."""
    try:
        if files.metrics is None:
            files.metrics = user_metrics(spec.module, spec.data)
        before = files.metrics
        with through_engine(spec.part, files.shipped, runner.run) as calls:
            after = user_metrics(spec.module, spec.data)
    except VerificationError:
        raise
    except Exception as error:  # the user's own validation code, run outside of the run it was written for
        check.note = f"the user's metric could not be measured through the engine: {error}"
        return
    if before and not calls[0]:
        check.note = "`validation_step` does not call the exported forward, so its metric can't go through the engine"
        return
    far: dict[str, float] = {}
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
        far[name] = abs(one - two) if finite else math.inf
    if check.null and any(map(math.isfinite, far.values())):
        far = _beyond_null(spec, files, before, steps, far)
    for name in far:
        one, two = check.metric[name]
        check.failures.append(f"the metric `{name}` is {two:.4f} instead of {one:.4f}")


def _beyond_null(
    spec: ExportSpec,
    files: Files,
    before: Mapping[str, float],
    steps: Mapping[str, float] | None,
    far: Mapping[str, float],
) -> dict[str, float]:
    """Those differences of the user's metrics that are larger than when nothing but roundings change."""
    left = dict(far)
    for _, runner in files.null.runners(steps=steps):
        with through_engine(spec.part, files.shipped, runner.run):
            found = user_metrics(spec.module, spec.data)
        for name in left.keys() & found.keys():
            if math.isfinite(left[name]) and left[name] <= FACTOR * abs(found[name] - before[name]):
                del left[name]
        if not any(map(math.isfinite, left.values())):
            break  # each of them differs as much by roundings alone
    return left


def _beside_first(candidates: Candidates, row: Row, file: Path, files: Files, spec: ExportSpec) -> Row:
    """Measure one more candidate beside the first one that ran."""
    first, path = next(iter(candidates.paths.items()))
    with (
        _load(path, candidates.rows[first].engine, candidates.threads) as before,
        _load(file, row.engine, candidates.threads) as runner,
    ):
        found = predicted({row.name: runner.run}, files.shipped, spec.whole, spec.data) if candidates.labelled else None
        hits = None if found is None else found.right[row.name]
        if found is not None and candidates.predicted is not None:
            candidates.predicted.of |= found.of
        candidates.scores[row.name] = Scores(hits)
        correct, total = (None, None) if hits is None else (int(hits.sum()), len(hits))
        pair = {first: replace(candidates.rows[first]), row.name: replace(row, correct=correct, total=total)}
        measure_latency(pair, {first: before, row.name: runner}, files, spec.batch_size)
        if not candidates.labelled and spec.bare:
            pair[row.name].metrics = metrics_through(spec, files.shipped, runner)
            candidates.scores[row.name] = Scores(metrics=pair[row.name].metrics)
    return pair[row.name]


def _load(file: Path, engine: str | None, threads: int) -> Runner:
    chosen = threads if engine is None or engine_named(engine).threads else None
    return load_runner(file, engine, threads=chosen)


def measure_latency(rows: dict[str, Row], runners: Mapping[str, Runner], files: Files, batch: int) -> BenchmarkResult:
    """Measure calls of runners in turns, and write the latencies into their rows.

    Args:
        rows: by label.
        runners: by label; the first is the one that speed-ups refer to.
        files: give the samples.
        batch: samples in a call.
    """
    feeds = files.layout.sized(files.samples, batch)
    calls = {label: partial(runner.run, feeds) for label, runner in runners.items()}
    measured = benchmark(calls, min_rounds=BenchmarkSettings.min_rounds)
    for m in measured.measurements:
        row = rows[m.name]
        row.p50_ms, row.p90_ms = m.p50_ms, m.p90_ms
        row.speedup, row.speedup_low, row.speedup_high = m.speedup.value, m.speedup.low, m.speedup.high
    return measured
