"""The command ``lightning-accel``: what works on bundles and files needs neither torch nor lightning, and loads neither."""

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_accel.errors import InvalidArgumentError

COMMANDS = {
    "verify": "hold a bundle's engines against its file on this machine",
    "build": "build a TensorRT engine from an ONNX file, as trtexec does",
    "check": "can a module be exported, quantized and built, and what stands in the way: check package.MyLit --ckpt FILE",
    "doctor": "what is installed, which engines run or only build here, what int8 does on this CPU",
    "benchmark": "all runtime variants of a bundle side by side, and which one ships; or latency of several bundles and files",
    "compare": "two bundles side by side",
    "bundle": "write a bundle as a Triton model repository: --triton FOLDER",
}
INTERRUPTED = 130  # what shells report for a command that Ctrl-C ended
DEBUG = "LIGHTNING_ACCEL_DEBUG"


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-accel``.

    Args:
        args: command line without the program's name; ``None`` takes that of the process.

    Returns:
        Exit code: 0, or 1 for an error, or 2 for a command line that can't be read, or 130 for Ctrl-C, or what the command says.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given and given[0] in COMMANDS:
        return run(given)
    code: int = import_module("lightning_accel.cli.lightning_cli").main(None if args is None else given)
    return code


def run(given: Sequence[str]) -> int:
    """Run one of :data:`COMMANDS`; what is wrong with an argument is told in one line, and so is Ctrl-C."""
    try:
        return _run(given)
    except KeyboardInterrupt:
        print("lightning-accel: interrupted", file=sys.stderr)
        return INTERRUPTED


def _run(given: Sequence[str]) -> int:
    name = given[0]
    module = import_module(f"lightning_accel.cli.commands.{name}")
    parser = argparse.ArgumentParser(prog=f"lightning-accel {name}", description=module.__doc__)
    module.add_arguments(parser)
    try:
        arguments = parser.parse_args(given[1:])
    except SystemExit as ended:  # argparse's way to end: 0 after --help, 2 after an error that it told
        return int(ended.code or 0)
    try:
        for out in ("json", "markdown"):
            path = getattr(arguments, out, None)
            if path is not None and (path.is_dir() or not path.parent.is_dir()):
                raise InvalidArgumentError(
                    f"Argument `--{out}` must be a file in a folder that exists, but got {path}."
                )
        code: int = module.run(arguments)
    except (ValueError, TypeError, OSError, RuntimeError, ModuleNotFoundError) as error:
        if os.environ.get(DEBUG):
            raise
        print(f"lightning-accel: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    return code
