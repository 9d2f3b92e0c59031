"""A process that computes parts: it reads their rows, runs the engine, and writes their files."""

import os
import signal
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np

from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.errors import LightningAccelError
from lightning_accel.serving.bulk.parts import write_part
from lightning_accel.serving.bulk.sources.base import Reading, Rows, Source
from lightning_accel.serving.bulk.sources.opening import open_source


@dataclass(frozen=True)
class Part:
    """Some rows of one source, whose results are one file.

    Args:
        index: number of the part.
        path: of the source.
        name: of the source in the output.
        start: first row.
        stop: row after the last one.
    """

    index: int
    path: Path
    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class Job:
    """What every worker needs to know.

    Args:
        bundle: its folder.
        engine: ``None``: the bundle's default.
        threads: of the engine.
        batch: rows in a call.
        reading: how rows become inputs.
        out: folder of the parts.
    """

    bundle: Path
    engine: str | None
    threads: int
    batch: int
    reading: Reading
    out: Path


def work(connection: Connection, job: Job) -> None:
    """Load the engine, and compute one part for each message until the connection closes.

    Each part is answered by an empty text once its file is written, or by the text of an error.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the driver ends the workers
    try:
        runner = load_runner(job.bundle, job.engine, threads=job.threads)
    except Exception as error:  # engines raise unrelated types
        connection.send(_text(error))
        return
    connection.send("")
    parent = os.getppid()
    while True:
        try:
            while not connection.poll(1.0):
                if os.getppid() != parent:  # the driver was killed
                    return
            part: Part = connection.recv()
        except (EOFError, OSError):
            return
        try:
            compute(runner, job, part)
            answer = ""
        except Exception as error:  # of a file that can't be read, an engine, a full disk
            answer = _text(error)
        try:
            connection.send(answer)
        except OSError:  # the driver was killed
            return


def compute(runner: Runner, job: Job, part: Part) -> None:
    """Compute a part and write its file."""
    rows = _source(part.path, part.name, job.reading).read(part.start, part.stop)
    write_part(job.out, part.index, rows, run_rows(runner, rows, job.batch))


def run_rows(runner: Runner, rows: Rows, batch: int) -> dict[str, np.ndarray]:
    """Outputs of rows, in calls of ``batch`` rows each; the last one has the rest.

    Raises:
        LightningAccelError: the engine refuses the rows.
    """
    count = len(rows.numbers)
    found: dict[str, list[np.ndarray]] = {}
    for start in range(0, count, batch):
        outputs = runner.run({name: array[start : start + batch] for name, array in rows.feeds.items()})
        for name, array in outputs.items():
            found.setdefault(name, []).append(array)
    return {name: np.concatenate(arrays) for name, arrays in found.items()}


@lru_cache(maxsize=1)
def _source(path: Path, name: str, reading: Reading) -> Source:
    """The source that was opened last: parts of one follow each other."""
    return open_source(path, name, reading)


def _text(error: Exception) -> str:
    return str(error) if isinstance(error, LightningAccelError) else f"{type(error).__name__}: {error}"
