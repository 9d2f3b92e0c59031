"""Workers of one bundle, and the queue of requests that they take batches from.

A request that fails in a batch, or whose worker dies, is run once more, alone: one bad request fails for itself only.
"""

import asyncio
import math
import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np

from lightning_accel.errors import EngineError, LightningAccelError
from lightning_accel.serving.worker import CANARY, Served, WorkerSettings, work

_START_S = 180.0  # until a worker has loaded and proven its bundle
_BACKOFF_S = (0.1, 0.5, 2.0, 5.0)  # before a worker that died again is started again
_STOP_S = 5.0
_POLL_S = 0.002  # after which the queue is looked at while a worker computes
_LOOK_S = 0.5  # after which an idle worker is looked at

Feeds = Mapping[str, np.ndarray]


class QueueFullError(LightningAccelError):
    """More rows wait than the queue may hold."""


class RequestFailedError(LightningAccelError):
    """The engine can't run this request."""


class RequestTimeoutError(LightningAccelError):
    """A request wasn't answered in time."""


@dataclass(frozen=True)
class Answer:
    """Outputs of a request.

    Args:
        outputs: by name, with the request's rows.
        batch: rows of the batch that they were computed in.
    """

    outputs: dict[str, np.ndarray]
    batch: int


@dataclass(eq=False)
class Pending:
    """A request in the queue.

    Args:
        feeds: inputs by name.
        rows: size of its batch.
        future: gets the answer.
        since: when it came, of ``time.monotonic()``.
        alone: whether it must not share a batch, since the one that it was in failed.
    """

    feeds: Feeds
    rows: int
    future: asyncio.Future[Answer]
    since: float = field(default_factory=time.monotonic)
    alone: bool = False

    @property
    def key(self) -> tuple[tuple[str, tuple[int, ...]], ...]:
        """Requests with equal keys fit into one batch."""
        return tuple((name, array.shape[1:]) for name, array in self.feeds.items())


class RequestQueue:
    """Requests that wait for a worker.

    Args:
        max_batch: most rows of a batch.
        wait_s: time for which the first request of a batch waits for others.
        limit: most rows that wait.
    """

    def __init__(self, max_batch: int, wait_s: float, limit: int) -> None:
        self.max_batch, self.wait_s, self.limit = max_batch, wait_s, limit
        self.rows = 0
        self._waiting: deque[Pending] = deque()
        self._changed = asyncio.Condition()
        self._taking = asyncio.Lock()

    async def put(self, pending: Pending) -> None:
        """Add a request.

        Raises:
            QueueFullError: as many rows wait as may.
        """
        self._drop_answered()
        if self.rows + pending.rows > self.limit and self._waiting:
            raise QueueFullError(
                f"The queue must hold at most {self.limit} rows, but {self.rows} wait. Try again later."
            )
        async with self._changed:
            self._waiting.append(pending)
            self.rows += pending.rows
            self._changed.notify_all()

    async def put_back(self, batch: Sequence[Pending], *, alone: bool = True) -> None:
        """Put requests in front; those whose batch failed are to be run alone."""
        async with self._changed:
            for pending in reversed(batch):
                pending.alone = alone
                self._waiting.appendleft(pending)
                self.rows += pending.rows
            self._changed.notify_all()

    async def take(self, batched: bool) -> list[Pending]:
        """The next batch: requests of equal shapes, in the order in which they came.

        Args:
            batched: whether requests may share a batch.
        """
        async with self._taking, self._changed:
            while True:
                while not (self._drop_answered() and self._waiting):
                    await self._changed.wait()
                first = self._waiting[0]
                if first.alone or not batched:
                    return self._removed([first])
                until = first.since + self.wait_s
                while (batch := self._fitting(first)) and sum(p.rows for p in batch) < self.max_batch:
                    left = until - time.monotonic()
                    if left <= 0:
                        break
                    with suppress(TimeoutError):
                        await asyncio.wait_for(self._changed.wait(), left)
                    self._drop_answered()
                    if first not in self._waiting:
                        break
                if first in self._waiting:
                    return self._removed(self._fitting(first))

    def take_full(self) -> list[Pending]:
        """A whole batch, if so many requests wait that there is one; otherwise nothing."""
        if self._taking.locked() or not (self._drop_answered() and self._waiting) or self._waiting[0].alone:
            return []
        batch = self._fitting(self._waiting[0])
        return self._removed(batch) if sum(pending.rows for pending in batch) >= self.max_batch else []

    def _drop_answered(self) -> bool:
        """Remove requests that timed out or whose client has gone."""
        for pending in [p for p in self._waiting if p.future.done()]:
            self._removed([pending])
        return True

    def _fitting(self, first: Pending) -> list[Pending]:
        batch: list[Pending] = []
        rows = 0
        for pending in self._waiting:
            if pending.key == first.key and not pending.alone:
                if batch and rows + pending.rows > self.max_batch:
                    break
                batch.append(pending)
                rows += pending.rows
        return batch

    def _removed(self, batch: list[Pending]) -> list[Pending]:
        for pending in batch:
            self._waiting.remove(pending)
            self.rows -= pending.rows
        return batch


@dataclass
class _Worker:
    process: BaseProcess
    connection: Connection
    served: Served


@dataclass(frozen=True)
class PoolSettings:
    """How a bundle is served.

    Args:
        worker: what each worker loads.
        workers: number of processes.
        wait_s: time for which a batch waits for more requests.
        queue: most rows that wait.
        stall_s: time after which a worker that doesn't answer is killed.
        canary_s: time between two runs of the kept samples; 0: at the start only.
        pad_to: rows that each batch is filled up to, so that a row doesn't depend on how many others there are; 0: not at all.
        shadow: share of the requests that run on the float32 reference, too.
    """

    worker: WorkerSettings
    workers: int = 1
    wait_s: float = 0.002
    queue: int = 1024
    stall_s: float = 10.0
    canary_s: float = 60.0
    pad_to: int = 0
    shadow: float = 0.0


class WorkerPool:
    """Processes that answer the requests of one bundle.

    Args:
        settings: how it is served.
        event: called with ``"restart"``, ``"canary_failed"``, and with ``"batch"`` and the number of rows.
    """

    def __init__(self, settings: PoolSettings, event: Callable[..., None] = lambda *_: None) -> None:
        self.settings, self._event = settings, event
        self.queue = RequestQueue(settings.worker.max_batch, settings.wait_s, settings.queue)
        self.served: Served
        self._workers: dict[int, _Worker] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self._threads = ThreadPoolExecutor(3 * settings.workers, thread_name_prefix="worker")
        self._context = multiprocessing.get_context("spawn")  # engines don't survive a fork
        self._busy = 0

    @property
    def ready(self) -> int:
        """Number of workers that have reproduced the bundle, and live."""
        return len(self._workers)

    async def start(self) -> None:
        """Start the workers, and wait until each has reproduced the bundle.

        Raises:
            EngineError: one couldn't load it, didn't reproduce it, or took too long.
        """
        try:
            started = await asyncio.gather(*(self._in_thread(self._launch) for _ in range(self.settings.workers)))
        except BaseException:
            await self.close()
            raise
        self.served = started[0].served
        for slot, worker in enumerate(started):
            self._workers[slot] = worker
            self._tasks.append(asyncio.create_task(self._serve(slot)))

    async def infer(self, feeds: Feeds, rows: int, timeout_s: float) -> Answer:
        """Outputs of a request.

        Raises:
            QueueFullError: too many rows wait.
            RequestFailedError: the engine can't run it.
            RequestTimeoutError: it took too long.
        """
        pending = Pending(feeds, rows, asyncio.get_running_loop().create_future())
        await self.queue.put(pending)
        try:
            return await asyncio.wait_for(pending.future, timeout_s)
        except TimeoutError:
            raise RequestTimeoutError(f"The request must be answered within {timeout_s:g} s, but it wasn't.") from None

    async def close(self) -> None:
        """Answer what is in the workers' hands, and end them."""
        until = time.monotonic() + self.settings.stall_s
        while (self._busy or self.queue.rows) and self._workers and time.monotonic() < until:
            await asyncio.sleep(0.01)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        for slot in list(self._workers):
            await asyncio.to_thread(_end, self._workers.pop(slot))
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def _in_thread(self, function: Callable[..., Any], *args: Any) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._threads, function, *args)

    def _launch(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=work, args=(theirs, self.settings.worker), daemon=True)
        process.start()
        theirs.close()
        try:
            first = ours.recv() if ours.poll(_START_S) else f"it took more than {_START_S:g} s to load"
        except (EOFError, OSError):
            process.join(_STOP_S)
            first = f"its process ended with exit code {process.exitcode} while loading"
        if isinstance(first, Served):
            return _Worker(process, ours, first)
        process.kill()
        process.join()
        raise EngineError(f"{self.settings.worker.bundle} can't be served: {first}")

    async def _serve(self, slot: int) -> None:
        """Give batches to one worker; start another one when it dies."""
        failures, period = 0, self.settings.canary_s or math.inf
        canary_at = time.monotonic() + period
        while True:
            worker = self._workers.get(slot)
            if worker is None:
                await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
                failures += 1
                with suppress(EngineError):
                    self._workers[slot] = await self._in_thread(self._launch)
                    canary_at = time.monotonic() + period
                continue
            if not worker.process.is_alive():
                await self._lost(slot)
                continue
            if time.monotonic() > canary_at:
                canary_at = time.monotonic() + period
                reply = await self._asked(worker, CANARY)
                if not isinstance(reply, dict):
                    self._event("canary_failed" if reply is not None else "stalled")
                    await self._lost(slot)
                    continue
            try:
                batch = await asyncio.wait_for(self.queue.take(self.served.batched), _LOOK_S)
            except TimeoutError:
                continue
            self._busy += 1
            try:
                if await self._run(worker, batch, canary_at):
                    failures = 0
                else:
                    await self._lost(slot)
            finally:
                self._busy -= 1

    async def _run(self, worker: _Worker, batch: list[Pending], until: float) -> bool:
        """Run a batch, and those that are full when its turn is over; False if the worker was lost.

        The next full batch is sent while the worker computes, so that it needn't wait for it; none after ``until``, when the kept
        samples are due: under steady load they would never run.
        """
        await self._in_time(_send, worker.connection, self._feeds(batch))
        while batch:
            following: list[Pending] = []
            reply = asyncio.ensure_future(self._in_time(_receive, worker.connection, self.settings.stall_s))
            while not reply.done():
                await asyncio.wait({reply}, timeout=_POLL_S)
                ahead = self.served.batched and not following and time.monotonic() < until
                if not reply.done() and ahead and (following := self.queue.take_full()):
                    await self._in_time(_send, worker.connection, self._feeds(following))
            await self._answered(batch, reply.result())
            if reply.result() is None:
                await self.queue.put_back(following, alone=False)
                return False
            batch = following
        return True

    def _feeds(self, batch: list[Pending]) -> dict[str, np.ndarray]:
        """Inputs of a batch, filled up by its last row."""
        feeds = {name: _joined([pending.feeds[name] for pending in batch]) for name in batch[0].feeds}
        missing = self._padded(batch) - sum(pending.rows for pending in batch)
        if missing:
            feeds = {name: np.concatenate([a, np.repeat(a[-1:], missing, 0)]) for name, a in feeds.items()}
        return feeds

    def _padded(self, batch: list[Pending]) -> int:
        rows = sum(pending.rows for pending in batch)
        return max(rows, self.settings.pad_to) if self.served.batched else rows

    async def _answered(self, batch: list[Pending], reply: Any) -> None:
        """Give each request its rows; or, if the batch failed, its error or another try."""
        if isinstance(reply, dict):
            self._event("batch", sum(pending.rows for pending in batch))
            start = 0
            for pending in batch:
                end = start + pending.rows
                if not pending.future.done():
                    own = reply if not self.served.batched else {n: a[start:end] for n, a in reply.items()}
                    pending.future.set_result(Answer(own, self._padded(batch)))
                start = end
            return
        again = [pending for pending in batch if not pending.future.done()]
        if batch[0].alone or (len(batch) == 1 and reply is not None):
            why = "its worker died twice" if reply is None else reply
            for pending in again:
                pending.future.set_exception(RequestFailedError(f"The engine can't run this request: {why}"))
        else:
            await self.queue.put_back(again)

    async def _asked(self, worker: _Worker, message: Any) -> Any:
        """A worker's answer; ``None`` if it died or doesn't answer."""
        await self._in_time(_send, worker.connection, message)
        return await self._in_time(_receive, worker.connection, self.settings.stall_s)

    async def _in_time(self, function: Callable[..., Any], *args: Any) -> Any:
        """The result of a function in a thread; ``None`` if it takes too long: a stopped process doesn't even read."""
        asked = asyncio.ensure_future(self._in_thread(function, *args))
        done, _ = await asyncio.wait({asked}, timeout=self.settings.stall_s + 1)
        return asked.result() if done else None

    async def _lost(self, slot: int) -> None:
        self._event("restart")
        worker = self._workers.pop(slot)
        worker.process.kill()  # it may be stopped, or wait for something that never comes
        await asyncio.to_thread(worker.process.join)
        worker.connection.close()


def _joined(arrays: list[np.ndarray]) -> np.ndarray:
    return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)


def _send(connection: Connection, message: Any) -> None:
    with suppress(EOFError, OSError):  # a dead worker: there will be no answer
        connection.send(message)


def _receive(connection: Connection, timeout_s: float) -> Any:
    try:
        return connection.recv() if connection.poll(timeout_s) else None
    except (EOFError, OSError):
        return None


def _end(worker: _Worker) -> None:
    with suppress(OSError):
        worker.connection.send(None)
    worker.process.join(_STOP_S)
    if worker.process.is_alive():
        worker.process.kill()
        worker.process.join()
    worker.connection.close()
