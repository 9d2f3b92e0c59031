"""Compare quantization-aware training with post-training quantization of the same network."""

import hashlib
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import class_labels
from lightning_accel.calls.contexts import mode
from lightning_accel.core.intervals import Z95
from lightning_accel.export.held_out import HeldOut
from lightning_accel.export.spec import ExportSpec
from lightning_accel.reports.model import Row


@dataclass(frozen=True)
class Predictions:
    """Held-out samples that a network predicts correctly.

    Args:
        right: ``(S,)`` booleans.
        labels: digest of the labels in their order; two sets of predictions are of the same samples if theirs are equal.
    """

    right: np.ndarray
    labels: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values, an eighth of a byte for each sample."""
        return {"right": np.packbits(self.right).tobytes().hex(), "samples": len(self.right), "labels": self.labels}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Predictions":
        """What :meth:`to_dict` gave, again."""
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(values["right"]), np.uint8))
        return cls(bits[: values["samples"]].astype(bool), values["labels"])


def predictions_of(network: nn.Module, data: HeldOut) -> Predictions | None:
    """Run a network over all held-out data, in eval mode, where its parameters are.

    Args:
        network: called as it is exported.
        data: held-out batches; neither the loader's generator nor the global random state moves.

    Returns:
        ``None`` where batches hold no class labels or outputs are no logits ``(N, C)``.
    """
    device = next((tensor.device for tensor in network.parameters()), torch.device("cpu"))
    right, digest = [], hashlib.sha256()
    with mode(network, False), torch.no_grad(), _unmoved(data.loader):
        for call, target in data.calls(network):
            labels = class_labels(target)
            args, kwargs = pytree.tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, call)
            logits = next(
                (x for x in pytree.tree_leaves(network(*args, **kwargs)) if isinstance(x, torch.Tensor)), None
            )
            if labels is None or logits is None or logits.ndim != 2 or len(logits) != len(labels):
                return None
            if labels.min() < 0 or labels.max() >= logits.shape[1]:
                return None
            right.append((logits.argmax(1).cpu() == labels).numpy())
            digest.update(labels.to(torch.int64).numpy().tobytes())
    return Predictions(np.concatenate(right), digest.hexdigest()) if right else None


@contextmanager
def _unmoved(loader: Any) -> Iterator[None]:
    """Restore the state of a loader's own generator after the block."""
    generator = getattr(loader, "generator", None)
    state = None if generator is None else generator.get_state()
    try:
        yield
    finally:
        if generator is not None:
            generator.set_state(state)


def paired_difference(before: np.ndarray, after: np.ndarray) -> tuple[float, float, float]:
    """Difference of two accuracies on the same samples, with its 95 % interval, as shares.

    The interval is that of `Agresti and Min <https://doi.org/10.1002/sim.1781>`_: half a sample is added to each of the four
    cells, so that it has a width even where both networks agree on every sample.

    Args:
        before: ``(S,)`` booleans.
        after: ``(S,)`` booleans of the same samples.

    Returns:
        ``after`` minus ``before``, and the ends of the interval.

    Example:
        >>> rights = np.array([True] * 8 + [False] * 2)
        >>> "{:.2f} {:.2f} {:.2f}".format(*paired_difference(rights, ~rights))
        '-0.60 -0.96 -0.04'
    """
    gained, lost, count = int((after & ~before).sum()), int((before & ~after).sum()), len(before)
    b, c, n = gained + 0.5, lost + 0.5, count + 2
    center = (b - c) / n
    half = Z95 * math.sqrt(b + c - (b - c) ** 2 / n) / n
    return (gained - lost) / count, center - half, center + half


def verdict(difference: tuple[float, float, float], step: int, samples: int) -> str:
    """Whether quantization-aware training earned its cost, in words."""
    points, low, high = (100 * value for value in difference)
    if low > 0:
        says = "Quantization-aware training earned its cost"
    elif high < 0:
        says = "Quantization-aware training cost accuracy"
    else:
        says = "Whether quantization-aware training earned its cost can't be told"
    rest = "; quantizing without training (PTQ) may do" if low <= 0 else ""
    return (
        f"{says}: {points:+.2f} points [{low:+.2f}, {high:+.2f}] over the same network quantized without training at step {step}, "
        f"where fake-quant began, on the same {samples:,} samples{rest}. What the same epochs in float would have brought isn't known."
    )


def beside_untrained(
    rows: dict[str, Row], label: str, spec: ExportSpec, whole: nn.Module
) -> tuple[dict[str, Row], list[str], tuple[float, float, float] | None]:
    """Insert a row for int8 without training before that of the shipped network.

    Returns:
        The rows; a verdict on the benefit of training, in sentences; the change of accuracy by training with its interval, see
        :func:`paired_difference`.
    """
    if spec.untrained is None or label not in rows:
        return rows, [], None
    before = Predictions.from_dict(spec.untrained)
    row = Row(f"{label}, not trained (PTQ)", "pytorch", correct=int(before.right.sum()), total=len(before.right))
    row.parameters = rows[label].parameters
    row.note = (
        f"the network of step {spec.untrained['step']}, quantized; simulated: its file would be as large and as fast"
    )
    place = list(rows).index(label)
    items = list(rows.items())
    rows = dict([*items[:place], (row.name, row), *items[place:]])
    after = predictions_of(whole, spec.data)
    if after is None or after.labels != before.labels:
        says = "PTQ and QAT weren't compared: the held-out samples came in another order, or are others."
        return rows, [says], None
    difference = paired_difference(before.right, after.right)
    return rows, [verdict(difference, spec.untrained["step"], len(before.right))], difference
