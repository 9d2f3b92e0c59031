"""Tab completion with argcomplete, an optional package.

Commands that load neither torch nor lightning complete from their own parsers; for the others jsonargparse completes options and the
values that it knows.
"""

import argparse
import os
import shlex
from importlib import import_module

from lightning_accel.cli.main import COMMANDS, TRAINER_COMMANDS, command_parser
from lightning_accel.core.optional import require


def complete() -> None:
    """Answer the shell's request for completions in the environment, and exit.

    Raises:
        MissingPackageError: argcomplete isn't installed.
    """
    words = shlex.split(os.environ.get("COMP_LINE", ""), posix=False)[1:]
    name = words[0] if words else ""
    if name in TRAINER_COMMANDS:
        import_module("lightning_accel.cli.lightning_cli").AccelCLI(args=[name], run=True)
    require("argcomplete", "completion", "Tab completion").autocomplete(_parser(name))


def _parser(name: str) -> argparse.ArgumentParser:
    """A parser of all commands, with the arguments of the one on the command line."""
    parser = argparse.ArgumentParser(prog="lightning-accel")
    parser.add_argument("-V", "--version", action="store_true")
    commands = parser.add_subparsers()
    for each, what in (*TRAINER_COMMANDS.items(), *COMMANDS.items()):
        if each == name:
            commands.add_parser(each, help=what, parents=[command_parser(each)], conflict_handler="resolve")
        else:
            commands.add_parser(each, help=what)
    return parser
