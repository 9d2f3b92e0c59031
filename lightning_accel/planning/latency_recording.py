"""Record a latency table on this machine, for a network that is pruned on another one or ships as int8."""

import copy
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np

from lightning_accel.calls.batches import Call, WholeCall
from lightning_accel.calls.copies import sample_count
from lightning_accel.calls.discovery import owner_and_call
from lightning_accel.calls.example import ExampleCall
from lightning_accel.core import structure
from lightning_accel.core.arguments import NOT_EMPTY, at_least, checked
from lightning_accel.core.patching import removed
from lightning_accel.core.trainers import callbacks_of
from lightning_accel.engines.registry import engine_named
from lightning_accel.onnx.export import export_onnx
from lightning_accel.pruning.channels.callback import ChannelPruning
from lightning_accel.pruning.channels.latency import FloatFiles, Units, measure_table
from lightning_accel.pruning.channels.latency_table import FP32, LatencyTable
from lightning_accel.pruning.channels.plan import ChannelPlan, ChannelTarget
from lightning_accel.quantization.ptq import quantize_


@checked(path=NOT_EMPTY, batch=at_least(1), threads=at_least(1), target=NOT_EMPTY)
def record_latency_table(
    trainer: L.Trainer,
    model: L.LightningModule,
    data: L.LightningDataModule,
    path: str | os.PathLike[str],
    *,
    engine: str = "onnxruntime",
    batch: int = 1,
    threads: int | None = None,
    target: str | None = None,
) -> LatencyTable:
    """Measure the network with fewer channels in each group, in an engine on this machine, and write the table as a file.

    Args:
        trainer: a Trainer that hasn't run. A ChannelPruning among its callbacks says which layers may lose channels, and ``round_to``.
        model: the network before any channel leaves; weights don't matter.
        data: its datamodule.
        path: file to write.
        engine: that runs the network.
        batch: samples in a call.
        threads: of the engine; ``None``: its default.
        target: arithmetic of a network that ships as int8, e.g. ``"openvino"``; ``None``: float32. Each network is then quantized and
            exported as it ships, which takes seconds for each.

    Returns:
        The table.

    Raises:
        InvalidArgumentError: no channel may leave, or the network can't be written or quantized.
        MissingPackageError: the engine isn't installed.
    """
    engine_named(engine).require()
    with removed(model, "_trainer"):
        model = copy.deepcopy(model).to("cpu").eval()
    trainer.strategy.connect(model)
    model.trainer = trainer
    trainer._data_connector.attach_data(model, datamodule=data)
    data.prepare_data()
    data.setup("fit")
    own = next(iter(callbacks_of(trainer, ChannelPruning)), None)
    settings = {} if own is None else {f: getattr(own.target, f) for f in ("round_to", "limits", "include", "exclude")}
    place, inputs = ("", None) if own is None else (own.module, own.inputs)
    _, call = owner_and_call(model, place, trainer, inputs)
    plan = ChannelPlan(model, place, call, ChannelTarget(pruning_ratio=1e-6, **settings))
    units = {g.name: g.units for g in plan.groups if not g.kept}
    files: Any = FloatFiles(model, place, call, plan.groups, batch)
    if target is not None:
        files = _Int8Files(model, place, call, plan, batch, target)
    table = measure_table(units, plan.latency_counts(), files, engine, batch, threads, target or FP32)
    table.write(os.fspath(path))
    return table


class _Int8Files:
    """Writes a module with fewer units as it ships in int8."""

    def __init__(
        self, module: L.LightningModule, path: str, call: Call, plan: ChannelPlan, batch: int, target: str
    ) -> None:
        self.module, self.path, self.call, self.plan, self.batch, self.target = module, path, call, plan, batch, target

    def __call__(self, units: Units, path: Path) -> Mapping[str, np.ndarray]:
        """Write the first units of each group."""
        groups = self.plan.groups
        chosen = {
            i: list(range(units[g.name], g.units)) for i, g in enumerate(groups) if units.get(g.name, g.units) < g.units
        }
        with removed(self.module, "_trainer"):
            small = copy.deepcopy(self.module)
        if chosen:
            structure.apply(small, self.plan.change(small, chosen, "lightning_accel.latency_table"))
        part = small.get_submodule(self.path)
        quantize_(part, [self.call], target=self.target, inputs=lambda call: WholeCall(*call), effort="low")
        example = ExampleCall.of(part, self.call)
        export_onnx(part, example, path)
        take = np.arange(self.batch) % sample_count(self.call)
        return {name: array[take] for name, array in example.named(self.call).items()}
