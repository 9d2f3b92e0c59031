"""Benchmark all runtime variants of a bundle, with speed and accuracy, and choose the default."""

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import BenchmarkSettings, Comparison
from lightning_accel.benchmarking.decision import Budgets, choose_variant
from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.prepare import prepared
from lightning_accel.benchmarking.rounds import Measured, measure_variants
from lightning_accel.benchmarking.samples import (
    KEPT,
    assembled,
    check_samples,
    describe,
    kept_samples,
    score,
    synthetic_samples,
)
from lightning_accel.benchmarking.scores import CLASSES, VALUES
from lightning_accel.benchmarking.variants import BASELINE, RuntimeVariant, variants_of
from lightning_accel.bundle.writer import check_recordable, record_comparison
from lightning_accel.core.arguments import checked
from lightning_accel.core.arrays import read_named
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.engines.registry import runs_onnx
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.verification import tolerances
from lightning_accel.verification.bundle import SAMPLES, proven_file, split_samples
from lightning_accel.verification.compare import Feeds, Network, verify
from lightning_accel.verification.kernels import check_kernels
from lightning_accel.verification.layout import check_batch_first
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.saturation import saturates


@checked()
def benchmark_bundle(
    folder: str | Path,
    samples: Feeds | None = None,
    labels: np.ndarray | None = None,
    *,
    output_kind: str | None = None,
    budgets: Budgets | None = None,
    everything: bool = False,
    variants: Sequence[str] | None = None,
    settings: BenchmarkSettings | None = None,
    record: bool = True,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Run a bundle's network in its common runtime variants, and choose the one to ship.

    Args:
        folder: the bundle.
        samples: held-out inputs by name, each ``(S, ...)``; with the outputs by name, the trained network's, predictions
            are compared with those, else with the baseline's. ``None`` uses the samples in the bundle; without any, only speed
            is measured and only float32 can ship. A network that was quantized without training is compared with the baseline,
            which is the trained network.
        labels: class of each sample, integers ``(S,)``; for logits of each position ``(S, ...)``; or, in floating point,
            the values that the first output should have.
        output_kind: ``"classes"``: accuracy and agreement are shares of predictions, by the largest logit of the first output;
            ``"values"``: they are its R². ``None``: as the labels are, else as in the run that wrote the bundle, else
            classes if the first output has more than one column.
        budgets: limits for accuracy, latency and size; ``None`` measures without a decision.
        everything: whether to run all variants instead of the common ones.
        variants: names of the variants to run; the baseline is always included.
        settings: batch sizes, callers, times, threads.
        record: write ``comparison.json`` into the bundle, and the decision into its manifest as the default.
        progress: called with a description of each step.

    Returns:
        The comparison. After Ctrl-C it holds the measurements so far, and no decision.

    Raises:
        MissingFileError: there is no bundle, or one of its files is missing.
        InvalidArgumentError: the bundle changed after it was written; samples, labels, variants or budgets don't fit it; or the
            bundle can't be replaced, because it holds the current folder or is a mount point.
        FilePermissionError: the parent folder of the bundle isn't writable.

    Example:
        >>> comparison = benchmark_bundle("artifacts", budgets=Budgets(max_drop=0.5))  # doctest: +SKIP
        >>> comparison.decision["why"]  # doctest: +SKIP
        'openvino int8 ships: 2.61x [2.55, 2.68] as fast as fp32 in ONNX Runtime at batch 32; ...'
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    check_batch_first(manifest, "the benchmark, whose calls have several sizes")
    if record:
        check_recordable(folder)
    source = "given"
    if samples is None and (folder / SAMPLES).is_file():
        source = "kept in the bundle"
        samples = read_named(folder / SAMPLES, "samples")
    comparison = compare_variants(
        folder,
        manifest,
        samples,
        labels,
        source=source,
        output_kind=output_kind,
        budgets=budgets,
        everything=everything,
        names=variants,
        settings=settings,
        progress=progress,
    )
    if record:
        record_comparison(folder, comparison.to_dict(), shipped_line(comparison))
    return comparison


def compare_variants(
    folder: Path,
    manifest: Mapping[str, Any],
    samples: Feeds | None,
    labels: np.ndarray | None = None,
    *,
    source: str,
    output_kind: str | None = None,
    budgets: Budgets | None = None,
    everything: bool = False,
    names: Sequence[str] | None = None,
    settings: BenchmarkSettings | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Measure the variants and choose one, without writing anything; arguments as in :func:`benchmark_bundle`.

    Args:
        folder: the bundle.
        manifest: ``engines``, ``files``, ``model``, ``precision``, ``trained``, ``output_kind``, ``inputs`` and ``outputs`` are read.
        samples: inputs by name, and all outputs or none.
        labels: labels of the samples.
        source: origin of the samples, for the report.
        output_kind: ``"classes"``, ``"values"`` or ``None``.
        budgets: limits of the decision.
        everything: whether to run all variants.
        names: names of the variants to run.
        settings: batch sizes, callers, times, threads.
        progress: called with a description of each step.
    """
    settings = settings or BenchmarkSettings()
    if budgets is not None and budgets.batch not in (None, *settings.batches):
        raise InvalidArgumentError(f"Argument `batch` must be one of {settings.batches}, but got {budgets.batch}.")
    if output_kind not in (None, CLASSES, VALUES):
        raise InvalidArgumentError(
            f"Argument `output_kind` must be {CLASSES!r}, {VALUES!r} or None, but got {output_kind!r}."
        )
    if output_kind is None and labels is None:
        output_kind = manifest.get("output_kind")
    chosen = _chosen(variants_of(folder, manifest), everything, names)
    with load_runner(folder / proven_file(manifest, "fp32"), "onnxruntime", emulate=True) as runner:
        known = samples is not None
        feeds, wanted = split_samples(samples, manifest) if samples is not None else (synthetic_samples(runner), {})
        output_kind = check_samples(runner, feeds, labels if known else None, output_kind)
        keep = kept_samples(runner, feeds, output_kind) if known else 0
    if labels is not None and not known:
        raise InvalidArgumentError(
            "Argument `labels` must come with the samples that they belong to, but got no samples. Pass `--data`."
        )
    machine = environment()
    with tempfile.TemporaryDirectory() as scratch:
        made = [prepared(variant, Path(scratch)) for variant in chosen]
        measured = measure_variants(
            made, feeds, settings, baseline=BASELINE, keep=keep, classify=output_kind == CLASSES, progress=progress
        )
        for row in measured.rows:
            describe(row, folder)
    against = "nothing: there were no held-out samples"
    if known:
        if manifest["precision"] == "int8" and manifest.get("trained") == "fp32":
            wanted = {}  # outputs of the quantized network, not of the trained one
        against = "the trained network" if wanted else BASELINE
        score(measured, BASELINE, wanted, labels, output_kind)
        hold_kernels(measured, folder, manifest, feeds)
    comparison = assembled(
        measured,
        feeds,
        settings,
        baseline=BASELINE,
        machine=machine,
        source=source if known else None,
        against=against,
        output_kind=output_kind,
    )
    if budgets is not None and not measured.interrupted:
        comparison.decision = choose_variant(comparison, budgets)
    return comparison


def shipped_line(comparison: Comparison) -> dict[str, str] | None:
    """The manifest's default after a decision; ``None`` if it doesn't change."""
    name = (comparison.decision or {}).get("ship")
    if name is None:
        return None
    variant = comparison[name]
    assert variant.file is not None
    return {"engine": variant.engine, "file": variant.file, "precision": variant.precision}


def _chosen(variants: Sequence[RuntimeVariant], everything: bool, names: Sequence[str] | None) -> list[RuntimeVariant]:
    known = [variant.name for variant in variants]
    if unknown := [name for name in names or () if name not in known]:
        raise InvalidArgumentError(f"Argument `variants` must be among {known}, but got {unknown}.")
    if names is not None:
        return [variant for variant in variants if variant.name in (BASELINE, *names)]
    return [variant for variant in variants if everything or variant.common]


def hold_kernels(measured: Measured, folder: Path, manifest: Mapping[str, Any], feeds: Feeds) -> None:
    """Compare the outputs of each variant with the verified file, and store the result as ``kernels``.

    Args:
        measured: variants with their outputs; only those that can ship are compared.
        folder: the bundle.
        manifest: ``model`` and ``files`` are read.
        feeds: the samples.
    """
    few = {name: array[:KEPT] for name, array in feeds.items()}
    count = len(next(iter(few.values())))
    right: dict[Path, Feeds] = {}
    for row in measured.rows:
        got = {name: array[:count] for name, array in row.computed.items()}
        if not got or row.variant.unshippable:
            continue
        file = folder / proven_file(manifest, row.variant.precision)
        if file not in right:
            with load_runner(file, "onnxruntime", emulate=True) as runner:
                right[file] = runner.run(few)
        check = verify(
            _answering(right[file]),
            _answering(got),
            few,
            engine=row.variant.name,
            tolerance=tolerances.ENGINES[row.variant.precision],
            batch_sizes=(count,),
        )
        failures: list[str] = []
        noise: dict[str, float] | None = None
        if row.variant.precision == "int8" and runs_onnx(row.variant.engine):
            kernels = check_kernels(file, row.variant.engine, few)
            noise = kernels.noise
            failures = [reason for reason in (kernels.diverging, saturates(file, row.variant.engine)) if reason]
        if not check.passed and not failures:  # rounding noise of a deep network may be as large
            half = row.variant.precision.rpartition("+")[2]
            rounding = half if half in ("fp16", "bf16") else None
            check = check.against(NullDivergence(file, few).noise(check.tolerance, steps=noise, rounding=rounding))
        names = ("samples", "median_error", "p99_error", "max_error", "failures", "passed")
        found = {name: value for name, value in check.to_dict().items() if name in names}
        # JSON has no infinity, the error of outputs that are NaN; ``failures`` describes them.
        row.result.kernels = {n: None if isinstance(v, float) and not math.isfinite(v) else v for n, v in found.items()}
        if failures:
            row.result.kernels |= {"passed": False, "failures": [*check.failures, *failures]}


def _answering(outputs: Feeds) -> Network:
    """A network whose outputs are known for all samples."""
    return lambda feeds: outputs
