"""How much better or worse one network is than another on the same held-out data, with an interval."""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from lightning_accel.engines.base import Runner
from lightning_accel.export.evaluate import through_engine, user_metrics
from lightning_accel.export.ptq_baseline import paired_difference
from lightning_accel.export.spec import ExportSpec
from lightning_accel.onnx.export import OnnxExport

ACCURACY = "accuracy"
SLACK = 0.01  # relative loss of a metric that is allowed where there are too few batches for an interval
_MOST_BLOCKS, _FEWEST_BLOCKS = 8, 4
_T95 = {3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365}  # Student's t by degrees of freedom, two-sided 95 %
_LOWER_IS_BETTER = (
    "loss",
    "error",
    "err",
    "mae",
    "mse",
    "rmse",
    "mape",
    "wer",
    "cer",
    "perplexity",
    "nll",
    "fid",
    "distance",
)


@dataclass(frozen=True)
class Change:
    """Change of a score from one network to another; positive is better.

    Args:
        score: ``"accuracy"``, or the name of a metric of the user.
        value: the change; of accuracy as a share.
        low: lower end of its 95 % interval.
        high: upper end.
    """

    score: str
    value: float
    low: float
    high: float

    @property
    def worse(self) -> bool:
        """Whether the whole interval lies below 0."""
        return self.high < 0

    def __str__(self) -> str:
        if self.score == ACCURACY:
            return f"{100 * self.value:+.2f} points [{100 * self.low:+.2f}, {100 * self.high:+.2f}]"
        return f"`{self.score}` {'better' if self.value >= 0 else 'worse'} by {abs(self.value):.3g} [{self.low:+.3g}, {self.high:+.3g}]"


@dataclass(frozen=True)
class Scores:
    """What is known about the quality of one network on the held-out data.

    Args:
        right: ``(S,)`` booleans: samples predicted correctly; ``None`` without labels.
        metrics: the user's metrics over all held-out data.
        blocks: the user's metrics over each of a few parts of it; empty if there are too few batches.
    """

    right: np.ndarray | None = None
    metrics: Mapping[str, float] | None = None
    blocks: Sequence[Mapping[str, float]] = ()


def change(before: Scores, after: Scores, modes: Mapping[str, str]) -> Change | None:
    """Change of the score from one network to another.

    Args:
        before: the network to compare with.
        after: the other one.
        modes: ``"min"`` or ``"max"`` by metric, as the run's callbacks monitor them; the first one that both have decides.

    Returns:
        Accuracy if both have labels; else the monitored metric, or the first that is no loss; ``None`` if nothing says how good
        they are.
    """
    if before.right is not None and after.right is not None and len(before.right) == len(after.right):
        return Change(ACCURACY, *paired_difference(before.right, after.right))
    common = [name for name in before.metrics or {} if name in (after.metrics or {})]
    monitored = [name for name in modes if name in common]
    name = next(itertools.chain(monitored, (n for n in common if not n.endswith("loss")), common), None)
    if name is None:
        return None
    sign = -1.0 if lower_is_better(name, modes) else 1.0
    one, two = (before.metrics or {})[name], (after.metrics or {})[name]
    value = sign * (two - one)
    pairs = [(a[name], b[name]) for a, b in zip(before.blocks, after.blocks, strict=False) if name in a and name in b]
    steps = np.array([sign * (b - a) for a, b in pairs])
    if len(steps) < _FEWEST_BLOCKS or not np.isfinite(steps).all():
        slack = SLACK * max(abs(one), 1e-12)
        return Change(name, value, value - slack, value + slack)
    half = _T95[len(steps) - 1] * float(steps.std(ddof=1)) / math.sqrt(len(steps))
    return Change(name, value, value - half, value + half)


def lower_is_better(name: str, modes: Mapping[str, str]) -> bool:
    """Whether a smaller value of a metric is better: as the run monitors it, else by its name."""
    if name in modes:
        return modes[name] == "min"
    return name.lower().replace("/", "_").split("_")[-1] in _LOWER_IS_BETTER or name.lower().endswith("loss")


def monitored(callbacks: Sequence[Any]) -> dict[str, str]:
    """Metrics that the callbacks of a run monitor, with ``"min"`` or ``"max"``."""
    found = {getattr(c, "monitor", None): getattr(c, "mode", None) for c in callbacks}
    return {name: mode for name, mode in found.items() if isinstance(name, str) and mode in ("min", "max")}


def metrics_through(spec: ExportSpec, export: OnnxExport, runner: Runner) -> dict[str, float]:
    """The user's metrics with a runner in place of ``forward``; empty if they can't be computed that way."""
    try:
        with through_engine(spec.part, export, runner.run) as calls:
            found = user_metrics(spec.module, spec.data)
    except Exception:  # the user's own code; the comparisons of the engines that ship say what it raised
        return {}
    return {name: value for name, value in found.items() if calls[0] and math.isfinite(value)}


def metric_blocks(spec: ExportSpec, export: OnnxExport, runner: Runner) -> list[dict[str, float]]:
    """The user's metrics over parts of the held-out batches, for an interval; empty if there are too few batches."""
    try:
        batches = len(spec.data.loader)
    except TypeError:  # a stream
        return []
    count = min(_MOST_BLOCKS, batches)
    if count < _FEWEST_BLOCKS:
        return []
    parts = [replace(spec.data, loader=_Part(spec.data.loader, i, count), loaders=None) for i in range(count)]
    return [metrics_through(replace(spec, data=part), export, runner) for part in parts]


@dataclass(frozen=True)
class _Part:
    """Every ``of``-th batch of a loader, from the one at ``place`` on."""

    loader: Any
    place: int
    of: int

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(iter(self.loader), self.place, None, self.of)

    def __len__(self) -> int:
        return len(range(self.place, len(self.loader), self.of))
