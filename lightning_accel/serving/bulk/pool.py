"""Processes that compute parts; those that die are replaced."""

import multiprocessing
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection, wait
from typing import Any

from lightning_accel.errors import RunError
from lightning_accel.serving.bulk.worker import Job, Part, work

_DEATHS = 3  # of workers, after which a part isn't tried again


class _Worker:
    """A process, the connection to it, and the part that it computes."""

    def __init__(self, job: Job) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(theirs, job), daemon=True)
        self.process.start()
        theirs.close()
        self.part: Part | None = None


class Pool:
    """Workers that compute parts until none is left.

    Args:
        job: what each needs to know.
        count: of workers.
        total: number of parts, those that are there included, for the line of progress.
        progress: whether to write it.
    """

    def __init__(self, job: Job, count: int, total: int, progress: bool) -> None:
        self.job, self.count, self.total, self.progress = job, count, total, progress
        self.deaths: dict[int, int] = {}
        self.restarts = 0

    def run(self, missing: Sequence[Part]) -> int:
        """Compute the missing parts; returns how many workers were replaced.

        Raises:
            RunError: an engine can't be loaded, a part fails, or ends three workers.
        """
        waiting, done, before = deque(missing), self.total - len(missing), time.monotonic()
        with self._workers() as workers:
            while done < self.total:
                handles: dict[Any, _Worker] = {
                    handle: w for w in workers for handle in (w.connection, w.process.sentinel)
                }
                ready = {id(handles[handle]): handles[handle] for handle in wait(list(handles))}
                for worker in ready.values():
                    answer = self._answer(worker.connection)
                    if answer is None:  # it died
                        workers.remove(worker)
                        self._lost(worker, waiting)
                        workers.append(_Worker(self.job))
                        continue
                    if answer:
                        where = (
                            ""
                            if worker.part is None
                            else f"Rows {worker.part.start} to {worker.part.stop} of {worker.part.path}: "
                        )
                        raise RunError(
                            f"{where}{answer} {done} of {self.total} parts are written; the same call goes on from there."
                        )
                    if worker.part is not None:
                        done += 1
                        self._tell(done, len(missing), before)
                    worker.part = waiting.popleft() if waiting else None
                    if worker.part is not None:
                        self._send(worker)
        return self.restarts

    @contextmanager
    def _workers(self) -> Iterator[list[_Worker]]:
        workers = [_Worker(self.job) for _ in range(self.count)]
        try:
            yield workers
        finally:
            for worker in workers:
                worker.connection.close()
            for worker in workers:
                worker.process.join(0.2)
                if worker.process.is_alive():
                    worker.process.kill()
                    worker.process.join()
            if self.progress:
                print(file=sys.stderr)

    @staticmethod
    def _answer(connection: Connection) -> str | None:
        """The next answer; ``None`` if the worker died without one."""
        try:
            return str(connection.recv()) if connection.poll() else None
        except (EOFError, OSError):
            return None

    @staticmethod
    def _send(worker: _Worker) -> None:
        try:
            worker.connection.send(worker.part)
        except OSError:  # it died; its sentinel says so
            return

    def _lost(self, worker: _Worker, waiting: deque[Part]) -> None:
        """Give the part of a dead worker to another one.

        Raises:
            RunError: it ended three already, or a worker died before its first part.
        """
        worker.process.join()
        worker.connection.close()
        self.restarts += 1
        code, index = worker.process.exitcode, -1 if worker.part is None else worker.part.index
        self.deaths[index] = self.deaths.get(index, 0) + 1
        if self.deaths[index] >= _DEATHS:
            what = (
                "loading the engine"
                if worker.part is None
                else f"rows {worker.part.start} to {worker.part.stop} of {worker.part.path}"
            )
            raise RunError(
                f"A worker must live, but {_DEATHS} ended by {what} (exit code {code}; -9 is often too little memory: fewer `workers`, "
                "smaller `rows_per_part`)."
            )
        if worker.part is not None:  # written or not, it is computed again: its file is replaced by an equal one
            waiting.appendleft(worker.part)

    def _tell(self, done: int, missing: int, before: float) -> None:
        if not self.progress:
            return
        computed = done - (self.total - missing)
        left = (time.monotonic() - before) / computed * (missing - computed)
        print(f"\r{done}/{self.total} parts, about {left:.0f} s left   ", end="", file=sys.stderr, flush=True)
