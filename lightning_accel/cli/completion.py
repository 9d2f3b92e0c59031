"""Tab completion with argcomplete, an optional package."""

import argparse
import os
import shlex
from collections.abc import Sequence
from importlib import import_module

from lightning_accel.cli.registry import COMMANDS, TRAINER_COMMANDS, command_parser, is_light
from lightning_accel.core.optional import require


def complete() -> None:
    """Answer the shell's request for completions in the environment, and exit.

    Raises:
        MissingPackageError: argcomplete isn't installed.
    """
    argcomplete = require("argcomplete", "completion", "Tab completion")
    words = shlex.split(os.environ.get("COMP_LINE", ""), posix=False)[1:]
    argcomplete.autocomplete(_parser(words or [""]))


def _parser(words: Sequence[str]) -> argparse.ArgumentParser:
    """A parser of all commands, with the arguments of the one on the command line."""
    parser = argparse.ArgumentParser(prog="lightning-accel")
    parser.add_argument("-V", "--version", action="store_true")
    commands = parser.add_subparsers()
    for each, what in {**TRAINER_COMMANDS, **COMMANDS}.items():
        parents = [_arguments(words)] if each == words[0] else []
        commands.add_parser(each, help=what, parents=parents, conflict_handler="resolve")
    return parser


def _arguments(words: Sequence[str]) -> argparse.ArgumentParser:
    if is_light(words):
        return command_parser(words[0])
    parser = argparse.ArgumentParser(add_help=False)
    for option in import_module("lightning_accel.cli.lightning_cli").options_of(words[0]):
        parser.add_argument(option)
    return parser
