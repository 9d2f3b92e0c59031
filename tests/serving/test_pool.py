import asyncio
import time

import numpy as np
import pytest

from lightning_accel.serving.pool import Pending, PoolSettings, QueueFullError, RequestQueue, WorkerPool
from lightning_accel.serving.worker import WorkerSettings


def pending(rows=1, width=4):
    feeds = {"x": np.zeros((rows, width), np.float32)}
    return Pending(feeds, rows, asyncio.get_running_loop().create_future())


def run(test):
    asyncio.run(asyncio.wait_for(test(), 20))


def test_batches_hold_requests_of_one_shape_in_their_order():
    async def test():
        queue = RequestQueue(max_batch=4, wait_s=0.01, limit=100)
        given = [pending(), pending(width=5), pending(2), pending(2), pending(width=5)]
        for one in given:
            await queue.put(one)
        assert await queue.take(True) == [given[0], given[2]]  # a third would exceed the limit of rows
        assert await queue.take(True) == [given[1], given[4]]
        assert await queue.take(True) == [given[3]]
        assert queue.rows == 0

    run(test)


def test_a_full_batch_does_not_wait_and_a_small_one_waits_for_others():
    async def test():
        queue = RequestQueue(max_batch=3, wait_s=5.0, limit=100)
        taking = asyncio.create_task(queue.take(True))
        for _ in range(3):
            await queue.put(pending())
            await asyncio.sleep(0.01)
        assert len(await asyncio.wait_for(taking, 1)) == 3
        queue.wait_s = 0.05
        await queue.put(pending())
        assert len(await queue.take(True)) == 1

    run(test)


def test_requests_that_share_no_batch():
    async def test():
        queue = RequestQueue(max_batch=8, wait_s=0.0, limit=100)
        first, second, third = pending(), pending(), pending()
        for one in (first, second, third):
            await queue.put(one)
        assert await queue.take(False) == [first]
        await queue.put_back([first])
        assert await queue.take(True) == [first]  # alone, and before the others
        assert await queue.take(True) == [second, third]

    run(test)


def test_no_more_rows_wait_than_may_and_those_that_are_answered_do_not_count():
    async def test():
        queue = RequestQueue(max_batch=8, wait_s=0.0, limit=3)
        big = pending(9)
        await queue.put(big)  # an empty queue takes any request
        with pytest.raises(QueueFullError, match="must hold at most 3 rows, but 9 wait"):
            await queue.put(pending())
        big.future.cancel()  # its time is over
        await queue.put(pending(3))
        assert [one.rows for one in await queue.take(True)] == [3]

    run(test)


def test_a_full_batch_can_be_taken_while_another_one_runs():
    async def test():
        queue = RequestQueue(max_batch=3, wait_s=0.0, limit=100)
        given = [pending() for _ in range(5)]
        for one in given[:2]:
            await queue.put(one)
        assert queue.take_full() == []
        for one in given[2:]:
            await queue.put(one)
        assert queue.take_full() == given[:3]
        assert queue.take_full() == []
        await queue.put_back(given[:3], alone=False)
        assert await queue.take(True) == given[:3]

    run(test)


def test_the_kept_samples_run_under_steady_load_too(bundles):
    class Counting(WorkerPool):
        asked = 0

        async def _asked(self, worker, message):
            self.asked += 1
            return await super()._asked(worker, message)

    async def test():
        rows = 300_000  # each request is a full batch, and takes longer than the queue is left alone
        settings = WorkerSettings(bundles["pixels"], None, 1, True, max_batch=rows)
        pool = Counting(PoolSettings(settings, queue=10 * rows, canary_s=0.3))
        await pool.start()
        until = time.monotonic() + 2.5

        async def client():
            while time.monotonic() < until:
                await pool.infer({"x": np.zeros((rows, 4), np.float32)}, rows, 10.0)

        await asyncio.gather(*(client() for _ in range(6)))
        asked = pool.asked
        await pool.close()
        assert asked >= 2

    asyncio.run(asyncio.wait_for(test(), 60))
