"""Predictions class by class, and those that changed, for the report."""

import base64
import io
from collections.abc import Mapping
from typing import Any

import numpy as np

from lightning_accel.export.evaluate import Predicted
from lightning_accel.export.spec import ExportSpec

_MOST_CLASSES = 1000  # of which a confusion matrix is kept
_PIXELS = 64  # largest side of a picture


def classes_of(predicted: Predicted, ships: str, baseline: str, names: Any = None) -> dict[str, Any]:
    """Confusion matrix and accuracy of each class, as :class:`~lightning_accel.reports.model.Report` holds them.

    Args:
        predicted: predictions of the networks.
        ships: label of the network that ships.
        baseline: label of the network that it is compared with.
        names: of the classes, from the user's metadata; others than a list of strings for each class are ignored.

    Example:
        >>> found = classes_of(Predicted(np.array([0, 0, 1]), 2, {"int8": np.array([0, 1, 1])}), "int8", "")
        >>> found["confusion"], found["accuracy"]
        ([[1, 1], [0, 1]], [0.5, 1.0])
    """
    if ships not in predicted.of or predicted.classes > _MOST_CLASSES:
        return {}
    count = predicted.classes
    named = isinstance(names, list | tuple) and len(names) == count
    matrix = np.zeros((count, count), dtype=int)
    np.add.at(matrix, (predicted.labels, predicted.of[ships]), 1)

    def accuracy(label: str) -> list[float | None]:
        hits = np.bincount(predicted.labels[predicted.right[label]], minlength=count)
        return [float(hit) / total if total else None for hit, total in zip(hits, matrix.sum(1).tolist(), strict=True)]

    return {
        "names": [str(name) for name in names] if named else [str(index) for index in range(count)],
        "network": ships,
        "confusion": matrix.tolist(),
        "accuracy": accuracy(ships),
        **({"baseline": baseline, "baseline_accuracy": accuracy(baseline)} if baseline in predicted.of else {}),
    }


def flipped_of(predicted: Predicted, ships: str, float32: str, spec: ExportSpec, shown: int) -> dict[str, Any]:
    """Predictions of what ships that differ from the float32 network's.

    Args:
        predicted: predictions of the networks.
        ships: label of the network that ships.
        float32: label of the same network in float32.
        spec: the export.
        shown: how many of the samples are part of the report.
    """
    if ships == float32 or not {ships, float32} <= predicted.of.keys():
        return {}
    before, after, labels = predicted.of[float32], predicted.of[ships], predicted.labels
    changed = np.flatnonzero(before != after)
    better, worse = int((after[changed] == labels[changed]).sum()), int((before[changed] == labels[changed]).sum())
    found: dict[str, Any] = {"network": ships, "baseline": float32, "count": len(changed), "samples": len(labels)}
    found |= {"better": better, "worse": worse, "neither": len(changed) - better - worse}
    wanted = changed[:shown].tolist()
    pictures = _pictures(spec, wanted) if wanted else {}
    lines = [
        {"index": i, "label": int(labels[i]), "before": int(before[i]), "after": int(after[i]), **pictures.get(i, {})}
        for i in wanted
    ]
    return {**found, **({"shown": lines} if lines else {})}


def _pictures(spec: ExportSpec, wanted: list[int]) -> dict[int, dict[str, str]]:
    """Data URIs of samples whose only input is an image."""
    found: dict[int, dict[str, str]] = {}
    whole, at = spec.whole, 0
    example = spec.example(whole)
    for call, _ in spec.data.calls(whole):
        feeds: Mapping[str, np.ndarray] = example.named(call)
        arrays = list(feeds.values())
        if len(arrays) != 1:
            return {}
        for i in wanted:
            if at <= i < at + len(arrays[0]) and (uri := picture(arrays[0][i - at])):
                found[i] = {"picture": uri}
        at += len(arrays[0])
    return found


def picture(sample: np.ndarray) -> str:
    """An image ``(H, W)``, ``(C, H, W)`` or ``(H, W, C)`` with 1 or 3 channels as a data URI; empty for anything else.

    Values are stretched from black to white, and every second, third, ... pixel is left out of large images.
    """
    if sample.ndim == 3 and sample.shape[0] in (1, 3):
        sample = sample.transpose(1, 2, 0)
    sample = sample[..., None] if sample.ndim == 2 else sample
    if sample.ndim != 3 or sample.shape[2] not in (1, 3) or min(sample.shape[:2]) < 4 or sample.dtype.kind not in "fiu":
        return ""
    sample = sample[:: -(-sample.shape[0] // _PIXELS), :: -(-sample.shape[1] // _PIXELS)].astype(np.float64)
    if not np.isfinite(sample).all():
        return ""
    low, high = sample.min(), sample.max()
    pixels = ((sample - low) / max(high - low, 1e-12) * 255).round().astype(np.uint8)
    from PIL import Image  # comes with matplotlib; imported by the few reports that show samples

    file = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[2] == 1 else pixels).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
