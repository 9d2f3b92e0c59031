"""The smallest network that channel pruning can leave: no budget below its latency and size can be met."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.calls.contexts import mode
from lightning_accel.calls.discovery import owner_and_call
from lightning_accel.core import structure
from lightning_accel.errors import InvalidArgumentError, LightningAccelError
from lightning_accel.export.callback import ModelExport
from lightning_accel.onnx.export import export_onnx
from lightning_accel.planning.compression.candidates import latency_and_size
from lightning_accel.pruning.channels.plan import ChannelPlan, ChannelTarget
from lightning_accel.pruning.channels.selection import removal_order, units_of

if TYPE_CHECKING:
    from lightning_accel.planning.compression.trial import Trial

_BATCHES = 2  # for ranges: only speed and size matter


@dataclass(frozen=True)
class Smallest:
    """The smallest network in one engine.

    Args:
        engine: that ran it.
        target: arithmetic of an int8 network; ``None``: float32.
        p10_ms: 10th percentile of its latency in ms, which a busy machine hardly changes.
        p50_ms: median.
        file_bytes: size of its file in bytes.
    """

    engine: str
    target: str | None
    p10_ms: float
    p50_ms: float
    file_bytes: int

    @property
    def name(self) -> str:
        """What and where."""
        return f"{'float32' if self.target is None else 'int8'} in {self.engine}"

    def over(self, budgets: Budgets) -> list[str]:
        """The limits that even this network exceeds, in words."""
        found = []
        if budgets.max_latency_ms is not None and self.p10_ms > budgets.max_latency_ms:
            found.append(f"{self.p50_ms:.3f} ms, {self.p50_ms / budgets.max_latency_ms:.2f} times the limit")
        if budgets.max_bytes is not None and self.file_bytes > budgets.max_bytes:
            found.append(f"{self.file_bytes:,} bytes, {self.file_bytes / budgets.max_bytes:.2f} times the limit")
        return found

    def excess(self, budgets: Budgets) -> float:
        """Largest factor by which it exceeds a limit; at most 1 if it exceeds none."""
        return max(latency_and_size(budgets, self.p50_ms, self.file_bytes))


def smallest_networks(trial: "Trial", engines: Sequence[str], targets: Sequence[str]) -> list[Smallest]:
    """Measure the network with all channels gone that may leave, untrained, in float32 and in int8.

    A network without channels that may leave is measured as it is; one that can't be quantized in float32 only.
    """
    found = [_measured(trial, engine, None, None) for engine in engines]
    for target in targets:
        try:
            found.append(_measured(trial, target, target, None))
        except LightningAccelError:  # the stage that quantizes the whole network says why
            continue
    return found


def check_budgets(budgets: Budgets, smallest: Sequence[Smallest]) -> None:
    """Check that a network could be fast and small enough.

    Raises:
        InvalidArgumentError: even the smallest isn't; the message says which limit, and by how much.
    """
    if not smallest:
        return
    fastest = min(smallest, key=lambda s: s.p10_ms)
    if budgets.max_latency_ms is not None and fastest.p10_ms > budgets.max_latency_ms:
        raise InvalidArgumentError(
            f"Argument `max_latency_ms` must be reachable, but got {budgets.max_latency_ms:g}: even the smallest network that channel "
            f"pruning can leave, {fastest.name}, takes {fastest.p50_ms:.3f} ms, {fastest.p50_ms / budgets.max_latency_ms:.2f} times as "
            "long. Raise it, or begin with another network."
        )
    tiniest = min(smallest, key=lambda s: s.file_bytes)
    if budgets.max_bytes is not None and tiniest.file_bytes > budgets.max_bytes:
        raise InvalidArgumentError(
            f"Argument `max_bytes` must be reachable, but got {budgets.max_bytes:,}: even the smallest network that channel pruning can "
            f"leave, {tiniest.name}, has {tiniest.file_bytes:,} bytes, {tiniest.file_bytes / budgets.max_bytes:.2f} times as many. Raise "
            "it, or begin with another network."
        )


def foreseen(trial: "Trial", engine: str, target: str | None, macs_reduction: float) -> Smallest:
    """Measure the network with fewer channels, untrained: its speed and size are those of the trained one."""
    return _measured(trial, engine, target, macs_reduction)


def _measured(trial: "Trial", engine: str, target: str | None, macs_reduction: float | None) -> Smallest:
    own = ModelExport(str(trial.folder / "unused"), **trial.export_options)
    quantizing: Any = None
    if target is not None:
        quantizing = own.quantizing(target, _BATCHES, effort="low")
    work, model = trial.attached(*([] if quantizing is None else [quantizing]), own)
    with mode(model, False):
        _remove(trial, work, model, macs_reduction)
        if quantizing is not None:
            quantizing.quantize(work, model)
        spec = own.spec(work, model)
        file = Path(trial.folder / f"smallest-{engine}-{target}.onnx")
        export_onnx(spec.whole, spec.example(spec.whole), file, outputs=spec.outputs)
    p10, p50 = trial.time_file(file, engine)
    size = file.stat().st_size
    file.unlink()
    return Smallest(engine, target, p10, p50, size)


def _remove(trial: "Trial", work: Any, model: Any, macs_reduction: float | None) -> None:
    """Remove channels for a factor, or all that may leave, if there are any."""
    path = trial.export_options.get("module") or ""
    _, call = owner_and_call(model, path, work, trial.export_options.get("inputs"))
    if macs_reduction is not None:
        plan = ChannelPlan(model, path, call, ChannelTarget(macs_reduction=macs_reduction))
        structure.apply(model, plan.change(model, plan.choose(model), "lightning_accel.foreseen"))
        return
    try:
        plan = ChannelPlan(model, path, call, ChannelTarget(pruning_ratio=1e-6))
    except InvalidArgumentError:  # none may leave
        return
    blocks = removal_order(plan.groups, [torch.zeros(g.units) for g in plan.groups], "layer")
    structure.apply(model, plan.change(model, units_of(blocks), "lightning_accel.smallest"))
