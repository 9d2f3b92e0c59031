"""Run a share of the requests on the float32 reference as well, and notice when the served network leaves it more than it should.

The bundle says how many of the predictions on held-out samples are those of its float32 reference. On inputs unlike those, an int8
network may leave its reference more often: ranges were learned from other numbers. What is compared is a window of recent answers.
"""

import asyncio
import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np

from lightning_accel.core.decibels import decibels
from lightning_accel.core.intervals import wilson_interval
from lightning_accel.errors import InvalidArgumentError, LightningAccelError
from lightning_accel.serving.pool import WorkerPool
from lightning_accel.verification.signal import equal_predictions

WINDOW, LEAST = 1000, 100  # predictions, or requests, that are looked at
_FACTOR_DB = 3.0  # by which the noise of outputs that are no predictions may be larger: twice its power
_AT_ONCE = 8  # requests in the reference's queue; more are left out, since the answers mustn't wait


@dataclass(frozen=True)
class Expected:
    """What the manifest says of the served file and its float32 reference.

    Args:
        same: predictions that are equal; ``None`` for outputs that are no predictions.
        of: predictions that were compared.
        ratio_db: signal-to-noise ratio of the first output.
    """

    same: int | None
    of: int
    ratio_db: float

    @staticmethod
    def of_bundle(manifest: Mapping[str, Any]) -> "Expected":
        """What a manifest says.

        Raises:
            InvalidArgumentError: the bundle has no int8 file and float32 reference.
        """
        proofs = manifest.get("proofs", {})
        known, ratios = proofs.get("same_as_float"), proofs.get("signal_to_noise_db", {})
        if "reference.onnx" not in manifest["files"] or not (known or ratios):
            raise InvalidArgumentError(
                "Option `--shadow` must be of a bundle with int8 and its float32 reference, but this one records no comparison of both. "
                "Export it again, or leave `--shadow` out."
            )
        ratio = ratios.get(manifest["outputs"][0], math.inf)
        return Expected(known["predictions"], known["of"], ratio) if known else Expected(None, 0, ratio)


class Shadow:
    """Compares a share of the answers with those of the float32 reference, after they were given.

    Args:
        share: of the requests, in (0, 1].
        pool: workers of the reference.
        expected: what the manifest says.
        event: called with ``"same"``, ``"other"`` or ``"dropped"`` and a number, and with ``"alarm"`` and 1 or 0 when that changes.
    """

    def __init__(self, share: float, pool: WorkerPool, expected: Expected, event: Callable[[str, int], None]) -> None:
        self.share, self.pool, self.expected, self._event = share, pool, expected, event
        self.alarm = False
        self._due = 0.0
        self._tasks: set[asyncio.Task[None]] = set()
        self._equal: deque[bool] = deque(maxlen=WINDOW)
        self._powers: deque[tuple[float, float]] = deque(maxlen=WINDOW)

    def offer(self, feeds: Mapping[str, np.ndarray], rows: int, outputs: Mapping[str, np.ndarray]) -> None:
        """Compare this answer, if it is its turn."""
        self._due += self.share
        if self._due < 1.0:
            return
        self._due -= 1.0
        if len(self._tasks) >= _AT_ONCE:
            self._event("dropped", 1)
            return
        task = asyncio.create_task(self._compare(feeds, rows, outputs))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Leave what waits, and end the workers."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self.pool.close()

    @property
    def says(self) -> str:
        """What was seen, in words."""
        if self.expected.same is None:
            return (
                f"outputs lie {self._ratio():.1f} dB above their difference from the float32 reference, {self.expected.ratio_db:.1f} dB on "
                f"the samples of the bundle"
            )
        seen, known = sum(self._equal) / max(len(self._equal), 1), self.expected.same / self.expected.of
        return f"{seen:.1%} of {len(self._equal)} predictions are those of the float32 reference, {known:.1%} on the samples of the bundle"

    async def _compare(self, feeds: Mapping[str, np.ndarray], rows: int, outputs: Mapping[str, np.ndarray]) -> None:
        with suppress(LightningAccelError):  # of the reference's worker; the request was answered
            exact = (await self.pool.infer(feeds, rows, self.pool.settings.stall_s)).outputs
            name = next(iter(exact))
            self._add(np.asarray(outputs[name]), np.asarray(exact[name]))

    def _add(self, answer: np.ndarray, exact: np.ndarray) -> None:
        equal = equal_predictions(answer, exact) if self.expected.same is not None else None
        if equal is not None:
            self._equal.extend(equal.ravel().tolist())
            self._event("same", int(equal.sum()))
            self._event("other", int((~equal).sum()))
        else:
            difference = answer.astype(np.float64) - exact
            self._powers.append((float(np.square(exact.astype(np.float64)).sum()), float(np.square(difference).sum())))
        alarm = self._leaves()
        if alarm != self.alarm:
            self.alarm = alarm
            self._event("alarm", int(alarm))

    def _leaves(self) -> bool:
        """Whether the answers leave the reference more than on the samples of the bundle, beyond the 95 % intervals of both."""
        if self.expected.same is not None:
            if len(self._equal) < LEAST:
                return False
            known, seen = (
                wilson_interval(self.expected.same, self.expected.of),
                wilson_interval(sum(self._equal), len(self._equal)),
            )
            return seen[1] < known[0]
        return len(self._powers) >= LEAST and self._ratio() < self.expected.ratio_db - _FACTOR_DB

    def _ratio(self) -> float:
        return decibels(sum(p for p, _ in self._powers), sum(n for _, n in self._powers))
