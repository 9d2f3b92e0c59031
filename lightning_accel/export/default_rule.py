"""Choose the bundle's default without budgets: the fastest candidate that isn't worse than float32 (law 14)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from lightning_accel.benchmarking.measure import BenchmarkResult, Ratio, median_ratio
from lightning_accel.export.quality import Change, Scores, change

UNKNOWN = (
    "nothing says how good it is: the held-out data has no class labels, and `validation_step` logs no metric. Log one, or pass "
    "budgets, which compare predictions"
)


@dataclass(frozen=True)
class Refusal:
    """Why a candidate doesn't ship.

    Args:
        short: as the predicate of a sentence: ``"slower"``.
        reason: with the numbers.
    """

    short: str
    reason: str


@dataclass(frozen=True)
class Choice:
    """What ships.

    Args:
        ships: label of the candidate.
        why: the reason, as a clause that follows its name.
        refused: the candidates that don't ship, by label.
    """

    ships: str
    why: str
    refused: dict[str, Refusal] = field(default_factory=dict)


def choose_default(
    labels: Sequence[str],
    float32: str,
    scores: Mapping[str, Scores],
    speeds: Mapping[str, Ratio],
    quiet: float,
    *,
    modes: Mapping[str, str],
    exact: Sequence[str] = (),
    trained: Mapping[str, Change] | None = None,
) -> Choice:
    """Choose the fastest candidate that isn't worse than float32 of the same network beyond its interval.

    A candidate ships only if the lower end of its speed-up over float32 exceeds 1 and the null run; otherwise float32 ships.

    Args:
        labels: the candidates that ran.
        float32: the one of them that is the network in float32.
        scores: quality by label.
        speeds: time of float32 divided by time of the candidate, by label.
        quiet: upper end of the interval of a network compared with itself.
        modes: see :func:`~lightning_accel.export.quality.change`.
        exact: candidates that compute float32, too, in another engine: they are proven equal and can't be worse.
        trained: for candidates that were trained quantization-aware, the change against the same network quantized without.
    """
    refused: dict[str, Refusal] = {}
    for label in (label for label in labels if label != float32):
        lost = None if label in exact else change(scores[float32], scores[label], modes)
        untrained = (trained or {}).get(label)
        if label not in exact and lost is None:
            refused[label] = Refusal("of unknown quality", UNKNOWN)
        elif lost is not None and lost.worse:
            refused[label] = Refusal(f"worse in {lost.score}", f"worse than float32 beyond its interval: {lost}")
        elif untrained is not None and untrained.worse:
            says = (
                f"quantization-aware training cost accuracy, {untrained} against the same network quantized without it: train with a "
                "smaller rate, or use PostTrainingQuantization"
            )
            refused[label] = Refusal("less accurate than without quantization-aware training", says)
        elif speeds[label].low <= max(1.0, quiet):
            short = "slower" if speeds[label].high < 1 else "not clearly faster"
            refused[label] = Refusal(short, f"{short} than float32: {_times(speeds[label])} its speed")
    left = [label for label in labels if label not in refused]
    ships = max(left, key=lambda label: 1.0 if label == float32 else speeds[label].low)
    why = _why(ships, float32, refused)
    refused |= {label: Refusal("slower", f"slower than {ships}") for label in left if label != ships}
    return Choice(ships, why, refused)


def _why(ships: str, float32: str, refused: Mapping[str, Refusal]) -> str:
    if ships != float32:
        return "the fastest candidate that is not worse than float32 of the same network"
    if not refused:
        return "the only candidate"
    return f"since {' and '.join(f'`{label}` is {refusal.short}' for label, refusal in refused.items())}"


def speed_ratios(measured: BenchmarkResult, labels: Sequence[str], float32: str) -> dict[str, Ratio]:
    """Time of float32 divided by the time of each candidate, from calls of the same rounds."""
    base = measured[float32].samples
    rng = np.random.default_rng(0)
    return {
        label: Ratio(1.0, 1.0, 1.0) if label == float32 else median_ratio(base, measured[label].samples, rng)
        for label in labels
    }


def _times(ratio: Ratio) -> str:
    return f"{ratio.value:.2f}x [{ratio.low:.2f}, {ratio.high:.2f}]"
