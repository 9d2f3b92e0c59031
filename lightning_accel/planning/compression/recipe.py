"""A recipe: what is done to a trained network, as objects for a run and as sections of a config."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import lightning as L

from lightning_accel.core.initial_weights import InitialWeights
from lightning_accel.export.callback import ModelExport
from lightning_accel.pruning.channels.callback import ChannelPruning
from lightning_accel.quantization.qat import QuantizationAwareTraining

FLOAT, PTQ, QAT, CHANNELS, ALL = "float", "ptq", "qat", "channels", "all"
STAGES = {
    FLOAT: "float engines",
    PTQ: "quantization without training",
    QAT: "quantization-aware training",
    CHANNELS: "channel pruning",
    ALL: "channel pruning and quantization-aware training",
}
DISTILLATION: dict[str, Any] = {
    "losses": {"dist": 1.0},
    "alpha": 0.5,
    "temperature": 4.0,
}  # the best loss of experiments.distill_fashion
_LOW_RATE = 0.1  # factor on the learning rate with fake-quantization, which `plan` asks for
_CLASSES = {c.__name__: c for c in (InitialWeights, ChannelPruning, QuantizationAwareTraining, ModelExport)}


@dataclass(frozen=True)
class Recipe:
    """What is done to a trained network.

    Args:
        stage: ``"float"``, ``"ptq"``, ``"qat"``, ``"channels"`` or ``"all"``.
        engines: engines that it is exported to.
        target: arithmetic of a quantized network.
        effort: of a quantization without training.
        reduction: factor by which channel pruning reduces ``measure``.
        measure: argument of :class:`~lightning_accel.pruning.channels.callback.ChannelPruning` that ``reduction`` is given to.
        batch: samples in a call that latency is reduced for.
        threads: of the engine that latency is reduced for.
        epochs: length of the training; 0 is none.
        distilled: whether the trained network is the teacher.
        seed: of the training, and of the choice of the batches that ranges are learned from.
    """

    stage: str
    engines: tuple[str, ...]
    target: str | None = None
    effort: str | None = None
    reduction: float | None = None
    measure: str = "macs_reduction"
    batch: int = 1
    threads: int | None = None
    epochs: int = 0
    distilled: bool = False
    seed: int = 1

    @property
    def name(self) -> str:
        """What is done, in words."""
        parts = {
            FLOAT: "float32",
            PTQ: f"int8 without training, effort {self.effort}",
            QAT: "int8 trained",
            CHANNELS: "channels",
            ALL: "channels and int8 trained",
        }
        name = parts[self.stage]
        if self.reduction is not None:
            what = "latency" if self.measure == "latency_reduction" else "MACs"
            name = name.replace("channels", f"channels for 1/{self.reduction:.2f} of the {what}")
        name += ", distilled" if self.distilled else ""
        name += f", {self.epochs} epochs" if self.epochs else ""
        return name + (f", for {self.target}" if self.target else "")

    @property
    def key(self) -> str:
        """Identifies the recipe on disk."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"{self.stage}-{hashlib.sha256(text.encode()).hexdigest()[:10]}"

    @property
    def trains(self) -> bool:
        """Whether it needs training."""
        return self.epochs > 0

    @property
    def command(self) -> str:
        """Command that runs the recipe's config."""
        return "fit" if self.trains else "quantize" if self.stage == PTQ else "export"

    def compression(self) -> list[dict[str, Any]]:
        """The callbacks that change the network, as sections of a config."""
        found = []
        if self.stage in (CHANNELS, ALL):
            arguments: dict[str, Any] = {self.measure: self.reduction, "start": 0, "end": self._channels_end}
            if self.measure == "latency_reduction":
                arguments |= {"engine": self.engines[0], "batch": self.batch, "threads": self.threads}
            found.append(_section("ChannelPruning", arguments))
        if self.stage in (QAT, ALL):
            start = 0 if self.stage == QAT else max(self._channels_end, self.epochs - max(1, self.epochs // 4))
            found.append(
                _section("QuantizationAwareTraining", {"target": self.target, "start": start, "lr_scale": _LOW_RATE})
            )
        return found

    @property
    def _channels_end(self) -> int:
        """Epoch of the last removal: a third of the run, so that most of it trains the network that ships."""
        return min(self.epochs - 1, max(1, round(self.epochs / 3)))

    def callbacks(self, checkpoint: str, dirpath: str, export: Mapping[str, Any]) -> list[dict[str, Any]]:
        """All callbacks of the recipe's config.

        Args:
            checkpoint: of the trained network.
            dirpath: the bundle's folder.
            export: further arguments of ModelExport.
        """
        last = _section("ModelExport", {**export, "dirpath": dirpath, "engines": list(self.engines)})
        if not self.trains:
            return [last]
        return [_section("InitialWeights", {"ckpt_path": checkpoint}), *self.compression(), last]


def made(section: Mapping[str, Any]) -> L.Callback:
    """The callback that a section of a recipe's config describes."""
    kind: Any = _CLASSES[section["class_path"].rpartition(".")[2]]
    callback: L.Callback = kind(**section["init_args"])
    return callback


def _section(name: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {"class_path": f"lightning_accel.{name}", "init_args": dict(arguments)}
