"""Benchmarking: interleaved measurement of the runtime variants of a network, and their comparison."""

from typing import TYPE_CHECKING

from lightning_accel.core.lazy import lazy

if TYPE_CHECKING:
    from lightning_accel.benchmarking.benchmark_bundle import benchmark_bundle as benchmark_bundle
    from lightning_accel.benchmarking.compare_bundles import compare_bundles as compare_bundles
    from lightning_accel.benchmarking.comparison import BenchmarkSettings as BenchmarkSettings
    from lightning_accel.benchmarking.comparison import Comparison as Comparison
    from lightning_accel.benchmarking.decision import Budgets as Budgets
    from lightning_accel.benchmarking.measure import benchmark as benchmark
    from lightning_accel.benchmarking.scores import r_squared as r_squared

_PUBLIC = {
    "benchmark": "benchmarking.measure",
    "benchmark_bundle": "benchmarking.benchmark_bundle",
    "compare_bundles": "benchmarking.compare_bundles",
    "Comparison": "benchmarking.comparison",
    "Budgets": "benchmarking.decision",
    "BenchmarkSettings": "benchmarking.comparison",
    "r_squared": "benchmarking.scores",
}
__getattr__, __dir__, __all__ = lazy(__name__, _PUBLIC)
