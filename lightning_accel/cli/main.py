"""Entry point of ``lightning-accel``: help, version, typos, and commands that load neither torch nor lightning."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_accel import __version__
from lightning_accel.cli.errors import DEBUG, UsageError, run_guarded
from lightning_accel.cli.options import CommandParser, did_you_mean
from lightning_accel.errors import InvalidArgumentError

TRAINER_COMMANDS = {
    "fit": "train; with a ModelExport callback the run ends with a verified bundle",
    "validate": "run the validation loop; --ckpt-path FILE validates a checkpoint as it was trained",
    "test": "run the test loop",
    "predict": "run the predict loop",
    "plan": "print what fit would do to each layer and when, and what prevents it; train nothing",
    "export": "write the bundle again from a checkpoint: --ckpt-path FILE",
    "quantize": "write a verified int8 bundle from a float checkpoint without training: --ckpt-path FILE --target openvino",
}
COMMANDS = {
    "init": "write a LightningModule, a DataModule and a config to start from: init FOLDER",
    "check": "test whether a module can be exported, quantized and built: check package.MyLit --ckpt-path FILE",
    "verify": "check that the engines of a bundle compute the same as its ONNX file on this machine",
    "build": "build a TensorRT engine from an ONNX file, like trtexec",
    "benchmark": "measure all runtime variants of a bundle and select the one that ships; or the latency of several files",
    "compare": "compare two bundles",
    "bundle": "write a bundle as a Triton model repository: --triton FOLDER",
    "doctor": "print what is installed, which engines run or only build here, and how fast and exact int8 is on this CPU",
}


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-accel``.

    Args:
        args: command line without the program's name; ``None`` takes that of the process.

    Returns:
        Exit code: 0; 1 for an error; 2 for a command line or config that can't be parsed; 130 after Ctrl-C; or the code that the
        command documents. An expected error is printed in one line, ``LIGHTNING_ACCEL_DEBUG=1`` adds its traceback.
    """
    given = sys.argv[1:] if args is None else list(args)
    if "_ARGCOMPLETE" in os.environ:
        import_module("lightning_accel.cli.completion").complete()
    if not given or given[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        print(f"lightning-accel {__version__}")
        return 0
    return run_guarded(lambda: _run(given)) if given[0] in COMMANDS else _run_trainer(given)


def help_text() -> str:
    """The help of ``lightning-accel``."""
    lines = [f"  {name:10s} {what}" for name, what in (*TRAINER_COMMANDS.items(), *COMMANDS.items())]
    return f"""lightning-accel {__version__}: prune, distill and quantize in Trainer.fit, and export a verified network.

usage: lightning-accel COMMAND -c CONFIG.yaml [-c OVERLAY.yaml ...] [--trainer.max-epochs 3 ...]
       lightning-accel COMMAND --help

{chr(10).join(lines)}

Option names may be written with dashes or underscores. Options that take a list may be repeated or take values separated by commas.
A later config overrides an earlier one; `callbacks+:` in it appends to the callbacks instead of replacing them.

  lightning-accel fit -c CONFIG.yaml --print-config   print the whole configuration and run nothing
  lightning-accel -V, --version                       print the version
  {DEBUG}=1 lightning-accel ...       print the traceback of an error that is otherwise one line
"""


def command_parser(name: str) -> CommandParser:
    """The parser of one of :data:`COMMANDS`."""
    module = import_module(f"lightning_accel.cli.commands.{name}")
    formatter = argparse.RawDescriptionHelpFormatter
    parser = CommandParser(prog=f"lightning-accel {name}", description=module.__doc__, formatter_class=formatter)
    module.add_arguments(parser)
    return parser


def _run(given: Sequence[str]) -> int:
    """Run one of :data:`COMMANDS`."""
    parser = command_parser(given[0])
    try:
        arguments = parser.parse_args(given[1:])
    except SystemExit as ended:  # argparse ends so after --help
        return int(ended.code or 0)
    for out in ("json", "markdown"):
        path = getattr(arguments, out, None)
        if path is not None and (path.is_dir() or not path.parent.is_dir()):
            raise InvalidArgumentError(f"Argument `--{out}` must be a file in a folder that exists, but got {path}.")
    code: int = import_module(f"lightning_accel.cli.commands.{given[0]}").run(arguments)
    return code


def _run_trainer(given: Sequence[str]) -> int:
    """Run one of :data:`TRAINER_COMMANDS`, or say that there is no such command."""
    if not given[0].startswith("-") and given[0] not in TRAINER_COMMANDS:
        return run_guarded(lambda: _unknown_command(given[0]))
    code: int = import_module("lightning_accel.cli.lightning_cli").run(given)
    return code


def _unknown_command(name: str) -> int:
    known = [*TRAINER_COMMANDS, *COMMANDS]
    hint = did_you_mean(name, known) or f" The commands are {', '.join(known)}."
    raise UsageError(f"unknown command `{name}`.{hint}")
