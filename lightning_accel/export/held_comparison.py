"""Held-out samples in a comparison: what is fed, whether it fits, what the ways predict for it, and the result of it all."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.comparison import BenchmarkSettings, Comparison
from lightning_accel.benchmarking.rounds import Measured, Row
from lightning_accel.engines.base import Runner
from lightning_accel.export.verification import Feeds


def synthetic_samples(runner: Runner) -> dict[str, np.ndarray]:
    """Random inputs, where nothing but speed is asked for; integers are zeros, which are in every vocabulary."""
    rng = np.random.default_rng(0)
    feeds = {}
    for spec in runner.inputs:
        if None in spec.shape[1:]:
            raise ValueError(
                f"Argument `samples` must be given for input `{spec.name}`, whose shape {spec.shape} is open. Pass `--data FILE.npz`, or "
                "export with ModelExport(keep_samples=16)."
            )
        shape = [32 if size is None else size for size in spec.shape]
        floating = np.issubdtype(spec.dtype, np.floating)
        feeds[spec.name] = rng.normal(size=shape).astype(spec.dtype) if floating else np.zeros(shape, spec.dtype)
    return feeds


def check_samples(runner: Runner, feeds: Feeds, labels: np.ndarray | None) -> None:
    """What doesn't fit is told before anything is measured."""
    for spec in runner.inputs:
        spec.check(feeds[spec.name])
    counts = {name: len(array) for name, array in feeds.items()}
    if len(set(counts.values())) != 1 or 0 in counts.values():
        raise ValueError(
            f"Argument `samples` must hold the same number of samples (at least 1) of each input, but got {counts}."
        )
    if labels is None:
        return
    if not np.issubdtype(labels.dtype, np.integer) or not labels.ndim or len(labels) not in counts.values():
        raise ValueError(
            f"Argument `labels` must hold an integer for each of the {next(iter(counts.values()))} samples, but got "
            f"{labels.dtype} of shape {labels.shape}."
        )
    outputs = next(iter(runner.run({name: array[:1] for name, array in feeds.items()}).values()))
    shape = outputs.shape[2:]
    if outputs.ndim < 2 or labels.shape[1:] != shape:
        raise ValueError(
            f"Argument `labels` must have the shape (S, {', '.join(map(str, shape))}) of predictions, but got {labels.shape}, "
            f"where the first output has the shape {outputs.shape}."
        )
    if labels.min() < 0 or labels.max() >= outputs.shape[1]:
        raise ValueError(
            f"Argument `labels` must be from 0 to {outputs.shape[1] - 1}, the classes of the first output, but got "
            f"{labels.min()} to {labels.max()}."
        )


def describe(row: Row, folder: Path) -> None:
    """Name and size of what a way ran; only a file of the bundle has a name that means something later."""
    file = row.way.file
    if file is None or not file.is_file():
        return
    if file.is_relative_to(folder):
        row.result.file = file.relative_to(folder).as_posix()
    weights = file.with_name(f"{file.name}.data")
    row.result.file_bytes = file.stat().st_size + (weights.stat().st_size if weights.is_file() else 0)


def score(measured: Measured, baseline: str, wanted: Feeds, labels: np.ndarray | None) -> None:
    """Accuracy and agreement, from the classes that each way predicts."""
    right = next((row.outputs.get("classes") for row in measured.rows if row.way.name == baseline), None)
    if wanted:
        logits = next(iter(wanted.values()))
        right = logits.argmax(1) if logits.ndim >= 2 and logits.shape[1] > 1 else None
    for row in measured.rows:
        classes = row.outputs.get("classes")
        if classes is None:
            continue
        if (
            right is not None and classes.shape == right.shape
        ):  # one class a sample and one a pixel can't be held together
            row.result.agreement = float((classes == right).mean())
        if labels is not None:
            row.result.accuracy = float((classes == labels).mean())


def assembled(
    measured: Measured,
    feeds: Feeds,
    settings: BenchmarkSettings,
    *,
    baseline: str,
    machine: Mapping[str, Any],
    source: str | None,
    against: str,
) -> Comparison:
    """Put what was measured together with how and on what; nothing is decided yet.

    Args:
        measured: all rows, scored.
        feeds: the samples.
        settings: how it was measured.
        baseline: name of the way that speed-ups refer to.
        machine: its description, from before the measurement.
        source: where the samples come from; ``None`` for random ones.
        against: what predictions were compared with.
    """
    count = len(next(iter(feeds.values())))
    told = {
        **asdict(settings),
        "samples": 0 if source is None else count,
        "data": "random inputs" if source is None else f"{count:,} held-out samples, {source}",
        "agreement_with": against,
        "spinning": "off",
    }
    nulls = {key: pick((n[key] for n in measured.null), default=None) for key, pick in (("low", min), ("high", max))}
    return Comparison(
        environment=dict(machine),
        settings=told,
        baseline=baseline,
        null={"value": measured.null[0]["value"] if measured.null else None, **nulls, "points": measured.null},
        noisy=any(n["noisy"] for n in measured.null),
        ways=[row.result for row in measured.rows],
        interrupted=measured.interrupted,
    )
