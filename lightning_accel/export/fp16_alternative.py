"""The fp16 alternative to an int8 engine on a GPU; the faster one, as measured, ships."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.benchmarking.measure import Ratio, median_ratio
from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.tensorrt.build import build_engine
from lightning_accel.onnx.half_precision import check_lowered, lower_precision
from lightning_accel.verification.compare import Feeds, verify
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.result import Verification
from lightning_accel.verification.tolerances import FP16

FILE, ENGINE = "engines/fp16.onnx", "engines/fp16.engine"


@dataclass(frozen=True)
class Decision:
    """Which engine becomes the default.

    Args:
        int8: whether it is int8.
        ratio: time of fp16 divided by time of int8.
        why: in words, for report and manifest.
    """

    int8: bool
    ratio: Ratio
    why: str


def choose_precision(fp16_ms: Sequence[float], int8_ms: Sequence[float]) -> Decision:
    """Choose int8 only if it is faster than fp16 beyond the interval: fp16 is closer to the trained network.

    Args:
        fp16_ms: latency of each round in ms.
        int8_ms: of the same rounds.
    """
    ratio = median_ratio(fp16_ms, int8_ms, np.random.default_rng(0))
    shown = f"{ratio.value:.3f}x [{ratio.low:.3f}, {ratio.high:.3f}]"
    if ratio.low > 1:
        return Decision(True, ratio, f"int8 is the default: {shown} as fast as fp16 on this GPU")
    return Decision(False, ratio, f"fp16 is the default: int8 is {shown} as fast on this GPU")


def build_alternative(folder: Path, reference: str, calls: Sequence[Feeds]) -> dict[str, Any]:
    """Build an fp16 engine from a bundle's float reference; returns its entry for report and manifest."""
    lower_precision(folder / reference, folder / FILE, "fp16", samples=calls)
    check_lowered(folder / reference, folder / FILE, "fp16")
    info = build_engine(folder / FILE, folder / ENGINE)
    return {
        "engine": "tensorrt",
        "file": ENGINE,
        "built_from": FILE,
        "library": info.library,
        "version": info.version,
        "precision": "fp16",
    }


def verify_alternative(
    runner: Runner,
    reference: Path,
    samples: Feeds,
    batch_sizes: Sequence[int],
    *,
    check_agreement: bool,
    layout: Layout,
) -> Verification:
    """Compare the fp16 engine with the float reference, which was verified before."""
    with load_runner(reference, "onnxruntime", emulate=True) as right:
        what = "tensorrt in fp16 (its kernels)"
        check = verify(
            layout.adapt(right.run),
            layout.adapt(runner.run),
            samples,
            engine=what,
            tolerance=FP16,
            batch_sizes=batch_sizes,
            check_agreement=check_agreement,
        )
    if check.passed:
        return check
    return check.against(NullDivergence(reference, samples, layout=layout).noise(FP16, rounding="fp16"))
