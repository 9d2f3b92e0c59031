"""The commands that run a Trainer: those of LightningCLI, ``plan``, ``export`` and ``quantize``."""

import inspect
import logging
import os
import re
import shlex
import sys
import warnings
from argparse import HelpFormatter
from collections.abc import Sequence
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn, get_args, get_origin, get_type_hints

import lightning as L
import yaml  # type: ignore[import-untyped]  # no stubs
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, _InstantiatorFn
from typing_extensions import override

from lightning_accel.benchmarking.decision import Budgets
from lightning_accel.bundle.writer import check_destination
from lightning_accel.cli.errors import one_line, run_guarded
from lightning_accel.cli.options import did_you_mean, join_lists, unknown_arguments, with_dashes, with_underscores
from lightning_accel.core import structure
from lightning_accel.core.callback import may_be_incomplete, unfinished_line, unfinished_targets
from lightning_accel.core.trainers import callbacks_of, is_fast_dev_run
from lightning_accel.distillation.hparams import nested_instantiator
from lightning_accel.errors import InvalidArgumentError, LightningAccelError, RunError
from lightning_accel.export.bundle_reports import summary
from lightning_accel.export.callback import ModelExport
from lightning_accel.planning.compression.advice import advise
from lightning_accel.planning.compression.compress import compress
from lightning_accel.planning.compression.outcome import Compression
from lightning_accel.planning.latency_recording import record_latency_table
from lightning_accel.planning.plan import plan
from lightning_accel.quantization.graph.prepare import quantized_forwards

# Taken from the ModelExport of a config by `quantize`; the others belong to the training run.
_OF_THE_RUN = {"dirpath", "engines", "precision", "ckpt", "ckpt_path", "name"}
_SHIPPED = tuple(inspect.signature(ModelExport).parameters.keys() - _OF_THE_RUN)
_OWN = ("advise", "compress", "export", "latency_table", "plan", "quantize")  # commands that Lightning doesn't have
_OPTION = re.compile(r"(?<![\w-])--[a-z][\w.]*")
_FOREIGN = re.compile(r"Error\(s\) in loading state_dict for (\w+):")  # PyTorch's message for weights of another module


class AccelTrainer(L.Trainer):
    """A Trainer that can also plan a run, and compress, export or quantize a checkpoint that it once wrote.

    Attributes:
        sections: ``model``, ``data`` and ``trainer`` of the config; ``None`` outside of the command line.
        compressed: outcome of ``compress``.
    """

    sections: dict[str, Any] | None = None
    compressed: Compression | None = None

    def export(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Export a checkpoint with the ModelExport of the config, as ``fit`` does at its end.

        Args:
            model: the LightningModule.
            datamodule: provides the held-out data.
            ckpt_path: path of the checkpoint, or "best"; by default the one that ModelExport saved beside its bundle.
            weights_only: accepted because ``fit`` saves it in its config; checkpoints are always loaded with ``weights_only=True``.
        """
        callbacks = [c for c in self.callbacks if isinstance(c, ModelExport)]
        if len(callbacks) != 1:
            raise InvalidArgumentError(
                f"Argument `trainer.callbacks` must hold one ModelExport to export with, but got {len(callbacks)}."
            )
        callback = callbacks[0]
        self._attach(model, datamodule)
        if datamodule is not None and (callback.data is None or isinstance(callback.data, str)):
            datamodule.prepare_data()
            datamodule.setup("test" if callback.data == "test" else "fit")
            callback.data = datamodule.test_dataloader() if callback.data == "test" else datamodule.val_dataloader()
        report = callback.export(self, model, ckpt_path or callback.checkpoint_path)
        print(summary(report, callback.dirpath))

    def _attach(self, model: L.LightningModule, datamodule: L.LightningDataModule | None) -> None:
        self.strategy.connect(model)
        model.trainer = self
        self._data_connector.attach_datamodule(model, datamodule)  # for the hooks that transfer a batch

    def quantize(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        target: str = "onnxruntime",
        dirpath: str = "artifacts/int8",
        engine: list[str] | None = None,
        calibration_batches: int = 32,
        ranges: str = "mse",
        activations: str = "static",
        effort: str = "standard",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        module: list[str] | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Quantize a trained float network without training, and write a verified bundle.

        A ModelExport in the config sets everything else, e.g. ``inputs``, ``dynamic`` (used by the quantization, too), ``preprocess``
        and ``budgets``. Its folder, engines, precision and checkpoint belong to the training run and are ignored.

        Args:
            model: the LightningModule.
            datamodule: provides training data to calibrate with, and validation data to verify and measure with.
            ckpt_path: path of the checkpoint.
            target: arithmetic to quantize for: ``onnxruntime``, ``openvino``, ``tensorrt`` or ``portable``.
            dirpath: folder of the bundle.
            engine: engines to ship to; by default those of the target.
            calibration_batches: number of training batches from which ranges are estimated.
            ranges: estimator of the ranges: ``mse``, ``percentile``, ``min_max`` or ``moving_average``.
            activations: ``static``; ``dynamic`` (linear layers, each batch by its own range); or ``float`` (only weights are int8).
            effort: steps after the ranges: ``low``, ``standard``, ``high`` or ``trained``.
            include: globs of operators to quantize.
            exclude: globs of operators that stay float.
            module: dotted paths of the submodules to quantize; by default the whole ``forward``.
            weights_only: accepted because ``fit`` saves it in its config; checkpoints are always loaded with ``weights_only=True``.
        """
        ckpt_path = _checkpoint(ckpt_path)
        configured = [c for c in self.callbacks if isinstance(c, ModelExport)]
        if len(configured) > 1:
            raise InvalidArgumentError(
                f"Argument `trainer.callbacks` must hold one ModelExport at most, but got {len(configured)}."
            )
        export = ModelExport(dirpath, engine, **{name: getattr(c, name) for c in configured for name in _SHIPPED})
        callback = export.quantizing(
            target,
            calibration_batches,
            ranges,
            module=module,
            include=include,
            exclude=exclude,
            activations=activations,
            effort=effort,
        )
        check_destination(dirpath)
        # The checkpoint contains the result of the config's other callbacks.
        self.callbacks: list[L.Callback] = [callback, export]
        self._attach(model, datamodule)
        self._data_connector.attach_data(model, datamodule=datamodule)
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
            if export.data == "test":
                datamodule.setup("test")
        structure.load_into(model, structure.read_checkpoint(ckpt_path))
        if quantized := sorted(quantized_forwards(model)):
            raise InvalidArgumentError(
                f"Argument `ckpt_path` must be of a float network, but {ckpt_path} is already quantized ({quantized}). Export it instead."
            )
        export.check_plan(self)
        reset_seed()  # the batches that ranges are learned from don't depend on what constructors have drawn
        callback.quantize(self, model)
        export.repeat = shlex.join(["lightning-accel", *sys.argv[1:]])
        print(summary(export.export(self, model, "last"), dirpath))

    def compress(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        max_drop: float = 1.0,
        max_latency_ms: float | None = None,
        max_bytes: int | None = None,
        batch: int = 1,
        dirpath: str = "artifacts/compressed",
        max_time: str | None = None,
        engine: list[str] | None = None,
        stage: list[str] | None = None,
        monitor: str | None = None,
        mode: str | None = None,
        threads: int | None = None,
        seed: int = 1,
        weights_only: bool | None = None,
    ) -> None:
        """Find the cheapest recipe that brings a trained float network within budgets, and write its bundle and config.

        ``trainer.max_epochs`` is the length of a training. The same command goes on where it was interrupted. Exit code 1 if nothing fits.

        Args:
            model: the LightningModule.
            datamodule: provides training data, and validation data to verify and measure with.
            ckpt_path: path of the checkpoint of the trained network.
            max_drop: largest loss in percentage points of accuracy, or of the user's metric.
            max_latency_ms: largest median latency of a call with ``batch`` samples in ms.
            max_bytes: largest size of the file in bytes.
            batch: samples in a call.
            dirpath: folder of the search.
            max_time: time limit, DD:HH:MM:SS.
            engine: engines to consider; by default ``onnxruntime`` and ``openvino``.
            stage: stages to run, of ``float``, ``ptq``, ``qat``, ``channels`` and ``all``; by default all.
            monitor: metric logged by ``validation_step`` that counts; by default accuracy, if batches hold class labels.
            mode: ``min`` or ``max``, for ``monitor``.
            threads: of each engine; by default all cores.
            seed: of each training.
            weights_only: accepted because ``fit`` saves it in its config; checkpoints are always loaded with ``weights_only=True``.
        """
        datamodule, ckpt_path = _data(datamodule), _checkpoint(ckpt_path)
        budgets = Budgets(max_drop, max_latency_ms, max_bytes, batch)
        structure.load_into(model, structure.read_checkpoint(ckpt_path))
        self.compressed = compress(
            model,
            datamodule,
            budgets,
            trainer=self,
            dirpath=dirpath,
            max_time=max_time,
            engines=engine,
            monitor=monitor,
            mode=mode,
            threads=threads,
            seed=seed,
            config=self.sections,
            stages=stage,
        )

    def advise(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        max_drop: float = 0.5,
        batch: int = 1,
        dirpath: str = "artifacts/advice",
        engine: list[str] | None = None,
        monitor: str | None = None,
        threads: int | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Measure a trained network in float32 and in int8 without training, and say in five lines what to do next.

        Args:
            model: the LightningModule.
            datamodule: provides training data to calibrate with, and validation data to verify and measure with.
            ckpt_path: path of the checkpoint of the trained network.
            max_drop: acceptable loss in percentage points of accuracy, or of the user's metric.
            batch: samples in a call.
            dirpath: folder for bundles and results.
            engine: engines to consider; by default ``onnxruntime`` and ``openvino``.
            monitor: metric logged by ``validation_step`` that counts; by default accuracy, if batches hold class labels.
            threads: of each engine; by default all cores.
            weights_only: accepted because ``fit`` saves it in its config; checkpoints are always loaded with ``weights_only=True``.
        """
        datamodule, ckpt_path = _data(datamodule), _checkpoint(ckpt_path)
        structure.load_into(model, structure.read_checkpoint(ckpt_path))
        settings: dict[str, Any] = {"max_drop": max_drop, "batch": batch, "monitor": monitor, "threads": threads}
        advise(model, datamodule, trainer=self, dirpath=dirpath, engines=engine, **settings)

    def latency_table(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        path: str = "latency.json",
        engine: str = "onnxruntime",
        batch: int = 1,
        threads: int | None = None,
        target: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Measure the latency of a network with fewer channels in each group on this machine, and write it as a file.

        ``ChannelPruning(latency_reduction=2.0, latency_table="latency.json")`` then prunes for this machine anywhere. A ChannelPruning
        in the config says which layers may lose channels.

        Args:
            model: the LightningModule.
            datamodule: provides a batch.
            ckpt_path: ignored; weights don't matter.
            path: file to write.
            engine: that runs the network.
            batch: samples in a call.
            threads: of the engine.
            target: arithmetic of a network that ships as int8, e.g. ``openvino``; by default float32.
            weights_only: ignored.
        """
        table = record_latency_table(
            self, model, _data(datamodule), path, engine=engine, batch=batch, threads=threads, target=target
        )
        print(
            f"{path}: {len(table.ratios)} groups of channels in {engine}, {table.precision}, {table.base_ms:.3f} ms with all of them"
        )

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Print what ``fit`` would do to each layer and when, without training.

        Args:
            model: the LightningModule.
            datamodule: provides the loaders.
            ckpt_path: plan the rest of a run from its checkpoint.
            weights_only: accepted because ``fit`` saves it in its config; ignored.
        """
        print(plan(self, model, datamodule=datamodule, ckpt_path=ckpt_path))


class AccelParser(LightningArgumentParser):
    """A parser that raises its errors instead of printing a page of usage, and writes options with dashes in its help."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False, **kwargs})

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ArgumentError(None, self._with_hint(message)) from ex

    @override
    def format_help(self, formatter: HelpFormatter | None = None) -> str:
        return _OPTION.sub(lambda option: with_dashes(option[0]), super().format_help(formatter))

    def _with_hint(self, message: str) -> str:
        if unknown := re.match(r"unrecognized arguments: (.*)", message):
            return unknown_arguments(unknown[1].split(), self._options())
        if key := re.search(r"'(\w+)' does not accept option '([\w.]+)'", message):
            near = did_you_mean(key[2], {name.rpartition(".")[2] for name in self._options()})
            return f"{message.rstrip('.')}.{near}"
        return message

    def _options(self) -> set[str]:
        """The options of this parser and of its commands."""
        commands = getattr(self, "_subcommands_action", None)
        parsers = [self, *(commands._name_parser_map.values() if commands else ())]
        return {name for parser in parsers for name in parser._option_string_actions if name.startswith("--")}


class SaveConfig(SaveConfigCallback):
    """Save the config after the first training step, so that a run that fails before that leaves no file behind.

    A file that the run was configured with is never written over: without a logger the folder is the present one.
    """

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        given = {Path(str(path)).resolve() for path in self.config.get("config") or ()}
        if trainer.log_dir is None or Path(trainer.log_dir, self.config_filename).resolve() not in given:
            super().setup(trainer, pl_module, "fit")


def _checkpoint(path: str | None) -> str:
    """The path, unless there is none.

    Raises:
        InvalidArgumentError: there is none.
    """
    if path is None:
        raise InvalidArgumentError(
            "Argument `ckpt_path` must be the path of a checkpoint, but got None. Pass --ckpt-path FILE."
        )
    return path


def _data(datamodule: L.LightningDataModule | None) -> L.LightningDataModule:
    """The data, unless there is none.

    Raises:
        InvalidArgumentError: there is none.
    """
    if datamodule is None:
        raise InvalidArgumentError("Argument `data` must be a LightningDataModule, but got none. Add it to the config.")
    return datamodule


class AccelCLI(LightningCLI):
    """LightningCLI with ``plan``, ``export`` and ``quantize``; models and data by class path."""

    def __init__(self, **kwargs: Any) -> None:
        settings = {
            "trainer_class": AccelTrainer,
            "parser_class": AccelParser,
            "subclass_mode_model": True,
            "subclass_mode_data": True,
            "save_config_callback": SaveConfig,
            "save_config_kwargs": {"overwrite": True},
            "parser_kwargs": {"prog": "lightning-accel"},
        }
        super().__init__(**{**settings, **kwargs})

    @staticmethod
    @override
    def subcommands() -> dict[str, set[str]]:
        return {**LightningCLI.subcommands(), **{name: {"model", "datamodule"} for name in _OWN}}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        words = [with_underscores(word) for word in args]
        self.config = parser.parse_args(join_lists(words, _list_options(words[0])))
        path = self.config.get(str(self.config.get("subcommand")), {}).get("ckpt_path")
        if path and not _is_word_or_address(str(path)):
            structure.read_checkpoint(path)  # raises for a missing or damaged file before anything is built

    @override
    def _parse_ckpt_path(self) -> None:
        command = str(self.config.get("subcommand"))
        if command in ("advise", "compress", "export", "quantize"):
            return  # the config says what the model is; a checkpoint of another one is an error
        model = self.config.get(command, {}).get("model") or {}
        path = str(model.get("class_path"))
        if path.startswith("lightning_accel.") and path.endswith(".DistillationModule"):
            return  # the checkpoint's hyper-parameters are the student's; the config says what the whole model is
        super()._parse_ckpt_path()

    @override
    def instantiate_classes(self) -> None:
        try:
            super().instantiate_classes()
            self._keep_sections()
        except (ValueError, TypeError) as error:
            if (own := _raised_by_constructor(error)) is not None:
                raise own from error
            raise

    def _keep_sections(self) -> None:
        """Hand the sections of the config to `compress`, which writes the config of what it finds."""
        if self.subcommand == "compress" and isinstance(self.trainer, AccelTrainer):
            parser = self._parser(self.subcommand)
            own: Any = yaml.safe_load(parser.dump(self.config[self.subcommand], skip_none=True, skip_check=True))
            self.trainer.sections = {name: own[name] for name in ("model", "data", "trainer") if name in own}

    @override
    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        instantiator = nested_instantiator(self, _InstantiatorFn(cli=self, key="model"))
        self.parser.add_instantiator(instantiator, L.LightningModule, subclasses=True, prepend=True)


def run(given: Sequence[str]) -> int:
    """Run a command of the LightningCLI.

    Args:
        given: command line without the program's name.

    Returns:
        Exit code: 0; 1 for an error, also a ``fit`` that ends before its targets are reached, or an engine that isn't in the bundle
        because it failed; 2 for a command line or config that
        can't be parsed.
    """
    sys.path.insert(0, os.getcwd())  # class paths in a config are looked for in the current folder
    # Lightning and torch.export still use what torch has just deprecated; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_no_advertisement)

    return run_guarded(lambda: _run(given), explain, ArgumentError)


def _no_advertisement(record: logging.LogRecord) -> bool:
    """Leave out Lightning's tips for other products, which every Trainer logs."""
    return not str(record.msg).startswith("💡 Tip: ")


def _run(given: Sequence[str]) -> int:
    cli = AccelCLI(args=list(given))
    # Rank zero speaks for all: Lightning ends a run whose other processes end with an error.
    excused = is_fast_dev_run(cli.trainer) or may_be_incomplete(cli.trainer) or not cli.trainer.is_global_zero
    if cli.subcommand == "fit" and not excused and (missing := unfinished_targets(cli.trainer)):
        raise RunError(unfinished_line(missing))
    compressed = getattr(cli.trainer, "compressed", None)
    if compressed is not None and not compressed.fits:
        return 1
    exports = callbacks_of(cli.trainer, ModelExport)
    return 1 if any(export.report and export.report["failed"] for export in exports) else 0


def options_of(command: str) -> list[str]:
    """The options of a command with dashes in their names, for completion."""

    class ParserOnly(AccelCLI):
        """Builds the parser and parses nothing."""

        def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
            raise _Built(parser)

    try:
        ParserOnly(args=[command])
    except _Built as built:
        commands: Any = built.args[0]._subcommands_action
    return sorted({with_dashes(name) for name in commands._name_parser_map[command]._option_string_actions})


class _Built(Exception):  # noqa: N818 - it carries the parser and is no error
    """A parser that is built."""


def _list_options(command: str) -> list[str]:
    """Names of the options of one of our own commands that take a list."""
    hints = get_type_hints(getattr(AccelTrainer, command)) if command in _OWN else {}
    return [name for name, hint in hints.items() if list in {get_origin(of) for of in get_args(hint)}]


def _is_word_or_address(path: str) -> bool:
    """Whether Lightning finds the checkpoint itself: the run's last or best one, one in a registry or behind an URL."""
    return path in ("last", "best", "hpc") or path.startswith("registry") or "://" in path or Path(path).is_dir()


def explain(error: BaseException) -> str:
    """The line of an expected error; empty for a bug.

    Expected are the errors of this library, Lightning's MisconfigurationException, a path that the operating system refuses, a
    command line or config that can't be parsed, and a checkpoint whose weights don't fit the model.
    """
    if line := one_line(error) or _of_weights(error):
        return line
    if isinstance(error, MisconfigurationException):
        return " ".join(str(error).split())
    return _of_parser(str(error)) if isinstance(error, ArgumentError) else ""


def _raised_by_constructor(error: BaseException) -> BaseException | None:
    """The expected error that jsonargparse wraps when the constructor of a configured class raises it."""
    cause = error.__cause__
    while cause is not None and not isinstance(cause, LightningAccelError | MisconfigurationException):
        cause = cause.__cause__
    return cause


def _of_weights(error: BaseException) -> str:
    """PyTorch raises a plain RuntimeError for weights of another module; only its message tells."""
    if not isinstance(error, RuntimeError) or not (of := _FOREIGN.match(str(error))):
        return ""
    rest = shorten(str(error)[of.end() :], 400, placeholder=" ...")
    return f"The checkpoint must be of the model in the config, {of[1]}, built with the same arguments, but: {rest}"


def _of_parser(message: str) -> str:
    """The parser's tree of attempts, reduced to where, what and value."""
    if ours := re.search(r"Argument `.*", message):
        return ours[0]
    path = re.findall(r"Parser key \"(.+?)\"", message)
    classes = re.findall(r"Problem with given class_path '(.+?)'", message)
    lines = [line.strip(" -") for line in message.splitlines()]
    says = [line for line in lines if line and not line.endswith(":") and not line.startswith(_NOISE)]
    value = re.search(r"Given value: (.*)", message)
    where = ": ".join([*path[:1], *classes, *path[1:]])
    what = re.sub(r"^Parser key \".+?\": ", "", says[0] if says else message)
    got = f" Got value: {value[1][:80]}." if value and not classes and "value:" not in what else ""
    return " ".join(f"Argument `{where}` is not valid: {what}.{got}".split()) if where else " ".join(message.split())


_NOISE = ("Does not validate", "Subtypes:", "Given value", "Not a valid subclass", "a class path", "a dict ")
