"""Decide by an exception's class whether the command line prints it in one line or lets its traceback through."""

import errno
import os
import sys
from collections.abc import Callable

from lightning_accel.errors import LightningAccelError

DEBUG = "LIGHTNING_ACCEL_DEBUG"  # set to 1 to see the traceback of every error
INTERRUPTED = 130  # the code with which shells report Ctrl-C
_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)  # errors of the user's disk that name no file


class UsageError(LightningAccelError):
    """A command line that can't be parsed; the process exits with 2."""


def run_guarded(
    run: Callable[[], int],
    explain: Callable[[BaseException], str] | None = None,
    usage: type[Exception] = UsageError,
) -> int:
    """Run a command; print an expected error in one line and let anything else through.

    Args:
        run: the command; returns the exit code.
        explain: returns the line of an expected error and an empty string for a bug; the default is :func:`one_line`.
        usage: class of the errors of a command line that can't be parsed.

    Returns:
        The command's exit code; 2 for an error of class ``usage``, 1 for another expected error, 130 after Ctrl-C.
    """
    try:
        return run()
    except (KeyboardInterrupt, SystemExit, ImportError) as error:
        if not _interrupted(error):
            if isinstance(error, ImportError):
                return _failed(error, explain or one_line, usage)
            raise
        print("lightning-accel: interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # the reader of a pipe has ended, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        return _failed(error, explain or one_line, usage)


def _failed(error: Exception, explain: Callable[[BaseException], str], usage: type[Exception]) -> int:
    """Print an expected error and return the exit code, or let a bug through."""
    line = explain(error)
    if os.environ.get(DEBUG) or not line:
        raise error
    print(f"lightning-accel: error: {line}", file=sys.stderr)
    return 2 if isinstance(error, usage) else 1


def _interrupted(error: BaseException | None) -> bool:
    """Whether Ctrl-C is what it began with: Lightning exits with 1 after it, and packages that are being imported raise ImportError."""
    while error is not None:
        if isinstance(error, KeyboardInterrupt):
            return True
        error = error.__cause__ or error.__context__
    return False


def one_line(error: BaseException) -> str:
    """The message of an expected error in one line, or an empty string for a bug."""
    if isinstance(error, LightningAccelError) or _of_the_users_paths(error):
        return " ".join(str(error).split())
    return ""


def _of_the_users_paths(error: BaseException) -> bool:
    """Whether the operating system refused a path, or the disk is full."""
    return isinstance(error, OSError) and (error.filename is not None or error.errno in _FULL)
