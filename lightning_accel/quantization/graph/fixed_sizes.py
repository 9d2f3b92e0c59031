"""``torch.export``, with the line of the user's code that makes a dynamic size a constant: its own error names none."""

import logging
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from lightning_accel.calls.batches import Call
from lightning_accel.calls.user_code import innermost_line
from lightning_accel.core.patching import swapped

_LOGGER = logging.getLogger("torch.fx.experimental.symbolic_shapes")
_GUARD = re.compile(r"eval (Eq\(s\d+, (\d+)\)|Ne\(s\d+, \d+\)|s\d+ [<>]=? \d+)")  # that the traced code made of a size


class FixedSizeError(Exception):
    """A size that should be dynamic is a constant, or some sizes take another way through the code; the text is torch's.

    Args:
        text: of torch.export's error.
        line: ``file:line`` that is the cause.
    """

    def __init__(self, text: str, line: str) -> None:
        super().__init__(text)
        self.line = line


def exported_program(module: nn.Module, call: Call, shapes: Any) -> ExportedProgram:
    """Trace a module with ``torch.export``.

    Args:
        module: to trace.
        call: example of its arguments.
        shapes: dynamic shapes in torch's form.

    Raises:
        FixedSizeError: a line of the user's makes a dynamic size a constant.
        Exception: whatever else torch.export raises.
    """
    with _guards() as guards:
        try:
            return torch.export.export(module, *call, dynamic_shapes=shapes)
        except Exception as error:
            constants = re.findall(r"constant \((\d+)\)", str(error))
            some = "Not all values of" in str(error)
            lines = [line for constant, line in guards if (constant in constants if constants else some)]
            if lines:
                raise FixedSizeError(str(error), lines[0]) from error
            raise


@contextmanager
def _guards() -> Iterator[list[tuple[str | None, str]]]:
    """Yield a list of the guards on sizes inside the block: the constant that a size must equal, if any, and ``file:line``.

    torch logs each guard at the place that causes it, so the line is the innermost one of the user's on the stack at that time.
    """
    found: list[tuple[str | None, str]] = []

    def note(record: logging.LogRecord) -> None:
        guard = _GUARD.match(record.getMessage())
        line = innermost_line((f.filename, f.lineno or 0) for f in traceback.extract_stack()) if guard else ""
        if guard and line:
            found.append((guard[2], line))

    def enabled(level: int) -> bool:
        return level >= logging.INFO

    with swapped(_LOGGER, "isEnabledFor", enabled), swapped(_LOGGER, "handle", note):
        yield found
