"""The decision at the end of a run: the bundle's default is the fastest way within the budgets, on all held-out data."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.export.bundle import decided, write_comparison
from lightning_accel.export.bundle_benchmark import compare_ways, shipped_line
from lightning_accel.export.files import Files
from lightning_accel.export.order import Order


def decide_default(
    order: Order,
    files: Files,
    folder: Path,
    content: Mapping[str, Any],
    report: dict[str, Any],
    *,
    labelled: bool,
) -> dict[str, Any]:
    """Run the network in the ways that matter, and write ``comparison.json``.

    Args:
        order: what is shipped, its budgets, and the held-out data.
        files: the bundle's files and the trained network.
        folder: where they lie; no manifest is needed yet.
        content: what the manifest will say of engines, file, precision, inputs and outputs.
        report: gets the comparison, and a note on what was decided.
        labelled: whether the labels are classes of the network's first output.

    Returns:
        What the decision changes in the manifest.
    """
    feeds, labels = order.data.everything(order.whole, files.shipped.input_names)
    outputs = _outputs(files, feeds, order.batch_size)
    written: dict[str, Any] = {file.relative_to(folder).as_posix(): {} for file in folder.rglob("*") if file.is_file()}
    comparison = compare_ways(
        folder,
        {**content, "files": written},
        {**feeds, **outputs},
        labels if labelled else None,
        source=f"the {order.data.source}",
        budgets=order.budgets,
        settings=order.benchmark,
    )
    report["comparison"] = comparison.to_dict()
    report["notes"].append(
        "Nothing was decided: the comparison was interrupted."
        if comparison.decision is None
        else f"Decision: {comparison.decision['why']}"
    )
    write_comparison(folder, report["comparison"])
    return decided(report["comparison"], shipped_line(comparison))


def _outputs(files: Files, feeds: Mapping[str, np.ndarray], batch: int) -> dict[str, np.ndarray]:
    """What the trained network computes for all held-out samples."""
    count = len(next(iter(feeds.values())))
    parts = [
        files.network({name: array[start : start + batch] for name, array in feeds.items()})
        for start in range(0, count, batch)
    ]
    return {name: np.concatenate([part[name] for part in parts]) for name in files.shipped.output_names}
