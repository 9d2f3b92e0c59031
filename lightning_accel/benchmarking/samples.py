"""Validate the held-out samples of a comparison, and compute accuracy and agreement from the outputs."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import BenchmarkSettings, Comparison
from lightning_accel.benchmarking.rounds import Measured, VariantRun
from lightning_accel.benchmarking.scores import CLASSES, VALUES, r_squared
from lightning_accel.engines.base import Runner
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.verification.compare import Feeds

KEPT = 512  # samples on which kernels are compared with the file
_SCORED = 2**24  # largest number of values for an R²; limits the samples beyond KEPT


def synthetic_samples(runner: Runner) -> dict[str, np.ndarray]:
    """Random inputs for measurements of speed; integers are zeros, which are valid in every vocabulary."""
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in runner.inputs:
        if None in spec.shape[1:]:
            raise InvalidArgumentError(
                f"Argument `samples` must be given for input `{spec.name}`, whose shape {spec.shape} is open. Pass `--data FILE.npz`, or "
                "export with ModelExport(keep_samples=16)."
            )
        shape = [32 if size is None else size for size in spec.shape]
        floating = np.issubdtype(spec.dtype, np.floating)
        feeds[spec.name] = rng.normal(size=shape).astype(spec.dtype) if floating else np.zeros(shape, spec.dtype)
    return feeds


def check_samples(runner: Runner, feeds: Feeds, labels: np.ndarray | None, output_kind: str | None = None) -> str:
    """Validate samples and labels before the measurement.

    Args:
        runner: runner of the float32 network.
        feeds: samples.
        labels: classes, or the values that outputs should have.
        output_kind: ``"classes"``, ``"values"``, or ``None``: as the labels are, else classes if there is more than one column.

    Returns:
        How outputs are scored: ``"classes"`` or ``"values"``.
    """
    for spec in runner.inputs:
        spec.check(feeds[spec.name])
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise InvalidArgumentError(
            f"Argument `samples` must hold the same number of samples (at least 1) of each input, but got {counts}."
        )
    outputs = next(iter(runner.run({name: array[:1] for name, array in feeds.items()}).values()))
    count = next(iter(counts.values()))
    if labels is None:
        return output_kind or (CLASSES if outputs.ndim >= 2 and outputs.shape[1] > 1 else VALUES)
    if output_kind is None:
        output_kind = VALUES if np.issubdtype(labels.dtype, np.floating) else CLASSES
    if output_kind == VALUES:
        shape = outputs.shape[1:]
        if not np.issubdtype(labels.dtype, np.number) or (
            labels.shape != (count, *shape) and (*labels.shape, 1) != (count, *shape)
        ):
            raise InvalidArgumentError(
                f"Argument `labels` must hold an integer for each of the {count} samples, or the values {(count, *shape)} that "
                f"the first output should have, but got {labels.dtype} of shape {labels.shape}."
            )
        return output_kind
    if not np.issubdtype(labels.dtype, np.integer) or not labels.ndim or len(labels) != count:
        raise InvalidArgumentError(
            f"Argument `labels` must hold an integer for each of the {count} samples, but got {labels.dtype} of shape "
            f"{labels.shape}."
        )
    shape = outputs.shape[2:]
    if outputs.ndim < 2 or labels.shape[1:] != shape:
        raise InvalidArgumentError(
            f"Argument `labels` must have the shape (S, {', '.join(map(str, shape))}) of predictions, but got {labels.shape}, "
            f"where the first output has the shape {outputs.shape}."
        )
    if labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise InvalidArgumentError(
            f"Argument `labels` must be from 0 to {outputs.shape[1] - 1}, the classes of the first output, but got "
            f"{labels.min()} to {labels.max()}."
        )
    return output_kind


def kept_samples(runner: Runner, feeds: Feeds, output_kind: str) -> int:
    """Number of samples whose outputs are kept: enough to compare kernels with the file; for an R², as many as fit."""
    if output_kind == CLASSES:
        return KEPT
    outputs = runner.run({name: array[:1] for name, array in feeds.items()}).values()
    return max(KEPT, _SCORED // max(1, sum(array.size for array in outputs)))


def describe(row: VariantRun, folder: Path) -> None:
    """Store name and size of a variant's file; only files of the bundle get a name."""
    file = row.variant.file
    if file is None or not file.is_file():
        return
    if file.is_relative_to(folder):
        row.result.file = file.relative_to(folder).as_posix()
    weights = file.with_name(f"{file.name}.data")
    row.result.file_bytes = file.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def score(measured: Measured, baseline: str, wanted: Feeds, labels: np.ndarray | None, output_kind: str) -> None:
    """Compute accuracy and agreement of each variant from its predicted classes or values."""
    if output_kind == VALUES:
        _score_values(measured, baseline, wanted, labels)
        return
    right = next((row.outputs.get("classes") for row in measured.rows if row.variant.name == baseline), None)
    if wanted:
        logits = next(iter(wanted.values()))
        right = logits.argmax(1) if logits.ndim >= 2 and logits.shape[1] > 1 else None
    for row in measured.rows:
        classes = row.outputs.get("classes")
        if classes is None:
            continue
        if right is not None and classes.shape == right.shape:  # e.g. one class per sample against one per pixel
            row.result.agreement = float((classes == right).mean())
        if labels is not None:
            row.result.accuracy = float((classes == labels).mean())


def _score_values(measured: Measured, baseline: str, wanted: Feeds, labels: np.ndarray | None) -> None:
    """R² of the first output against the labels, and against the trained network or the baseline."""
    values = {row.variant.name: next(iter(row.computed.values()), None) for row in measured.rows}
    right = next(iter(wanted.values())) if wanted else values.get(baseline)
    for row in measured.rows:
        got = values[row.variant.name]
        if got is None:
            continue
        row.result.samples = len(got)
        if right is not None and right.shape[1:] == got.shape[1:]:
            row.result.agreement = r_squared(right[: len(got)], got)
        if labels is not None:
            row.result.accuracy = r_squared(labels[: len(got)].reshape(got.shape), got)


def assembled(
    measured: Measured,
    feeds: Feeds,
    settings: BenchmarkSettings,
    *,
    baseline: str,
    machine: Mapping[str, Any],
    source: str | None,
    against: str,
    output_kind: str = CLASSES,
) -> Comparison:
    """Assemble the comparison from measurements, settings and machine; without a decision.

    Args:
        measured: measurements with scores.
        feeds: the samples.
        settings: how it was measured.
        baseline: name of the variant that speed-ups refer to.
        machine: description of the machine, from before the measurement.
        source: origin of the samples; ``None`` for random inputs.
        against: reference of the predictions.
        output_kind: ``"classes"`` or ``"values"``.
    """
    count = len(next(iter(feeds.values())))
    all_settings = {
        **asdict(settings),
        "samples": 0 if source is None else count,
        "data": "random inputs" if source is None else f"{count:,} held-out samples, {source}",
        "agreement_with": against,
        "output_kind": output_kind,
        "spinning": "off",
    }
    nulls = {key: pick((n[key] for n in measured.null), default=None) for key, pick in (("low", min), ("high", max))}
    return Comparison(
        environment=dict(machine),
        settings=all_settings,
        baseline=baseline,
        null={"value": measured.null[0]["value"] if measured.null else None, **nulls, "points": measured.null},
        noisy=any(n["noisy"] for n in measured.null),
        variants=[row.result for row in measured.rows],
        interrupted=measured.interrupted,
    )
