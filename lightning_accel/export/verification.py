"""Verification: is what was written what was trained? Measured on real batches, node by node where it isn't."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lightning_accel.export.tolerances import FLOAT, Tolerance

Feeds = Mapping[str, np.ndarray]
Network = Callable[[Feeds], Mapping[str, np.ndarray]]


class VerificationError(RuntimeError):
    """What was exported is not what was trained. The checkpoint is safe; the message holds the measured numbers."""


@dataclass
class Verification:
    """What was measured when two ways to run a network were compared.

    Errors are absolute differences as shares of the reference's output range, over all outputs and samples.

    Args:
        engine: what was compared with the reference.
        samples: compared samples.
        batch_sizes: batch size -> samples compared at it.
        median_error: median error.
        p99_error: 99th percentile.
        max_error: largest.
        agreement: share of samples with the same largest logit; ``None`` where outputs aren't logits.
        decided: share of samples whose two largest reference logits are further apart than twice the 99th percentile of
            the error (of the tolerated one, if that is smaller). Only these are held against the limit: on the rest an
            error within tolerance can turn the order.
        agreement_decided: agreement on those.
        tolerance: limits it was held against.
        failures: which limits were broken, in words; empty if it passed.
        metric: the user's metrics, reference and engine, by name.
        first_divergence: first node whose output differs on the same inputs, if it was looked for.
        note: what could not be measured, and why.
    """

    engine: str
    samples: int
    batch_sizes: dict[int, int]
    median_error: float
    p99_error: float
    max_error: float
    agreement: float | None
    tolerance: Tolerance
    decided: float | None = None
    agreement_decided: float | None = None
    failures: list[str] = field(default_factory=list)
    metric: dict[str, tuple[float, float]] = field(default_factory=dict)
    first_divergence: str = ""
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether every limit held."""
        return not self.failures

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        return {**asdict(self), "passed": self.passed, "batch_sizes": {str(k): v for k, v in self.batch_sizes.items()}}

    def raise_if_failed(self, repeat: str = "") -> None:
        """Raise if a limit was broken.

        Args:
            repeat: command that repeats the step.

        Raises:
            VerificationError: with the numbers and the first diverging node.
        """
        if self.passed:
            return
        message = f"What {self.engine} computes must be what was trained, but {'; '.join(self.failures)} ({self.samples} samples)."
        if self.first_divergence:
            message += f" {self.first_divergence}"
        raise VerificationError(message + (f" Repeat this step with: {repeat}" if repeat else ""))


def verify(
    reference: Network,
    network: Network,
    samples: Feeds,
    *,
    engine: str = "engine",
    batch_sizes: Sequence[int] = (1, 8, 64),
    tolerance: Tolerance = FLOAT,
    few: int = 64,
    check_agreement: bool = True,
) -> Verification:
    """Compare two ways to run a network on the same samples, at several batch sizes.

    Args:
        reference: named arrays in, named arrays out; what is right.
        network: the same for what is to be checked, e.g. ``runner.run``.
        samples: inputs, each ``(S, ...)`` with the samples along the first dimension.
        engine: name for the result.
        batch_sizes: the largest is run over all samples, the others over ``few``.
        tolerance: limits.
        few: samples for the smaller batch sizes.
        check_agreement: hold the agreement against its limit; an untrained network's largest logits are ties.

    Returns:
        What was measured; ``failures`` says which limits were broken. Nothing is raised for those.

    Raises:
        ValueError: samples of different numbers, or none.

    Example:
        >>> twice = lambda feeds: {"y": feeds["x"] * 2}
        >>> verify(twice, twice, {"x": np.ones((4, 3), np.float32)}, batch_sizes=(1, 4)).max_error
        0.0
    """
    sizes = {name: len(array) for name, array in samples.items()}
    if not sizes or len(set(sizes.values())) != 1 or min(sizes.values()) == 0:
        raise ValueError(
            f"Argument `samples` must hold the same number of samples (at least 1) of each input, but got {sizes}."
        )
    total = next(iter(sizes.values()))
    ordered = sorted({min(size, total) for size in batch_sizes})
    errors: dict[str, list[np.ndarray]] = {}
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    agree: list[np.ndarray] = []
    margins: list[np.ndarray] = []
    used: dict[int, int] = {}
    broken: list[str] = []
    for size in ordered:
        count = total if size == ordered[-1] else min(few, total)
        used[size] = count
        for start in range(0, count, size):
            feeds = {name: array[start : min(start + size, count)] for name, array in samples.items()}
            want, got = reference(feeds), network(feeds)
            if want.keys() != got.keys():
                raise ValueError(f"Both networks must have the same outputs, but got {sorted(want)} and {sorted(got)}.")
            for name in want:
                a, b = np.asarray(want[name]), np.asarray(got[name])
                if a.shape != b.shape:
                    broken.append(f"output `{name}` has shape {b.shape} instead of {a.shape} at batch size {size}")
                    continue
                a, b = a.astype(np.float64), b.astype(np.float64)
                errors.setdefault(name, []).append(np.where(a == b, 0.0, np.abs(a - b)).ravel())
                low[name] = min(low.get(name, np.inf), float(a.min(initial=np.inf)))
                high[name] = max(high.get(name, -np.inf), float(a.max(initial=-np.inf)))
                if a.ndim >= 2 and a.shape[1] > 1 and name == next(iter(want)):
                    agree.append((a.argmax(1) == b.argmax(1)).ravel())
                    best = np.sort(a, axis=1)[:, -2:]
                    margins.append((best[:, 1] - best[:, 0]).ravel())
    relative = np.concatenate(
        [np.concatenate(parts) / max(high[name] - low[name], 1e-30) for name, parts in errors.items()]
        or [np.array([np.inf])]
    )
    first = next(iter(errors), "")
    finite = np.where(np.isfinite(relative), relative, np.inf)
    result = Verification(
        engine=engine,
        samples=total,
        batch_sizes=used,
        median_error=float(np.quantile(finite, 0.5, method="lower")),
        p99_error=float(np.quantile(finite, 0.99, method="higher")),
        max_error=float(finite.max()),
        agreement=float(np.concatenate(agree).mean()) if agree else None,
        tolerance=tolerance,
        failures=broken,
    )
    if agree:
        same, margin = np.concatenate(agree), np.concatenate(margins) / max(high[first] - low[first], 1e-30)
        clear = margin > 2 * min(result.p99_error, tolerance.p99)
        result.decided = float(clear.mean())
        result.agreement_decided = float(same[clear].mean()) if clear.any() else None
    limits = [
        ("the median error", result.median_error, tolerance.median),
        ("the 99th percentile of the error", result.p99_error, tolerance.p99),
        ("the largest error", result.max_error, tolerance.maximum),
    ]
    for what, value, limit in limits:
        if not value <= limit:
            result.failures.append(f"{what} is {value:.2e} of the output range, above {limit:.0e}")
    agreement = result.agreement_decided
    if check_agreement and agreement is not None and agreement < tolerance.agreement:
        result.failures.append(
            f"predictions agree on {agreement:.2%} of the samples that are decided by more than the error "
            f"({result.decided:.0%} of all), below {tolerance.agreement:.2%}"
        )
    return result
