"""One script for each claim on speed; each prints the machine, then the ratio it claims, last."""

from collections.abc import Sequence

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.measure import Ratio


def print_environment() -> None:
    """Print the machine and the versions, one line each."""
    for name, value in environment().items():
        print(f"{name}: {value}")


def verdict(what: str, ratios: Sequence[Ratio], target: float) -> str:
    """Return the line that ends a script: ratios with their intervals, and whether the target was reached."""
    reached = "reached" if all(ratio.value <= target for ratio in ratios) else "missed"
    numbers = ", ".join(f"{ratio.value:.4f} [{ratio.low:.4f}, {ratio.high:.4f}]" for ratio in ratios)
    return f"{what}: {numbers} (target: at most {target:g}, {reached})"
