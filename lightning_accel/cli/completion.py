"""Tab completion with argcomplete, an optional package."""

import argparse
import os
import shlex
from importlib import import_module

from lightning_accel.cli.registry import COMMANDS, TRAINER_COMMANDS, command_parser
from lightning_accel.core.optional import require


def complete() -> None:
    """Answer the shell's request for completions in the environment, and exit.

    Raises:
        MissingPackageError: argcomplete isn't installed.
    """
    argcomplete = require("argcomplete", "completion", "Tab completion")
    words = shlex.split(os.environ.get("COMP_LINE", ""), posix=False)[1:]
    argcomplete.autocomplete(_parser(words[0] if words else ""))


def _parser(name: str) -> argparse.ArgumentParser:
    """A parser of all commands, with the arguments of the one on the command line."""
    parser = argparse.ArgumentParser(prog="lightning-accel")
    parser.add_argument("-V", "--version", action="store_true")
    commands = parser.add_subparsers()
    for each, what in (*TRAINER_COMMANDS.items(), *COMMANDS.items()):
        parents = [_arguments(each)] if each == name else []
        commands.add_parser(each, help=what, parents=parents, conflict_handler="resolve")
    return parser


def _arguments(name: str) -> argparse.ArgumentParser:
    if name in COMMANDS:
        return command_parser(name)
    parser = argparse.ArgumentParser(add_help=False)
    for option in import_module("lightning_accel.cli.lightning_cli").options_of(name):
        parser.add_argument(option)
    return parser
