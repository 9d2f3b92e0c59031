"""The command ``lightning-accel``: a LightningCLI, ``plan``, ``export`` and ``quantize``."""

import inspect
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from textwrap import shorten
from typing import Any, NoReturn

import lightning as L
from jsonargparse import ArgumentError
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback, _InstantiatorFn
from typing_extensions import override

from lightning_accel import __version__
from lightning_accel.bundle.writer import check_destination
from lightning_accel.cli.main import COMMANDS, run
from lightning_accel.core import structure
from lightning_accel.distillation.hparams import nested_instantiator
from lightning_accel.errors import CaptureError, InvalidArgumentError, VerificationError
from lightning_accel.export.bundle_reports import summary
from lightning_accel.export.callback import ModelExport
from lightning_accel.planning.plan import plan
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.ptq import PostTrainingQuantization

_DEBUG = "LIGHTNING_ACCEL_DEBUG"
_SHIPPED = tuple(
    inspect.signature(ModelExport).parameters.keys() - {"dirpath", "engines", "precision", "ckpt_path", "name"}
)
_TOLD = re.compile(r".*?\b(must|needs?|can't)\b", re.DOTALL)  # how this library words what is wrong

_FOREIGN = re.compile(r"Error\(s\) in loading state_dict for (\w+):")  # what PyTorch says of other weights

_HELP = f"""lightning-accel {__version__}: prune, distill and quantize inside Trainer.fit; ship what was proven to be what was trained.

usage: lightning-accel COMMAND -c CONFIG.yaml [-c OVERLAY.yaml ...] [--trainer.max_epochs 3 ...]

  fit        train; with a ModelExport callback the run ends with a verified bundle
  validate   the validation loop          with --ckpt_path FILE: of a checkpoint, as it was trained
  test       the test loop
  predict    the predict loop
  plan       what fit would do to which layer and when, and what stands in the way; nothing is trained
  export     write the bundle again from a checkpoint: --ckpt FILE
  quantize   a verified int8 bundle from a checkpoint of a float network, without training: --ckpt FILE --target openvino
{chr(10).join(f"  {name:9s}  {what}" for name, what in COMMANDS.items())}

A later config goes over the earlier ones; `callbacks+:` in it appends instead of replacing.

  lightning-accel fit -c CONFIG.yaml --print_config   the whole configuration, nothing is run
  lightning-accel COMMAND --help                      every option of a command
  lightning-accel --version
  {_DEBUG}=1 lightning-accel ...       the traceback of an error that is otherwise told in one line
"""


class AccelTrainer(L.Trainer):
    """A Trainer that can also plan a run, and export or quantize a checkpoint that it once wrote."""

    def export(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt: str | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Export a checkpoint with the config's ModelExport: the step at the end of fit, again.

        Args:
            model: the LightningModule.
            datamodule: gives the held-out data.
            ckpt: path of the checkpoint, or "best"; by default the one that ModelExport left beside its bundle.
            ckpt_path: the same by the other commands' name, so that the config that ``fit`` saves can be used.
            weights_only: as in that config; checkpoints are never unpickled in any other way.
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
        report = callback.export(self, model, ckpt or ckpt_path or callback.checkpoint_path)
        print(summary(report, callback.dirpath))

    def _attach(self, model: L.LightningModule, datamodule: L.LightningDataModule | None) -> None:
        self.strategy.connect(model)
        model.trainer = self
        self._data_connector.attach_datamodule(model, datamodule)  # for the hooks that transfer a batch

    def quantize(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt: str | None = None,
        target: str = "onnxruntime",
        dirpath: str = "artifacts/int8",
        engines: list[str] | None = None,
        calibration_batches: int = 32,
        ranges: str = "mse",
        activations: str = "static",
        include: list[str] | None = None,
        exclude: list[str] | None = None,
        module: list[str] | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Quantize a trained float network without training, and write a verified bundle.

        A ModelExport in the config says the rest, from ``inputs`` and ``dynamic`` (which the quantization heeds, too) to
        ``preprocess`` and ``budgets``; its folder, engines, precision and checkpoint are those of the training run.

        Args:
            model: the LightningModule.
            datamodule: training data to calibrate with, validation data to verify and measure with.
            ckpt: path of the checkpoint.
            target: arithmetic of the runtime: ``onnxruntime``, ``openvino``, ``tensorrt`` or ``portable``.
            dirpath: the bundle's folder.
            engines: engines to ship to; by default the target's own.
            calibration_batches: training batches to look at.
            ranges: how ranges are found: ``mse``, ``percentile``, ``min_max`` or ``moving_average``.
            activations: ``static``, ``dynamic`` (linear layers, by the range of the moment) or ``float`` (weights alone are integers).
            include: globs of operators to quantize.
            exclude: globs of operators that stay float.
            module: dotted paths of the submodules to quantize; by default the whole ``forward``.
            ckpt_path: the same as ``ckpt``, so that the config that ``fit`` saves can be used.
            weights_only: as in that config; checkpoints are never unpickled in any other way.
        """
        path = ckpt or ckpt_path
        if path is None:
            raise InvalidArgumentError(
                "Argument `ckpt` must be the path of a checkpoint, but got None. Pass --ckpt FILE."
            )
        configured = [c for c in self.callbacks if isinstance(c, ModelExport)]
        if len(configured) > 1:
            raise InvalidArgumentError(
                f"Argument `trainer.callbacks` must hold one ModelExport at most, but got {len(configured)}."
            )
        export = ModelExport(dirpath, engines, **{name: getattr(c, name) for c in configured for name in _SHIPPED})
        callback = PostTrainingQuantization(
            target,
            calibration_batches,
            ranges,
            module,
            include,
            exclude,
            export.inputs,
            export.dynamic or None,
            activations,
        )
        check_destination(dirpath)
        # What the config's other callbacks do is done: it is in the checkpoint.
        self.callbacks: list[L.Callback] = [callback, export]
        self._attach(model, datamodule)
        self._data_connector.attach_data(model, datamodule=datamodule)
        if datamodule is not None:
            datamodule.prepare_data()
            datamodule.setup("fit")
            if export.data == "test":
                datamodule.setup("test")
        structure.load_into(model, structure.read_checkpoint(path))
        if quantized := sorted(quantized_forwards(model)):
            raise InvalidArgumentError(
                f"Argument `ckpt` must be of a float network, but {path} was quantized already ({quantized}). Export it instead."
            )
        export.check_plan(self)
        callback.quantize(self, model)
        export.repeat = shlex.join(["lightning-accel", *sys.argv[1:]])
        print(summary(export.export(self, model, "last"), dirpath))

    def plan(
        self,
        model: L.LightningModule,
        datamodule: L.LightningDataModule | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
    ) -> None:
        """Say what ``fit`` would do to which layer and when, without training.

        Args:
            model: the LightningModule.
            datamodule: gives the loaders.
            ckpt_path: plan the rest of a run from its checkpoint.
            weights_only: as in the config that ``fit`` saves; not looked at.
        """
        print(plan(self, model, datamodule, ckpt_path=ckpt_path))


class AccelParser(LightningArgumentParser):
    """A parser that raises what is wrong, for ``main`` to tell in one line instead of with a page of usage."""

    @override
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        raise ArgumentError(None, message) from ex


class SaveConfig(SaveConfigCallback):
    """Keeps the run's config once a training step has succeeded: a run refused before that leaves no file behind."""

    @override
    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        pass

    @override
    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        super().setup(trainer, pl_module, "fit")


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
        own = {name: {"model", "datamodule"} for name in ("export", "plan", "quantize")}
        return {**LightningCLI.subcommands(), **own}

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        super().parse_arguments(parser, args)
        path = self.config.get(str(self.config.get("subcommand")), {}).get("ckpt_path")
        if path and not _is_word_or_address(str(path)):
            structure.read_checkpoint(path)  # a missing or damaged one is told before anything is built

    @override
    def _parse_ckpt_path(self) -> None:
        model = self.config.get(str(self.config.get("subcommand")), {}).get("model") or {}
        path = str(model.get("class_path"))
        if path.startswith("lightning_accel.") and path.endswith(".DistillationModule"):
            return  # the checkpoint's hyper-parameters are the student's; the config says what the whole model is
        super()._parse_ckpt_path()

    @override
    def _add_instantiators(self) -> None:
        super()._add_instantiators()
        instantiator = nested_instantiator(self, _InstantiatorFn(cli=self, key="model"))
        self.parser.add_instantiator(instantiator, L.LightningModule, subclasses=True, prepend=True)


def main(args: list[str] | None = None) -> int:
    """Entry point of ``lightning-accel``.

    Args:
        args: command line without the program's name; ``None`` takes that of the process.

    Returns:
        Exit code: 0, or 1 for an error, or 2 for a command line or config that can't be read. What is wrong with an
        argument is told in one line; ``LIGHTNING_ACCEL_DEBUG=1`` shows the traceback.
    """
    given = sys.argv[1:] if args is None else args
    if not given or given[0] in ("-h", "--help"):
        print(_HELP, end="")
        return 0 if given else 2
    if given[0] in COMMANDS:
        return run(given)
    if given[0] == "--version":
        print(f"lightning-accel {__version__}")
        return 0
    sys.path.insert(0, os.getcwd())  # class paths in a config are looked for where the command is run
    # Lightning and torch.export still use what torch has just deprecated; a user can do nothing about it.
    warnings.filterwarnings("ignore", r"`isinstance\(treespec, LeafSpec\)` is deprecated", FutureWarning)
    try:
        AccelCLI(args=args)
    except Exception as error:
        line = _one_line(error)
        if os.environ.get(_DEBUG) or not line:
            raise
        print(f"lightning-accel: error: {line}", file=sys.stderr)
        return 2 if isinstance(error, ArgumentError) else 1
    return 0


def _is_word_or_address(path: str) -> bool:
    """Whether Lightning finds the checkpoint itself: the run's last or best one, one in a registry or behind an URL."""
    return path in ("last", "best", "hpc") or path.startswith("registry") or "://" in path or Path(path).is_dir()


def _one_line(error: BaseException) -> str:
    """What is wrong, if the message says all there is to say; empty for a bug, which keeps its traceback."""
    cause: BaseException | None = error
    while cause is not None:  # a constructor's error comes wrapped in the parser's
        told = isinstance(cause, VerificationError | CaptureError | MisconfigurationException)
        if told or (_raised_here(cause) and _TOLD.match(str(cause))):
            return " ".join(str(cause).split())
        if isinstance(cause, RuntimeError) and (of := _FOREIGN.match(str(cause))):
            rest = shorten(str(cause)[of.end() :], 400, placeholder=" ...")
            return f"The checkpoint must be of the model in the config, {of[1]}, built with the same arguments, but: {rest}"
        cause = cause.__cause__
    return _of_parser(str(error)) if isinstance(error, ArgumentError) else ""


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith("lightning_accel.")


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


if __name__ == "__main__":
    sys.exit(main())
