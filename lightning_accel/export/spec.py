"""Specification of an export and its verification."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import lightning as L
from torch import nn

from lightning_accel.benchmarking.comparison import BenchmarkSettings
from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.benchmarking.scores import VALUES
from lightning_accel.calls.example import ExampleCall
from lightning_accel.calls.names import Axes
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.export.held_out import HeldOut
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.reports.model import LayerTable, Phase


@dataclass
class ExportSpec:
    """Specification of an export and its verification.

    Args:
        module: the LightningModule.
        part: the submodule whose ``forward`` is exported; ``module`` itself, usually.
        data: held-out batches; of what ``preprocess`` takes, if there is one.
        engines: engines to ship to.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, or ``"int8"`` for a network that was trained quantization-aware.
        samples: held-out samples to verify on, or all if there are fewer.
        batch_size: samples in a call of the benchmark.
        teacher: network to compare with, called as ``part`` is; ``None`` for none.
        history: sentences for the report: changes to the network and when.
        compression: measurements of the callbacks, for the report.
        command: command that repeats the export.
        unfinished: targets that the network hasn't reached; they go into manifest and report.
        preprocess: module before the network, in the file.
        postprocess: module after it.
        metadata: key-value pairs stored in the file.
        dynamic: axes beyond the batch that may change.
        batch: ``"dynamic"``, or ``"fixed"``: a sample is then a whole call.
        batch_axis: axis of the batch of inputs where it isn't the first one; ``None``: of no input.
        outputs: which outputs are written, and their names; ``None``: all.
        keep_samples: samples that are shipped with their outputs, so that another machine can verify without data.
        budgets: budgets for choosing the default among the common variants; ``None``: no choice.
        benchmark: how those variants are measured; ``None`` for the defaults.
        output_kind: how the first output is scored, ``"classes"`` or ``"values"``; ``None``: inferred from held-out targets.
        timeline: when each callback changed the network.
        curves: logged metrics of each epoch, for the report.
        run: the run's ``id``, command and configuration, for the report.
        checkpoint: file that holds the weights; its SHA-256 goes into the manifest.
        strict: whether one failing engine fails the export.
        refused: engines whose kernels compute another arithmetic on this machine, and why.
        flipped: how many samples whose prediction changed are part of the report.
        previous: bundle to compare with; ``None``: the one that is replaced, if there is one.
        price_per_hour: of a machine like this one; ``None``: no costs.
        untrained: predictions of the int8 network before training, see :mod:`~lightning_accel.export.ptq_baseline`.
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
    compression: Sequence[LayerTable] = ()
    command: str = ""
    unfinished: Sequence[str] = ()
    preprocess: nn.Module | None = None
    postprocess: nn.Module | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    dynamic: Axes = field(default_factory=dict)
    batch: str = "dynamic"
    batch_axis: Mapping[str, int | None] | None = None
    outputs: Sequence[str] | Mapping[str, str] | None = None
    keep_samples: int = 0
    budgets: Budgets | None = None
    benchmark: BenchmarkSettings | None = None
    output_kind: str | None = None
    timeline: Sequence[Phase] = ()
    curves: Sequence[Mapping[str, Any]] = ()
    run: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    strict: bool = False
    refused: Mapping[str, InvalidArgumentError] = field(default_factory=dict)
    untrained: Mapping[str, Any] | None = None
    flipped: int = 0
    previous: str | None = None
    price_per_hour: float | None = None

    @property
    def whole(self) -> nn.Module:
        """The exported module: ``part`` with pre- and postprocessing."""
        return surrounded(self.part, self.preprocess, self.postprocess)

    def example(self, whole: nn.Module) -> ExampleCall:
        """How ``whole`` is called: the first held-out batch, with the axes that may change."""
        call = self.data.first_call(whole)
        return ExampleCall.of(whole, call, dynamic=self.dynamic, batch=self.batch, batch_axis=self.batch_axis)

    @property
    def names_batch(self) -> bool:
        """Whether the user said which axes are the batch."""
        return self.batch == "fixed" or self.batch_axis is not None

    @property
    def predicts(self) -> bool:
        """Whether outputs may hold logits, whose largest is a prediction."""
        return self.output_kind != VALUES

    @property
    def bare(self) -> bool:
        """Whether there is neither pre- nor postprocessing."""
        return self.preprocess is None and self.postprocess is None
