"""How options are written: dashes or underscores, lists repeated or separated by commas, and the nearest name for a typo."""

import argparse
import json
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import Any

from lightning_accel.cli.errors import UsageError


class CommandParser(argparse.ArgumentParser):
    """A parser of one command that raises :class:`UsageError` instead of printing its usage."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, **kwargs)

    def parse_args(self, args: Sequence[str], namespace: Any = None) -> argparse.Namespace:  # type: ignore[override]
        """Parse ``args``; option names may be written with dashes or underscores."""
        parsed, rest = self.parse_known_args([with_dashes(word) for word in args], namespace)
        if rest:
            self.error(unknown_arguments(rest, self._option_string_actions))
        result: argparse.Namespace = parsed
        return result

    def error(self, message: str) -> Any:
        """Raise what is wrong with the command line."""
        raise UsageError(f"{message}{'' if message.endswith(('.', '?')) else '.'} See `{self.prog} --help`.")


def add_list_option(
    parser: argparse._ActionsContainer, name: str, of: Callable[[str], Any] = str, *, help: str, default: Any = None
) -> None:
    """Add an option whose values are repeated or separated by commas: ``--engine a --engine b`` or ``--engine a,b``.

    Args:
        parser: parser or group of the command.
        name: name of the option, with dashes.
        of: converts one value.
        help: what the values mean.
        default: value without the option.
    """

    def values(text: str) -> list[Any]:
        try:
            return [of(value.strip()) for value in text.split(",") if value.strip()]
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be of type {of.__name__}, but got {text!r}") from None

    metavar = name.lstrip("-").replace("-", "_").upper()
    parser.add_argument(
        name,
        action="extend",
        type=values,
        default=default,
        metavar=f"{metavar}[,...]",
        help=f"{help}; may be repeated",
    )


def with_dashes(word: str) -> str:
    """``--max_drop=1`` as ``--max-drop=1``; the value and anything but an option is left as it is."""
    return _renamed(word, "_", "-")


def with_underscores(word: str) -> str:
    """``--trainer.max-epochs=1`` as ``--trainer.max_epochs=1``; the value and anything but an option is left as it is."""
    return _renamed(word, "-", "_")


def _renamed(word: str, old: str, new: str) -> str:
    if not word.startswith("--") or len(word) == 2:
        return word
    name, equals, value = word[2:].partition("=")
    return f"--{name.replace(old, new)}{equals}{value}"


def join_lists(words: Sequence[str], names: Iterable[str]) -> list[str]:
    """Collect the values of list options in one JSON list each, as jsonargparse reads them.

    Args:
        words: the command line, with underscores in names.
        names: names of the list options, e.g. ``engine``.

    Returns:
        The command line with ``--engine=["a", "b"]`` at the place of the first ``--engine a`` or ``--engine b,c``.
    """
    options = {f"--{name}" for name in names}
    found: dict[str, list[Any]] = {}
    joined: list[str] = []
    rest = iter(words)
    for word in rest:
        name, equals, value = word.partition("=")
        if name not in options:
            joined.append(word)
            continue
        if name not in found:
            found[name] = []
            joined.append(name)
        found[name] += _values(value if equals else next(rest, ""))
    return [f"{word}={json.dumps(found[word])}" if word in found else word for word in joined]


def _values(text: str) -> list[str]:
    inner = text[1:-1] if text.startswith("[") and text.endswith("]") else text
    return [value.strip().strip("'\"") for value in inner.split(",") if value.strip()]


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A sentence that names the known word nearest to ``word``; empty if none is near."""
    near = get_close_matches(word, list(known), n=1)
    return f" Did you mean `{near[0]}`?" if near else ""


def unknown_arguments(rest: Sequence[str], known: Iterable[str]) -> str:
    """What is wrong with arguments that a parser doesn't know.

    Args:
        rest: the arguments.
        known: options of the parser, e.g. ``--json``.
    """
    option = next((word.partition("=")[0] for word in rest if word.startswith("-")), None)
    if option is None:
        return f"unknown arguments: {' '.join(rest)}"
    dashed = with_dashes(option)
    return f"unknown option `{dashed}`.{did_you_mean(dashed, [with_dashes(name) for name in known])}"
