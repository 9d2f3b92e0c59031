"""What is to be shipped, and how it is to be checked."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import nn

from lightning_accel.benchmarking.comparison import BenchmarkSettings
from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.calls.names import Axes
from lightning_accel.export.held_out import HeldOut
from lightning_accel.onnx.pre_post import surrounded


@dataclass
class Order:
    """What is to be shipped, and how it is to be checked.

    Args:
        module: the LightningModule.
        part: the submodule whose ``forward`` is exported; ``module`` itself, usually.
        data: held-out batches; of what ``preprocess`` takes, if there is one.
        engines: engines to ship to.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, or ``"int8"`` for a network that was trained quantization-aware.
        samples: held-out samples to verify on, or all if there are fewer.
        batch_size: samples in a call of the benchmark.
        teacher: network to compare with, called as ``part`` is; ``None`` for none.
        history: lines for the report: what was done to the network and when.
        compression: measured values for the report.
        command: command that repeats the export.
        marks: reasons why the network isn't what was asked for; they go into manifest and report.
        preprocess: goes before the network, in the file.
        postprocess: goes behind it.
        metadata: notes that travel in the file.
        dynamic: axes beyond the batch that may change.
        keep_samples: samples that are shipped with their outputs, so that another machine can verify without data.
        budgets: run the network in all common variants and decide within these which one is the default; ``None`` for not.
        benchmark: how those variants are measured; ``None`` for the defaults.
        output_kind: how the first output is scored, ``"classes"`` or ``"values"``; ``None``: as held-out targets tell.
        timeline: ``phase``, ``start`` and ``end`` (optimizer steps; ``None``: no end of its own) of each callback.
        curves: what the run logged, once an epoch, for the report.
        run: the command and configuration of the run, for the report.
        untrained: what the int8 network predicted before it was trained, see :mod:`~lightning_accel.export.ptq_baseline`.
    """

    module: L.LightningModule
    part: nn.Module
    data: HeldOut
    engines: Sequence[str]
    precision: str = "fp32"
    samples: int = 512
    batch_size: int = 32
    teacher: nn.Module | None = None
    history: Sequence[str] = ()
    compression: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    marks: Sequence[str] = ()
    preprocess: nn.Module | None = None
    postprocess: nn.Module | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Axes = field(default_factory=dict)
    keep_samples: int = 0
    budgets: Budgets | None = None
    benchmark: BenchmarkSettings | None = None
    output_kind: str | None = None
    timeline: Sequence[Mapping[str, Any]] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    untrained: Mapping[str, Any] | None = None

    @property
    def whole(self) -> nn.Module:
        """What is exported: the part, with what comes before and after it."""
        return surrounded(self.part, self.preprocess, self.postprocess)

    @property
    def bare(self) -> bool:
        """Whether nothing comes before or after it."""
        return self.preprocess is None and self.postprocess is None
