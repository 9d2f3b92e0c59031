"""Run recipes on copies of a trained network, and measure their bundles beside it."""

from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_accel.benchmarking.measure import benchmark
from lightning_accel.calls.contexts import mode
from lightning_accel.core.exact_resume import ExactResume
from lightning_accel.distillation.module import DistillationModule
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.manifest import read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.export.callback import ModelExport
from lightning_accel.export.evaluate import correct_samples
from lightning_accel.export.quality import (
    Change,
    Scores,
    change,
    lower_is_better,
    metric_blocks,
    metrics_through,
    monitored,
)
from lightning_accel.export.spec import ExportSpec
from lightning_accel.onnx.export import OnnxExport, export_onnx
from lightning_accel.planning.compression.candidates import Candidate, points
from lightning_accel.planning.compression.recipe import DISTILLATION, Recipe, made
from lightning_accel.planning.compression.trainers import Clock, copied, export_options, save_network, trainer_like

LAST = "last.ckpt"
_BASE = "float32"
_SECONDS = 3.0  # of a latency measurement


@dataclass
class Trial:
    """Everything that the stages of a search share.

    Args:
        module: the trained network; not changed.
        data: its datamodule.
        trainer: like which each stage's Trainer is; not run itself.
        folder: where stages, checkpoints and files are kept.
        batch: samples in a call of a latency measurement.
        threads: of each engine.
        monitor: the user's metric that counts; ``None``: accuracy if there are class labels, else the first metric that is no loss.
        lower: whether a smaller value of it is better; ``None``: by its name, or as a callback of the Trainer monitors it.
    """

    module: L.LightningModule
    data: L.LightningDataModule
    trainer: L.Trainer
    folder: Path
    batch: int = 1
    threads: int = 1
    monitor: str | None = None
    lower: bool | None = None
    spec: ExportSpec = field(init=False)
    export: OnnxExport = field(init=False)
    scores: Scores = field(init=False)

    @property
    def network(self) -> Path:
        """Checkpoint of the trained network."""
        return self.folder / "network.ckpt"

    @property
    def export_options(self) -> dict[str, Any]:
        """Arguments of the user's own ModelExport that describe the network, not the run."""
        return export_options(self.trainer)

    @property
    def distillable(self) -> bool:
        """Whether the network's outputs are class logits, which a teacher's can be compared with."""
        return self.scores.right is not None

    @property
    def score(self) -> tuple[str, float] | None:
        """Name and value of the trained network's score."""
        if self.monitor is None and self.scores.right is not None:
            return "accuracy", float(self.scores.right.mean())
        found = change(self._compared(self.scores), self._compared(self.scores), self._modes)
        return None if found is None else (found.score, float((self.scores.metrics or {})[found.score]))

    def prepare(self) -> None:
        """Keep the network's checkpoint and its float32 file, and measure its score.

        Raises:
            InvalidArgumentError: ``monitor`` isn't logged by ``validation_step``.
        """
        if not self.network.is_file():
            save_network(self.module, self.network)
        work, model = self.attached(ModelExport(str(self.folder / "unused"), **self.export_options))
        (own,) = (c for c in work.callbacks if isinstance(c, ModelExport))  # type: ignore[attr-defined]
        with mode(model, False):
            self.spec = own.spec(work, model)
            whole = self.spec.whole
            self.export = export_onnx(
                whole, self.spec.example(whole), self.folder / "float32.onnx", outputs=self.spec.outputs
            )
            with self._float() as runner:
                self.scores = self._scores(runner)
        if self.monitor is not None and self.monitor not in (self.scores.metrics or {}):
            raise InvalidArgumentError(
                f"Argument `monitor` must be a metric that `validation_step` logs, one of {sorted(self.scores.metrics or {})}, but got "
                f"{self.monitor!r}."
            )

    def run(self, recipe: Recipe, seconds: float | None = None) -> Path:
        """Run a recipe, or go on with one that was interrupted.

        Args:
            recipe: what to do.
            seconds: how long a training may take; ``None``: any time.

        Returns:
            The bundle.

        Raises:
            OutOfTimeError: the training would take longer, as its first steps show.
        """
        place = self.folder / "stages" / recipe.key
        place.mkdir(parents=True, exist_ok=True)
        bundle = place / "bundle"
        L.seed_everything(recipe.seed, verbose=False)
        callbacks = [made(s) for s in recipe.callbacks(str(self.network), str(bundle), self.export_options)]
        if recipe.trains:
            self._fit(recipe, callbacks, place, seconds)
        else:
            self._convert(recipe, callbacks)
        return bundle

    def _convert(self, recipe: Recipe, callbacks: list[L.Callback]) -> None:
        (export,) = callbacks
        assert isinstance(export, ModelExport)
        if recipe.target is None:
            work, model = self.attached(export)
            export.export(work, model, str(self.network))
            return
        assert recipe.effort is not None
        quantizing = export.quantizing(recipe.target, effort=recipe.effort)
        work, model = self.attached(quantizing, export)
        export.check_plan(work)
        L.seed_everything(recipe.seed, verbose=False)
        quantizing.quantize(work, model)
        export.export(work, model, "last")

    def _fit(self, recipe: Recipe, callbacks: list[L.Callback], place: Path, seconds: float | None) -> None:
        kept = ModelCheckpoint(
            place,
            save_top_k=0,
            save_last=True,
            every_n_epochs=1,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )
        clock = [] if seconds is None else [Clock(seconds)]
        work = trainer_like(self.trainer, recipe.epochs, [*callbacks[:-1], *clock, ExactResume(), callbacks[-1], kept])
        student = copied(self.module)
        if (
            not student.training
        ):  # as `load_from_checkpoint` leaves it; else the user's choice of what stays in eval mode holds
            student.train()
        model: L.LightningModule = student
        if recipe.distilled:
            model = DistillationModule(student, copied(self.module), outputs=self._outputs, **DISTILLATION)
        last = place / LAST
        work.fit(model, datamodule=self.data, ckpt_path=str(last) if last.is_file() else None)
        for one in clock:
            one.raise_if_stopped()

    @property
    def _outputs(self) -> str | None:
        module = self.export_options.get("module")
        return module if isinstance(module, str) else None

    def measure(self, bundle: Path) -> list[Candidate]:
        """Measure a bundle's engines beside the trained network in float32."""
        lines = read_manifest(bundle)["engines"]
        with ExitStack() as stack:
            runners = {_BASE: stack.enter_context(self._float())}
            for engine in lines:
                runners[engine] = stack.enter_context(load_runner(bundle, engine, threads=self.threads))
            timed = benchmark(
                {name: partial(r.run, self._feeds()) for name, r in runners.items()}, max_seconds=_SECONDS
            )
            found = []
            for engine, line in lines.items():
                measured, file = timed[engine], bundle / line["file"]
                p10, speed = float(np.percentile(measured.samples, 10)), measured.speedup
                speeds = (measured.p50_ms, p10, speed.value, speed.low, speed.high)
                lost = self._lost(self._scores(runners[engine]))
                found.append(Candidate(engine, line["file"], file.stat().st_size, *speeds, *lost))
        return found

    def time_file(self, file: Path, engine: str) -> tuple[float, float]:
        """10th percentile and median of the latency in ms of a file that is called as the network is."""
        with load_runner(file, engine, threads=self.threads) as runner:
            timed = benchmark({"it": partial(runner.run, self._feeds())}, max_seconds=_SECONDS / 2)["it"]
        return float(np.percentile(timed.samples, 10)), timed.p50_ms

    def _feeds(self) -> dict[str, np.ndarray]:
        samples = self.spec.data.samples(self.spec.whole, self.export.example, self.batch)
        return {name: np.resize(array, (self.batch, *array.shape[1:])) for name, array in samples.items()}

    def _float(self) -> Runner:
        return load_runner(self.export.path, "onnxruntime", threads=self.threads)

    def _scores(self, runner: Runner) -> Scores:
        right = (
            correct_samples({"it": runner.run}, self.export, self.spec.whole, self.spec.data).get("it")
            if self.spec.predicts
            else None
        )
        if (right is not None and self.monitor is None) or not self.spec.bare:
            return Scores(right)
        metrics = metrics_through(self.spec, self.export, runner)
        return Scores(right, metrics, metric_blocks(self.spec, self.export, runner) if metrics else [])

    def _compared(self, scores: Scores) -> Scores:
        return scores if self.monitor is None else Scores(None, scores.metrics, scores.blocks)

    @property
    def _modes(self) -> dict[str, str]:
        modes = monitored(self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.monitor is None:
            return modes
        lower = lower_is_better(self.monitor, modes) if self.lower is None else self.lower
        return {self.monitor: "min" if lower else "max"}

    def _lost(self, scores: Scores) -> tuple[str | None, float | None, float | None, float | None]:
        found: Change | None = change(self._compared(self.scores), self._compared(scores), self._modes)
        if found is None:
            return None, None, None, None
        before = (self.scores.metrics or {}).get(found.score)
        return found.score, *points(found, before, lower_is_better(found.score, self._modes))

    def attached(self, *callbacks: L.Callback) -> tuple[L.Trainer, L.LightningModule]:
        """A Trainer and a copy of the network that are ready to export, without a run."""
        work, model = trainer_like(self.trainer, None, callbacks, keep=False), copied(self.module)
        work.strategy.connect(model)
        model.trainer = work
        work._data_connector.attach_data(model, datamodule=self.data)
        self.data.prepare_data()
        self.data.setup("fit")
        if self.export_options.get("data") == "test":
            self.data.setup("test")
        return work, model
