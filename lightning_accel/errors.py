"""Errors of this library. Each is also the builtin error that Python code expects, so ``except ValueError`` works.

The message of an argument's error reads ``Argument `x` must be <rule>, but got <value>.`` and ends with the fix. The command line prints a
:class:`LightningAccelError` in one line; any other exception is a bug and keeps its traceback.
"""


class LightningAccelError(Exception):
    """Base class of all errors that this library raises on purpose."""


class InvalidArgumentError(LightningAccelError, ValueError):
    """An argument has a value outside of its documented range, or a file has content that doesn't fit."""


class InvalidArgumentTypeError(LightningAccelError, TypeError):
    """An argument has the wrong type."""


class MissingFileError(LightningAccelError, FileNotFoundError):
    """A file or bundle doesn't exist."""


class FilePermissionError(LightningAccelError, PermissionError):
    """A folder can't be written to."""


class MissingPackageError(LightningAccelError, ModuleNotFoundError):
    """An optional package isn't installed; the message names the extra that installs it."""


class UnsupportedError(LightningAccelError, NotImplementedError):
    """This machine, engine or network doesn't support what was asked for."""


class EngineError(LightningAccelError, RuntimeError):
    """An engine can't load, build or run a file."""


class RunError(LightningAccelError, RuntimeError):
    """A training run is in a state in which the requested step is impossible."""


class CaptureError(LightningAccelError, RuntimeError):
    """A module's ``forward`` can't be captured as a graph; the message names the line that prevents it."""


class VerificationError(LightningAccelError, RuntimeError):
    """A file or an engine doesn't compute what the trained network computes."""
