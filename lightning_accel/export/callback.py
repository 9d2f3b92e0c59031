"""ModelExport: write the trained network as a verified bundle when ``fit`` ends."""

import os
import shlex
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities import rank_zero_info, rank_zero_only, rank_zero_warn
from torch import nn
from torch.nn.parameter import is_lazy
from typing_extensions import override

from lightning_accel.benchmarking.comparison import BenchmarkSettings
from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.benchmarking.scores import CLASSES, VALUES
from lightning_accel.bundle.lock import lock, unlock
from lightning_accel.bundle.provenance import run_of
from lightning_accel.bundle.writer import check_destination, expanded
from lightning_accel.calls.batches import InputsFunction
from lightning_accel.calls.contexts import builds_layers_late, has_forward
from lightning_accel.calls.discovery import chosen_path, find_submodule
from lightning_accel.calls.learned import called_path
from lightning_accel.core import structure
from lightning_accel.core.arguments import FOLDER, JSON, NOT_EMPTY, Rule, above, at_least, checked, one_of, shown
from lightning_accel.core.callback import compression_callbacks
from lightning_accel.core.clock import step_of
from lightning_accel.core.packages import TrainerCallback
from lightning_accel.core.patching import patches_of_run
from lightning_accel.core.shards import gathered, whole_copy
from lightning_accel.core.strategies import Capability, prepares_early, require, shards
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.engines.manifest import MANIFEST
from lightning_accel.engines.registry import engine_names
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.export.bundle_reports import summary
from lightning_accel.export.conflicts import check_callbacks, check_precision
from lightning_accel.export.failures import failed_line
from lightning_accel.export.held_out import HeldOut, held_out
from lightning_accel.export.history import history, measured, timeline
from lightning_accel.export.logging import log_bundle
from lightning_accel.export.pipeline import write_bundle
from lightning_accel.export.preflight import check_engine, check_installed, try_out, warn_of_objects
from lightning_accel.export.ptq_baseline import predictions_of
from lightning_accel.export.spec import ExportSpec
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.quantization.base_callback import QuantizingCallback
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantized_forwards
from lightning_accel.quantization.ptq import PostTrainingQuantization
from lightning_accel.reports.curves import Curves
from lightning_accel.reports.model import Report

_PRECISIONS = ("fp32", "fp16", "bf16", "int8")
_CKPT_PATH = Rule(
    '"last", "best" or the path of a checkpoint', lambda value: value in ("last", "best") or bool(Path(value).suffix)
)
_DATA = Rule(
    'a loader, "val" or "test"',
    lambda value: value in ("val", "test") if isinstance(value, str) else hasattr(value, "__iter__"),
)


class ModelExport(TrainerCallback):
    """Write the trained network as a verified bundle when ``fit`` ends.

    Before training, a preflight exports, checks and test-builds the untrained network. At the end the weights are
    exported to ONNX, compared with PyTorch on held-out data (integers bit for bit, outputs in float emulation and on the
    kernels of each engine, the user's metric), built into engines, measured, and reported. If an exported file differs from
    the trained network, the run fails after the checkpoint ``<dirpath>.ckpt`` is saved, and no bundle is written.

    Args:
        dirpath: the bundle's folder; a leading ``~`` is the home folder, a link is followed. An earlier bundle there is replaced when the
            new one is complete.
        engines: ``"onnxruntime"``, ``"tensorrt"``, ``"openvino"``, ``"pytorch"``; ``None`` means the target's natural engine.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"`` (TensorRT only) or ``"int8"``; ``None`` means int8 if the network is
            trained quantization-aware. TensorRT's int8 engine computes the rest in fp16.
        ckpt_path: ``"last"`` weights of the run, ``"best"`` by the run's ``ModelCheckpoint``, or a checkpoint's path.
        data: held-out data: a loader, ``"test"`` or ``"val"`` (the default: the validation loader).
        inputs: maps a batch to the arguments of ``forward``; only needed if the signature is ambiguous.
        incomplete: ``"refuse"`` or ``"mark"`` a network that hasn't reached its targets.
        samples: held-out samples to verify on, or all if there are fewer.
        preprocess: module that maps the file's inputs, e.g. uint8 pixels, to the network's arguments; it is exported
            in float with the network, and ``data`` must hold its inputs.
        postprocess: module that maps the network's result to the file's outputs, e.g. probabilities.
        metadata: key-value pairs stored in file and manifest, e.g. ``{"class_names": ["cat", "dog"]}``.
        dynamic: axes beyond the batch that may change, see :func:`export_onnx`.
        batch: ``"dynamic"``, or ``"fixed"`` for a network that takes one batch size only; a sample is then a whole call. ``None``: as the
            callback that quantizes the same module says, else ``"dynamic"``.
        batch_axis: axis of the batch of inputs where it isn't the first one, e.g. ``{"state": 1}``; ``None`` for an input that is the same
            in each call. ``None`` alone: as the callback that quantizes says, else the first axis of every input.
        module: dotted path of the submodule to ship, called as the user's own steps call it; ``None``: the whole module's
            ``forward``, or without one what is quantized or what ``training_step`` calls.
        outputs: names of the outputs to write, see :func:`export_onnx`, or ``{name: name in the file}``; ``None``: all.
        keep_samples: how many held-out samples are shipped with the trained network's outputs, so that
            ``lightning-accel verify`` needs no data on another machine. They are part of your data.
        budgets: run the network in the common runtime variants, each in a process of its own, and let the fastest within these
            budgets be the bundle's default, e.g. ``Budgets(max_drop=0.5)``; ``None`` measures no variants.
        benchmark: how those variants are measured: batch sizes, callers, times; ``None`` takes at most 3 minutes for a small CNN.
        output_kind: what the first output holds: ``"classes"``: logits, scored by the largest; ``"values"``, scored by R² and your own
            metrics. ``None``: by the type of the held-out targets, integers or floating point.
        flipped: how many of the samples whose prediction isn't the float32 network's the report shows, images as pictures. They are part of
            your data; without it the report counts them.
        previous: bundle that the report compares this one with, both run in turns on the held-out data; ``None``: the one that is replaced.
        price_per_hour: price of an hour of a machine like this one, in any currency: the report then states what a million samples cost.
        strict: whether one failing engine fails the run. By default the other engines ship, manifest and report mark the failed
            one with its reason, a warning says so, before training if it fails then already, and only if none passes it is an error.
        name: the callback's name.

    Raises:
        InvalidArgumentError: an argument is out of its range; or, in ``setup``, contradicts the other callbacks.
        VerificationError: an exported file differs from the trained network, or every engine does.

    Example:
        >>> ModelExport("artifacts", engines=["tensorrt"]).ckpt_path
        'last'
    """

    @checked(
        dirpath=FOLDER,
        ckpt_path=_CKPT_PATH,
        data=_DATA,
        metadata=JSON,
        samples=at_least(1),
        batch=one_of("dynamic", "fixed"),
        keep_samples=at_least(0),
        flipped=at_least(0),
        outputs=NOT_EMPTY,
        name=NOT_EMPTY,
        price_per_hour=above(0),
        previous=FOLDER,
    )
    def __init__(
        self,
        dirpath: str | os.PathLike[str] = "artifacts",
        engines: str | list[str] | None = None,
        precision: str | None = None,
        ckpt_path: str = "last",
        data: Any = None,
        inputs: InputsFunction | None = None,
        incomplete: str = "refuse",
        samples: int = 512,
        preprocess: nn.Module | None = None,
        postprocess: nn.Module | None = None,
        metadata: dict[str, Any] | None = None,
        dynamic: dict[str, dict[int, str]] | None = None,
        module: str | None = None,
        outputs: list[str] | dict[str, str] | None = None,
        keep_samples: int = 0,
        budgets: Budgets | None = None,
        benchmark: BenchmarkSettings | None = None,
        output_kind: str | None = None,
        strict: bool = False,
        name: str = "export",
        batch: str | None = None,
        batch_axis: dict[str, int | None] | None = None,
        flipped: int = 0,
        previous: str | os.PathLike[str] | None = None,
        price_per_hour: float | None = None,
    ) -> None:
        chosen = [engines] if isinstance(engines, str) else engines
        for engine in chosen or ():
            if engine not in engine_names():
                raise InvalidArgumentError(f"Argument `engines` must be among {engine_names()}, but got {engine!r}.")
        if chosen is not None and not chosen:
            raise InvalidArgumentError("Argument `engines` must name at least one engine, but got an empty list.")
        if precision not in (None, *_PRECISIONS):
            raise InvalidArgumentError(
                f"Argument `precision` must be one of {list(_PRECISIONS)} or None, but got {precision!r}."
            )
        if incomplete not in ("refuse", "mark"):
            raise InvalidArgumentError(f'Argument `incomplete` must be "refuse" or "mark", but got {incomplete!r}.')
        if output_kind not in (None, CLASSES, VALUES):
            raise InvalidArgumentError(
                f"Argument `output_kind` must be {CLASSES!r}, {VALUES!r} or None, but got {output_kind!r}."
            )
        if keep_samples not in range(samples + 1):
            raise InvalidArgumentError(
                f"Argument `keep_samples` must be from 0 to `samples` ({samples}), but got {keep_samples!r}."
            )
        if benchmark is not None and budgets is None:
            raise InvalidArgumentError(
                "Argument `benchmark` must come with `budgets`, which the variants are measured for, but got none."
            )
        if budgets is not None and budgets.batch not in (None, *(benchmark or BenchmarkSettings()).batches):
            sizes = (benchmark or BenchmarkSettings()).batches
            raise InvalidArgumentError(
                f"Argument `budgets` must name a batch size that is measured {sizes}, but got {budgets.batch}."
            )
        self.dirpath, self.engines, self.precision, self.ckpt_path = expanded(dirpath), chosen, precision, ckpt_path
        self.data, self.inputs, self.incomplete, self.samples, self.name = data, inputs, incomplete, samples, name
        self.preprocess, self.postprocess = preprocess, postprocess
        self.metadata, self.dynamic, self.keep_samples = metadata or {}, dynamic or {}, keep_samples
        self.module, self.outputs, self.batch, self.batch_axis = module, outputs, batch, batch_axis
        self.budgets, self.benchmark, self.output_kind, self.strict = budgets, benchmark, output_kind, strict
        if previous is not None and not os.path.isfile(os.path.join(expanded(previous), MANIFEST)):
            raise InvalidArgumentError(
                f"Argument `previous` must be the folder of a bundle, with a {MANIFEST}, but got {shown(os.fspath(previous))}."
            )
        self.flipped, self.price_per_hour = flipped, price_per_hour
        self.previous = None if previous is None else expanded(previous)
        self.report: dict[str, Any] | None = None
        self._exported = ""  # checkpoint that the report is of
        self.repeat = ""  # command that repeats the export, if it isn't `export`
        self._ready = self._trained = False
        self._curves, self._run = Curves(), dict[str, Any]()
        self._untrained: dict[str, Any] | None = None  # what int8 predicted before it was trained
        self._whole: dict[int, nn.Parameter] | None = None  # parameters at the end of a run whose tensors are sharded
        self._quantizing: list[QuantizingCallback] = []  # those whose fake-quant has yet to begin

    @property
    @override
    def state_key(self) -> str:
        return f"lightning_accel.ModelExport.{self.name}"

    @override
    def state_dict(self) -> dict[str, Any]:
        kept = {"curves": self._curves.points, "run": self._run, "untrained": self._untrained}
        return {"dirpath": self.dirpath, **kept}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._curves.points = list(state_dict.get("curves", []))
        self._untrained = state_dict.get("untrained")

    @property
    def checkpoint_path(self) -> str:
        """Path of the checkpoint with the last weights and everything needed to export them again."""
        return f"{self.dirpath.rstrip('/')}.ckpt"

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._ready = self._trained = False
        patches_of_run(trainer)  # from here on loaders are asked for once
        self._curves, self._untrained = Curves(), None
        self._run = {"id": uuid.uuid4().hex, **run_of(trainer, pl_module)}
        if trainer.is_global_zero:
            # At least the checkpoint and one float32 file; optimizers, engines and reports come on top.
            weights = sum(p.numel() * p.element_size() for p in pl_module.parameters() if not is_lazy(p))
            check_destination(self.dirpath, needed=2 * weights + 1_000_000)
            lock(self.dirpath, id(self))
        self.check_plan(trainer)
        require(trainer, type(self).__name__, Capability.ROWS)
        warn_of_objects(trainer, pl_module)
        if prepares_early(trainer, pl_module, type(self).__name__) or not builds_layers_late(pl_module):
            self._preflight(trainer, pl_module)

    @override
    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not self._ready:
            self._preflight(trainer, pl_module)

    @override
    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Before the first step there is no trained network to quantize; averaged weights can't be compared with single ones.
        rivals = (
            self.output_kind != VALUES and not is_fast_dev_run(trainer) and not list(structure.average_models(trainer))
        )
        waiting = [c for c in _qat(trainer) if not c.quantizing and c.steps[0] > 0]
        # Where each rank holds rows of the tensors, one alone can't run the network.
        self._quantizing = waiting if rivals and trainer.is_global_zero and not shards(trainer) else []

    @override
    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if any(callback.quantizing for callback in self._quantizing):  # calibrated, and not yet trained a step
            self._quantizing = []
            part = surrounded(self._part(trainer, pl_module), self.preprocess, self.postprocess)
            found = predictions_of(part, self._held_out(trainer, pl_module))
            self._untrained = None if found is None else {"step": step_of(trainer), **found.to_dict()}

    @override
    def on_train_epoch_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._curves.record(trainer)

    @override
    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        changes = structure.load_record(checkpoint)
        if changes != structure.record_of(pl_module):
            owners = ", ".join(change.owner.removeprefix("lightning_accel.") for change in changes)
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must be resumed with the callbacks that wrote it, but got a checkpoint whose network was "
                f"changed by {owners or 'nothing'}, and the Trainer's is another one. Add the callbacks back."
            )

    @override
    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not is_fast_dev_run(trainer):
            trainer.save_checkpoint(self.checkpoint_path, weights_only=False)  # before anything can go wrong
            self._trained = True
            if shards(trainer):  # after the run there are no exchanges between ranks any more
                self._whole = gathered(pl_module)

    @override
    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        unlock(self.dirpath, id(self))

    @override
    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        unlock(self.dirpath, id(self))
        rank_zero_info(
            f"ModelExport: no bundle was written to {self.dirpath}, since the run ended with {type(exception).__name__}."
        )
        if isinstance(exception, KeyboardInterrupt) and not is_fast_dev_run(trainer):
            rank_zero_info(f"ModelExport: {self._interrupted(trainer, pl_module)}")

    def _interrupted(self, trainer: L.Trainer, pl_module: nn.Module) -> str:
        """Write a checkpoint after Ctrl-C, unless there is one; returns where it is and how to go on."""
        if self._trained:
            command = self._command("last", pl_module)
            return f"The checkpoint is safe: {self.checkpoint_path}. Write the bundle with: {command}"
        if step_of(trainer) == 0:
            return "No step was trained, and there is nothing to save."
        if trainer.world_size > 1:  # other ranks may be gone, and saving is done together
            return f"Stopped at step {step_of(trainer)}. Go on from the last checkpoint of ModelCheckpoint."
        path = f"{self.dirpath.rstrip('/')}.interrupted.ckpt"
        trainer.save_checkpoint(path, weights_only=False)
        configs = self._configs()
        how = f"trainer.fit(..., ckpt_path={path!r})"
        if configs:
            how = " ".join(["lightning-accel fit", *configs, f"--ckpt-path {shlex.quote(path)}"])
        return f"Stopped at step {step_of(trainer)}. The checkpoint is written: {path}. Go on with: {how}"

    @override
    @rank_zero_only
    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if is_fast_dev_run(trainer):
            rank_zero_info("ModelExport: the preflight passed; `fast_dev_run` trains too little to write a bundle.")
            return
        shipped = pl_module
        if self._whole is not None:
            teacher = _teacher_of(pl_module)
            shipped = whole_copy(pl_module, self._whole, [] if teacher is None else [teacher])
            shipped._trainer, self._whole = trainer, None
        report = self.export(trainer, shipped, self.ckpt_path)
        log_bundle(trainer.loggers, report, self.dirpath, trainer.global_step, self._exported)
        if line := failed_line(report):
            rank_zero_warn(f"ModelExport: {line}")
        print(f"\n{summary(report, self.dirpath)}")

    def export(self, trainer: L.Trainer, pl_module: L.LightningModule, ckpt_path: str) -> Report:
        """Write the bundle now.

        Args:
            trainer: gives callbacks and loaders.
            pl_module: the module; takes over the checkpoint's weights and structure.
            ckpt_path: ``"last"`` for the module as it is, ``"best"``, or a checkpoint's path.

        Returns:
            The report.

        Raises:
            RunError: the network hasn't reached its targets.
            InvalidArgumentError: the bundle's folder is a file or holds something else, or the only engine's kernels compute another
                arithmetic.
            VerificationError: an exported file differs from the trained network, or every engine does.
        """
        check_destination(self.dirpath)  # `setup` did in a fit, but the run, or nothing, came before this
        if ckpt_path == "best":
            ckpt_path = self._best(trainer)
        self._exported = self.checkpoint_path if ckpt_path == "last" else ckpt_path
        unfinished, did, run_facts = self._load(trainer, pl_module, ckpt_path)
        if unfinished and self.incomplete == "refuse":
            raise RunError(
                f"The network must have reached its targets before it ships, but {'; '.join(unfinished)}. The checkpoint is safe: "
                f'{self._exported}. Train on, or mark the bundle with ModelExport(incomplete="mark").'
            )
        if self._wanted_precision(trainer) == "int8" and not quantized_forwards(pl_module):
            raise RunError(
                "The network must be quantized to ship as int8, but no QuantizationAwareTraining phase has begun."
            )
        refused = self._refused(trainer, quantized_forwards(pl_module))  # on this machine, where there was no preflight
        pl_module.to("cpu")
        spec = self.spec(
            trainer,
            pl_module,
            teacher=_teacher_of(pl_module),
            history=did,
            compression=measured(trainer, pl_module),
            command=self._command(ckpt_path, pl_module),
            unfinished=[f"{reason}." for reason in unfinished],
            refused=refused,
            checkpoint=self._exported,
            **run_facts,
        )
        report = write_bundle(spec, self.dirpath)
        self.report = report.to_dict()
        return report

    def spec(self, trainer: L.Trainer, pl_module: L.LightningModule, **run_facts: Any) -> ExportSpec:
        """The export as the arguments describe it, with further facts of the run for the report."""
        return ExportSpec(
            module=pl_module,
            part=self._part(trainer, pl_module),
            data=self._held_out(trainer, pl_module),
            engines=self._wanted_engines(trainer),
            precision=self._wanted_precision(trainer),
            samples=self.samples,
            preprocess=self.preprocess,
            postprocess=self.postprocess,
            metadata=self.metadata,
            dynamic=self.dynamic,
            **self._batch(trainer),
            outputs=self.outputs,
            keep_samples=self.keep_samples,
            budgets=self.budgets,
            benchmark=self.benchmark,
            output_kind=self.output_kind,
            strict=self.strict,
            flipped=self.flipped,
            previous=self.previous,
            price_per_hour=self.price_per_hour,
            **run_facts,
        )

    @property
    def names_batch(self) -> bool:
        """Whether the arguments say which axes are the batch."""
        return self.batch == "fixed" or self.batch_axis is not None

    def quantizing(self, target: Any, *args: Any, **options: Any) -> PostTrainingQuantization:
        """A PostTrainingQuantization that captures the network as this export does.

        Args:
            target: as :class:`~lightning_accel.quantization.ptq.PostTrainingQuantization` takes it.
            args: its further positional arguments.
            options: its keyword arguments.
        """
        shapes: dict[str, Any] = {"dynamic": self.dynamic or None, "batch": self.batch or "dynamic"}
        shapes |= {"inputs": self.inputs, "batch_axis": self.batch_axis, "module": self.module}
        return PostTrainingQuantization(target, *args, **{**shapes, **options})

    def _batch(self, trainer: L.Trainer) -> dict[str, Any]:
        """Which axes are the batch: as the arguments say, or those of the callback that quantizes what is exported."""
        own: dict[str, Any] = {"batch": self.batch or "dynamic", "batch_axis": self.batch_axis}
        if self.batch is None and self.batch_axis is None:
            same = [c.settings for c in _qat(trainer) if c.paths == [self.module or ""]]
            own = next(({"batch": s.batch, "batch_axis": s.batch_axis} for s in same), own)
        return {**own, **({"batch_size": 1} if own["batch"] == "fixed" else {})}

    def _held_out(self, trainer: L.Trainer, pl_module: L.LightningModule) -> HeldOut:
        """Held-out data, and how the network is called with it."""
        data = held_out(trainer, self.data, self.inputs)
        if self.preprocess is None:  # else the data is what that takes
            data.learn(pl_module, self._part(trainer, pl_module))
        return data

    @staticmethod
    def _best(trainer: L.Trainer) -> str:
        """Path of the best checkpoint of the run."""
        kept = [str(getattr(c, "best_model_path", "")) for c in callbacks_of(trainer, Checkpoint)]
        if not any(kept):
            raise InvalidArgumentError(
                'Argument `ckpt_path` must be "last" or a path, but got "best", and no ModelCheckpoint kept a best one.'
            )
        return next(path for path in kept if path)

    def _load(
        self, trainer: L.Trainer, pl_module: L.LightningModule, ckpt_path: str
    ) -> tuple[list[str], list[str], dict[str, Any]]:
        """Bring the module to a checkpoint's weights.

        Returns:
            Targets not reached, the history of changes, and facts of the run for the report, by the names of ExportSpec.
        """
        if ckpt_path == "last":
            states = {c.state_key: c.state_dict() for c in compression_callbacks(trainer)}
            unfinished = [s["unfinished"] for s in states.values() if s["unfinished"]]
            return unfinished, history(states, step_of(trainer)), self._run_facts(self.state_dict(), states)
        checkpoint = structure.read_checkpoint(ckpt_path)
        states = checkpoint.get("callbacks", {})
        reasons = []
        for callback in compression_callbacks(trainer):
            if callback.state_key not in states:
                reasons.append(f"{ckpt_path} holds no state of {type(callback).__name__}({callback.name!r})")
            elif reason := states[callback.state_key].get("unfinished"):
                reasons.append(f"in {ckpt_path} (epoch {checkpoint.get('epoch', '?')}) {reason}")
        if not reasons or self.incomplete == "mark":
            structure.load_into(pl_module, checkpoint)
        run_facts = self._run_facts(states.get(self.state_key, {}), states)
        return reasons, history(states, checkpoint.get("global_step", 0)), run_facts

    @staticmethod
    def _run_facts(state: Mapping[str, Any], states: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        run_facts = {
            "curves": state.get("curves") or [],
            "run": state.get("run") or {},
            "untrained": state.get("untrained"),
        }
        return {**run_facts, "timeline": timeline(states)}

    def check_plan(self, trainer: L.Trainer) -> None:
        """Check before training that callbacks don't contradict each other and that engines are installed.

        Raises:
            InvalidArgumentError: they do; the message names the argument.
            MissingPackageError: an engine isn't installed.
        """
        wanted, batch = self._wanted_engines(trainer), self._batch(trainer)
        check_callbacks(trainer, self.ckpt_path)
        check_precision(self.precision, _qat(trainer), wanted)
        if self.budgets is not None and (batch["batch"] == "fixed" or batch["batch_axis"] is not None):
            raise InvalidArgumentError(
                "Argument `budgets` must be None for a network whose batch is fixed or isn't the first axis of every input, which the "
                f"common variants are measured with, but got {self.budgets}."
            )
        check_installed(wanted)

    def _preflight(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Export, verify and build the untrained network."""
        self._ready = True
        if not trainer.is_global_zero:
            return
        forwards = {p: f for c in _qat(trainer) for p, f in c.prepare(trainer, pl_module).items()}
        if not forwards and self.module is None and not has_forward(pl_module):
            chosen_path(pl_module, trainer, type(self).__name__)  # says which one
        for error in self._refused(trainer, forwards).values():  # a contradiction of arguments, which costs nothing yet
            raise error
        try_out(self.spec(trainer, pl_module), forwards)

    def _refused(self, trainer: L.Trainer, forwards: Mapping[str, QuantizedForward]) -> dict[str, InvalidArgumentError]:
        """The engines that don't reproduce the network's arithmetic on this machine, and why."""
        refused: dict[str, InvalidArgumentError] = {}
        for forward in forwards.values():
            for engine in self._wanted_engines(trainer):
                try:
                    check_engine(forward.target, engine, forward.forms)
                except InvalidArgumentError as error:
                    refused.setdefault(engine, error)
        return refused

    def _wanted_engines(self, trainer: L.Trainer) -> list[str]:
        return self.engines or next(([c.target.engines[0]] for c in _qat(trainer)), ["onnxruntime"])

    def _wanted_precision(self, trainer: L.Trainer) -> str:
        return self.precision or ("int8" if _qat(trainer) else "fp32")

    def _part(self, trainer: L.Trainer, pl_module: L.LightningModule) -> nn.Module:
        """The module to export: the LightningModule's ``forward``; without one, what is quantized or what ``training_step`` calls."""
        if self.module is not None:
            return find_submodule(pl_module, self.module)
        if has_forward(pl_module):
            return pl_module
        paths = [path for c in _qat(trainer) for path in c.paths]
        paths = [path for path in paths if path] or list(quantized_forwards(pl_module))
        if not paths and not _qat(trainer) and (called := called_path(trainer, pl_module)):
            paths = [called]
        if len(paths) == 1:
            return pl_module.get_submodule(paths[0])
        raise InvalidArgumentError(
            f"Argument `model` must have a `forward` to export, but {type(pl_module).__name__} has none. Write one that takes the "
            'network\'s inputs and returns its outputs, or name a submodule with QuantizationAwareTraining(module="...").'
        )

    @staticmethod
    def _configs() -> list[str]:
        """The configs on the command line that this process was started with."""
        pairs = zip(sys.argv, sys.argv[1:], strict=False)
        return [f"-c {shlex.quote(value)}" for option, value in pairs if option in ("-c", "--config")]

    def _command(self, ckpt_path: str, pl_module: nn.Module) -> str:
        """How the export is repeated: on the command line where the run came from there, else in Python."""
        if self.repeat:
            return self.repeat
        path = self.checkpoint_path if ckpt_path == "last" else ckpt_path
        if configs := self._configs():
            return " ".join(["lightning-accel export", *configs, f"--ckpt-path {shlex.quote(path)}"])
        own = type(pl_module).__name__.removeprefix("Distilled")
        return f"lightning_accel.export_bundle({path!r}, data, {self.dirpath!r}, cls={own})"


def _qat(trainer: L.Trainer) -> list[QuantizingCallback]:
    return callbacks_of(trainer, QuantizingCallback)


def _teacher_of(pl_module: L.LightningModule) -> nn.Module | None:
    """The teacher of a DistillationModule: the network that would ship without compression."""
    return getattr(pl_module, "teacher", None) if hasattr(pl_module, "student") else None
