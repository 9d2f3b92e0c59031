"""One line of progress with the time left, for steps that don't train: in a terminal, in a notebook and in a log."""

import sys
import threading
import time
from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, TextIO

_EVERY_S = 1.0  # between two updates of the line in a terminal


class Progress:
    """Shows which of several steps runs.

    In a terminal it is one line, which is updated every second and cleared at the end; elsewhere each step is a line when it begins.

    Args:
        who: what runs, in front of the line.
        steps: relative duration of each step by name, in their order; time left is extrapolated by them.
        stream: where to write; ``None``: nowhere.

    Example:
        >>> with Progress("ModelExport", {"export": 2, "verify": 3}, sys.stdout) as progress:
        ...     progress.step("export")
        ...     progress.step("verify")  # doctest: +ELLIPSIS
        ModelExport: 1/2 export
        ModelExport: 2/2 verify, ... left
        ModelExport: done in ...
    """

    def __init__(self, who: str, steps: Mapping[str, float], stream: TextIO | None = None) -> None:
        self.who, self.steps, self.stream = who, dict(steps), stream
        self._started = time.monotonic()
        self._current = ""
        self._width = 0
        self._ended = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        if self._live:
            threading.Thread(target=self._refresh, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        if self.stream is None:
            return
        with self._lock:
            if self._live:
                self.stream.write("\r" + " " * self._width + "\r")
            if kind is None:
                self.stream.write(f"{self.who}: done in {_time(time.monotonic() - self._started)}\n")
            self.stream.flush()

    def step(self, name: str) -> None:
        """Begin a step; the one before has ended.

        Raises:
            KeyError: there is no such step.
        """
        self.steps[name]
        self._current = name
        if self.stream is not None:
            self._write()

    @property
    def line(self) -> str:
        """The line as it is now."""
        names = list(self.steps)
        place = names.index(self._current)
        done, whole = sum(list(self.steps.values())[:place]), sum(self.steps.values())
        passed = time.monotonic() - self._started
        left = f", about {_time(passed * (whole - done) / done)} left" if done else ""
        return f"{self.who}: {place + 1}/{len(names)} {self._current}{left}"

    @property
    def _live(self) -> bool:
        return self.stream is not None and self.stream.isatty()

    def _write(self) -> None:
        assert self.stream is not None
        with self._lock:
            if self._ended.is_set() or not self._current:
                return
            line = self.line
            if self._live:
                line = f"{line} ({_time(time.monotonic() - self._started)})"
                self.stream.write("\r" + line.ljust(self._width))
                self._width = len(line)
            else:
                self.stream.write(f"{line}\n")
            self.stream.flush()

    def _refresh(self) -> None:
        while not self._ended.wait(_EVERY_S):
            self._write()


def progress_of(trainer: Any, who: str, steps: Mapping[str, float]) -> Progress:
    """Progress on standard error, or a silent one: other ranks than zero, and Trainers without a progress bar, show none.

    Args:
        trainer: the Trainer; ``None`` shows nothing.
        who: what runs.
        steps: see :class:`Progress`.
    """
    shows = trainer is not None and trainer.is_global_zero and trainer.progress_bar_callback is not None
    return Progress(who, steps, sys.stderr if shows else None)


def _time(seconds: float) -> str:
    """Seconds for a reader: ``"4 s"``, ``"2 min"``."""
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.0f} min"
