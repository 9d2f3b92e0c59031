"""Worker process of one variant: loads it, and runs it on request.

Requests come as lines of JSON on the standard input, replies go out as lines of JSON; between them the process sleeps.
The process imports only what its engine needs, so that its memory and its first inference are the engine's.
"""

import gc
import json
import os
import sys
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.registry import EngineSpec, engine_named, register_engine
from lightning_accel.errors import UnsupportedError

NOT_HERE = (ModuleNotFoundError, NotImplementedError)  # the message names what is missing; not counted as a failure


class Worker:
    """Handler of the requests; each method with the prefix ``do_`` is a request."""

    def __init__(self) -> None:
        self.inputs: dict[str, np.ndarray] = {}
        self.run: Callable[[Mapping[str, np.ndarray]], dict[str, np.ndarray]]
        self.pools: dict[int, ThreadPoolExecutor] = {}
        self.feeds: dict[int, dict[str, np.ndarray]] = {}

    def do_start(self, variant: Mapping[str, Any], inputs: Mapping[str, str], threads: int) -> dict[str, Any]:
        """Load the variant and run one sample; returns the time of both together, in ms."""
        self.inputs = {name: np.load(path, mmap_mode="r") for name, path in inputs.items()}
        first = self._feeds(1)
        started = time.perf_counter()
        self.run = _load(variant, threads).run
        self.run(first)
        return {"first_ms": 1e3 * (time.perf_counter() - started)}

    def do_warm(self, batch: int, callers: int, seconds: float) -> dict[str, Any]:
        """Run for some time without timing."""
        return {"calls": len(self._turn(batch, callers, seconds)[0])}

    def do_turn(self, batch: int, callers: int, seconds: float) -> dict[str, Any]:
        """Run for some time; returns the latency of each call, the duration, and the time that threads ran and waited for a CPU, in ms.

        The first call of each caller isn't timed, since the CPU caches hold data of other processes.
        """
        ran, waited = _ran_and_waited_ms()
        times, wall = self._turn(batch, callers, seconds)
        after = _ran_and_waited_ms()
        return {"times_ms": times, "wall_ms": wall, "ran_ms": after[0] - ran, "waited_ms": after[1] - waited}

    def do_memory(self) -> dict[str, Any]:
        """Largest resident memory of this process so far, in bytes."""
        return {"peak_memory_bytes": _peak_memory()}

    def do_predict(self, batch: int, keep: int, classify: bool, out: str) -> dict[str, Any]:
        """Save the outputs of the first ``keep`` samples and, with ``classify``, the predicted classes of all samples."""
        total = len(next(iter(self.inputs.values())))
        total = total if classify else min(keep, total)
        kept: dict[str, list[np.ndarray]] = {}
        classes: list[np.ndarray] = []
        for start in range(0, total, batch):
            end = min(start + batch, total)
            outputs = self.run({n: np.array(a[start:end]) for n, a in self.inputs.items()})
            for name, array in outputs.items():
                if start < keep:
                    kept.setdefault(name, []).append(array[: keep - start])
            logits = next(iter(outputs.values()))
            if classify and logits.ndim >= 2 and logits.shape[1] > 1:
                classes.append(logits.argmax(1))
        arrays = {f"output {name}": np.concatenate(parts) for name, parts in kept.items()}
        if classes:
            arrays["classes"] = np.concatenate(classes)
        np.savez(out, allow_pickle=False, **arrays)
        return {"samples": total}

    def _feeds(self, batch: int) -> dict[str, np.ndarray]:
        """The first ``batch`` samples, repeated if there are too few."""
        if batch not in self.feeds:
            self.feeds[batch] = {n: np.resize(a[:batch], (batch, *a.shape[1:])) for n, a in self.inputs.items()}
        return self.feeds[batch]

    def _turn(self, batch: int, callers: int, seconds: float) -> tuple[list[float], float]:
        feeds = self._feeds(batch)
        self.run(feeds)  # errors at this batch size are raised here, not in one of several threads
        # Threads are reused: OpenMP creates a thread team for each calling thread at its first call.
        pool = self.pools.setdefault(callers, ThreadPoolExecutor(callers))
        ready = threading.Barrier(callers)

        def call_until_the_end() -> tuple[list[float], float, float]:
            if callers > 1:
                self.run(feeds)
            ready.wait()
            started = before = time.perf_counter_ns()
            times = []
            while True:
                self.run(feeds)
                now = time.perf_counter_ns()
                times.append(max(now - before, 1) / 1e6)  # the clock's resolution may exceed a very short call
                before = now
                if now - started >= 1e9 * seconds:
                    return times, started, now

        gc.collect()
        gc.disable()  # a garbage collection would distort the timing of one call
        try:
            if callers == 1:  # in the main thread, as in most programs
                parts = [call_until_the_end()]
            else:
                parts = [future.result() for future in [pool.submit(call_until_the_end) for _ in range(callers)]]
        finally:
            gc.enable()
        wall = max(end for *_, end in parts) - min(start for _, start, _ in parts)
        return [t for times, *_ in parts for t in times], wall / 1e6


def _load(variant: Mapping[str, Any], threads: int) -> Runner:
    options = dict(variant["options"])
    if (record := variant.get("spec")) is not None:  # registered in the measuring process only
        register_engine(EngineSpec.from_dict(record))
    if variant["mode"] not in ("", "inference_mode"):
        from lightning_accel.benchmarking.torch_variants import TorchVariant

        return TorchVariant(variant["file"], mode=variant["mode"], threads=threads)
    if providers := options.get("providers"):
        import onnxruntime

        if not set(providers) <= set(onnxruntime.get_available_providers()):
            raise UnsupportedError(
                f"this ONNX Runtime has no {', '.join(providers)}, only {', '.join(onnxruntime.get_available_providers())}: "
                'pip install "lightning-accel[gpu]" instead of the extra `cpu`, on a machine with an NVIDIA GPU'
            )
    chosen = threads if engine_named(variant["engine"]).threads else None
    return load_runner(variant["file"], variant["engine"], threads=chosen, **options)


def _ran_and_waited_ms() -> tuple[float, float]:
    """Total time that the threads of this process ran, and waited for a CPU while runnable, in ms.

    Available on Linux only; elsewhere both are 0.
    """
    ran = waited = 0.0
    for path in Path("/proc/self/task").glob("*/schedstat"):
        with suppress(OSError):  # a thread that has just ended
            fields = path.read_text().split()
            ran, waited = ran + float(fields[0]) / 1e6, waited + float(fields[1]) / 1e6
    return ran, waited


def _peak_memory() -> int | None:
    # `getrusage` would include the peak memory of the parent process.
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:")), None)


def main() -> None:
    """Handle requests until the input ends."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # output of libraries must not interfere with the replies
    worker = Worker()
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, f"do_{request.pop('do')}")(**request)
        except NOT_HERE as error:
            reply = {"not_here": str(error)}
        except Exception as error:  # engines raise unrelated types; the message becomes the reason
            reply = {"failed": f"{type(error).__name__}: {error}"}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()


if __name__ == "__main__":
    main()
