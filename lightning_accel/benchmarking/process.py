"""Run a variant in a separate process, with a time limit."""

import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning_accel
from lightning_accel.errors import RunError

WORKER = "lightning_accel.benchmarking.worker"


class VariantEndedError(RunError):
    """A variant ended early; ``status`` is the status of its result.

    Args:
        status: ``"not here"``, ``"failed"`` or ``"out of time"``.
        reason: the reason in one line.
    """

    def __init__(self, status: str, reason: str) -> None:
        super().__init__(reason)
        self.status, self.reason = status, reason


class VariantProcess:
    """Start a worker process and exchange requests with it.

    Args:
        threads: number of threads of OpenMP, MKL and OpenBLAS; idle OpenMP threads sleep.
        limit_s: time limit of all requests together, in seconds.
    """

    def __init__(self, *, threads: int, limit_s: float) -> None:
        self.left_s, self._limit_s = limit_s, limit_s
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115  # closed with the process
        self._process = subprocess.Popen(
            [
                sys.executable,
                "-P",
                "-m",
                WORKER,
            ],  # -P: a file `onnx.py` in the current folder must not shadow the package
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            env=_environment(threads),
            start_new_session=True,  # Ctrl-C reaches the measuring process only; compilers end with the worker
        )
        self._replies: queue.Queue[str] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def request(self, name: str, **arguments: Any) -> dict[str, Any]:
        """Send a request and wait for the reply.

        Args:
            name: name of a request of the worker.
            arguments: its arguments, JSON values.

        Raises:
            VariantEndedError: the request failed, can't run here, or exceeded the time limit, or the process died.
        """
        started = time.perf_counter()
        with suppress(BrokenPipeError):  # the process died: handled below as a missing reply
            assert self._process.stdin is not None
            self._process.stdin.write(json.dumps({"do": name, **arguments}) + "\n")
            self._process.stdin.flush()
        try:
            line = self._replies.get(timeout=max(self.left_s, 0.0))
        except queue.Empty:
            raise VariantEndedError(
                "out of time", f"`{name}` reached the limit of {self._limit_s:g} s for a variant"
            ) from None
        finally:
            self.left_s -= time.perf_counter() - started
        if not line:
            raise VariantEndedError("failed", self._death())
        reply: dict[str, Any] = json.loads(line)
        if "not_here" in reply:
            raise VariantEndedError("not here", " ".join(reply["not_here"].split()))
        if "failed" in reply:
            raise VariantEndedError("failed", " ".join(reply["failed"].split())[:500])
        return reply

    def close(self) -> None:
        """Kill the process and its children."""
        with suppress(ProcessLookupError, PermissionError):
            if hasattr(os, "killpg"):
                os.killpg(self._process.pid, signal.SIGKILL)
            else:
                self._process.kill()
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            with suppress(BrokenPipeError):
                stream.close()  # type: ignore[union-attr]  # both are pipes

    def _read(self) -> None:
        assert self._process.stdout is not None
        with suppress(ValueError):  # closed during the read
            for line in self._process.stdout:
                self._replies.put(line)
        self._replies.put("")

    def _death(self) -> str:
        code = self._process.wait()
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f"its process died with {how}" + (f": {lines[-1][:300]}" if lines else "")


def _environment(threads: int) -> dict[str, str]:
    """Environment variables of the worker: number of threads, passive waiting, and the path of this package."""
    own = str(Path(lightning_accel.__file__).parents[1])
    path = os.pathsep.join([own, *filter(None, [os.environ.get("PYTHONPATH")])])
    counts = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), str(threads))
    waiting = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
    return {**os.environ, **counts, **waiting, "PYTHONPATH": path}
