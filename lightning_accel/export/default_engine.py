"""Choose the bundle's default: the fastest variant within the budgets, on all held-out data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.benchmark_bundle import compare_variants, shipped_line
from lightning_accel.benchmarking.comparison import Comparison
from lightning_accel.benchmarking.scores import CLASSES, VALUES
from lightning_accel.bundle.writer import decided, write_comparison
from lightning_accel.export.files import Files
from lightning_accel.export.spec import ExportSpec
from lightning_accel.reports.model import DECISION, Note, Report


def output_kind_of(spec: ExportSpec, files: Files, *, labelled: bool) -> str | None:
    """How the network's first output is scored: as classes, as values, or ``None`` if neither spec nor targets define it.

    Args:
        spec: its ``output_kind`` takes precedence over its held-out data.
        files: the trained network.
        labelled: whether there are labels that are classes of the network's first output.
    """
    if spec.output_kind is not None or labelled:
        return spec.output_kind or CLASSES
    target = spec.data.first_target(spec.whole)
    output = next(iter(files.network(files.shipped.example.feeds()).values()))
    return next((output_kind for output_kind in (VALUES, CLASSES) if _fits(target, output, output_kind)), None)


def _fits(target: np.ndarray | None, output: np.ndarray, output_kind: str) -> bool:
    """Whether targets are the values that an output should have, or the classes of its logits."""
    if target is None:
        return False
    if output_kind == VALUES:
        shaped = target.shape == output.shape or (*target.shape, 1) == output.shape
        return shaped and np.issubdtype(target.dtype, np.floating)
    shaped = output.ndim >= 2 and target.shape == (len(output), *output.shape[2:])
    whole = shaped and np.issubdtype(target.dtype, np.integer)
    return bool(whole and target.min() >= 0 and target.max() < output.shape[1])


def decide_default(
    spec: ExportSpec,
    files: Files,
    folder: Path,
    content: Mapping[str, Any],
    report: Report,
) -> dict[str, Any]:
    """Run the network in the common variants, and write ``comparison.json``.

    If none of the requested engines runs on this machine, the variants are measured but no default is chosen: the fastest variant on a CPU
    says nothing about the engine that the bundle is for, which stays the default.

    Args:
        spec: the export, with budgets and held-out data.
        files: the bundle's files and the trained network.
        folder: folder of the files; no manifest is needed yet.
        content: engines, file, precision, output_kind, inputs and outputs for the manifest.
        report: gets the comparison, and a note on what was decided.

    Returns:
        Changes to the manifest.
    """
    feeds, targets = spec.data.everything(spec.whole, files.shipped.example)
    outputs = _outputs(files, feeds, spec.batch_size)
    here = any(line["runs_here"] for line in content["engines"].values())
    written: dict[str, Any] = {file.relative_to(folder).as_posix(): {} for file in folder.rglob("*") if file.is_file()}
    comparison = compare_variants(
        folder,
        {**content, "files": written},
        {**feeds, **outputs},
        _labels(targets, next(iter(outputs.values())), content["output_kind"]),
        source=f"the {spec.data.source}",
        output_kind=content["output_kind"],
        budgets=spec.budgets if here else None,
        settings=spec.benchmark,
    )
    report.comparison = comparison.to_dict()
    report.notes.append(Note(DECISION, _told(comparison, spec, here=here)))
    write_comparison(folder, report.comparison)
    return decided(report.comparison, shipped_line(comparison))


def _told(comparison: Comparison, spec: ExportSpec, *, here: bool) -> str:
    """The decision in one sentence, or the reason why there is none."""
    if comparison.decision is not None:
        return f"Decision: {comparison.decision['why']}"
    if comparison.interrupted:
        return "Nothing was decided: the comparison was interrupted."
    assert not here
    names = " and ".join(spec.engines)
    return (
        f"Nothing was decided: {names}, which this bundle is for, can't run on this machine, and stays the default. Decide on the machine "
        "that is to run it: lightning-accel benchmark BUNDLE, with the budgets."
    )


def _labels(targets: np.ndarray | None, output: np.ndarray, output_kind: str | None) -> np.ndarray | None:
    """Targets that outputs can be scored against."""
    if targets is None or output_kind is None or not _fits(targets, output, output_kind):
        return None
    # Values of 0 and 1 alone are what logits are trained towards, which are no such values themselves.
    return None if output_kind == VALUES and np.isin(targets, (0, 1)).all() else targets


def _outputs(files: Files, feeds: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """Outputs of the trained network for all held-out samples."""
    count = len(next(iter(feeds.values())))
    parts = [
        files.network({name: array[start : start + batch] for name, array in feeds.items()})
        for start in range(0, count, batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in files.shipped.output_names}
