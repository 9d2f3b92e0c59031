"""Entry point of ``lightning-accel``: help, version, typos, and commands that load neither torch nor lightning."""

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_accel import __version__
from lightning_accel.cli.errors import DEBUG, UsageError, run_guarded
from lightning_accel.cli.options import did_you_mean
from lightning_accel.cli.registry import COMMANDS, TRAINER_COMMANDS, command_parser, is_light
from lightning_accel.core.lazy import training_packages
from lightning_accel.errors import InvalidArgumentError


def main(args: Sequence[str] | None = None) -> int:
    """Entry point of ``lightning-accel``.

    Args:
        args: command line without the program's name; ``None`` takes that of the process.

    Returns:
        Exit code: 0; 1 for an error; 2 for a command line or config that can't be parsed; 130 after Ctrl-C; or the code that the
        command documents. An expected error is printed in one line, ``LIGHTNING_ACCEL_DEBUG=1`` adds its traceback.
    """
    given = sys.argv[1:] if args is None else list(args)
    if given and (name := given[0].replace("-", "_")) in TRAINER_COMMANDS:
        given[0] = name
    if "_ARGCOMPLETE" in os.environ:
        import_module("lightning_accel.cli.completion").complete()
    if not given or given[0] in ("-h", "--help"):
        print(help_text(), end="")
        return 0 if given else 2
    if given[0] in ("-V", "--version"):
        print(f"lightning-accel {__version__}")
        return 0
    return run_guarded(lambda: _run(given)) if is_light(given) else _run_trainer(given)


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
    with training_packages(f"`lightning-accel {given[0]}`"):
        code: int = import_module(f"lightning_accel.cli.commands.{given[0]}").run(arguments)
    return code


def _run_trainer(given: Sequence[str]) -> int:
    """Run one of :data:`TRAINER_COMMANDS`, or say that there is no such command."""
    if not given[0].startswith("-") and given[0] not in TRAINER_COMMANDS:
        return run_guarded(lambda: _unknown_command(given[0]))
    return run_guarded(lambda: _trainer_cli(given))


def _trainer_cli(given: Sequence[str]) -> int:
    with training_packages(f"`lightning-accel {given[0]}`"):
        module = import_module("lightning_accel.cli.lightning_cli")
    code: int = module.run(given)
    return code


def _unknown_command(name: str) -> int:
    known = [*TRAINER_COMMANDS, *COMMANDS]
    hint = did_you_mean(name, known) or f" The commands are {', '.join(known)}."
    raise UsageError(f"unknown command `{name}`.{hint}")
