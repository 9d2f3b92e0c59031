"""Engine proof: what an engine's own kernels compute, held against the file, region by region and end to end.

Nothing here needs torch, so an engine can be proven on the machine that runs it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_accel.engines.base import Runner
from lightning_accel.engines.registry import runs_onnx
from lightning_accel.verification.compare import Feeds, Network, Verification, verify
from lightning_accel.verification.kernels import KernelCheck, check_kernels
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.tolerances import Tolerance


def prove_engine(
    reference: Network,
    runner: Runner,
    samples: Feeds,
    *,
    file: Path,
    precision: str,
    null: NullDivergence,
    tolerance: Tolerance,
    batch_sizes: Sequence[int],
    axes: Mapping[str, Mapping[int, str]] | None = None,
    kernels: bool = True,
) -> tuple[Verification, KernelCheck | None]:
    """Hold an engine against the trained network, or against the file that was proven to be it.

    Args:
        reference: what is right.
        runner: the engine, loaded.
        samples: inputs, each ``(S, ...)``.
        file: the ONNX file that the engine was made of.
        precision: of the engine: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int8+fp16"``.
        null: how far the network is from itself.
        tolerance: limits for a network that hardly differs from itself.
        batch_sizes: as in :func:`~lightning_accel.verification.compare.verify`.
        axes: as in :func:`~lightning_accel.verification.compare.verify`.
        kernels: whether integer kernels are isolated, where the engine runs regions of a file.

    Returns:
        The comparison of the outputs, and that of the integer kernels, where there are any that can be isolated.
    """
    check = verify(
        reference,
        runner.run,
        samples,
        engine=f"{runner.engine} (its kernels)",
        tolerance=tolerance,
        batch_sizes=batch_sizes,
        axes=axes,
    )
    isolated = None
    if precision == "int8" and kernels and runs_onnx(runner.engine):
        isolated = check_kernels(file, runner.engine, samples)
    if isolated is not None and isolated.diverging:
        check.failures.append("a kernel computes something else than the file")
        check.first_divergence = isolated.diverging
        return check, isolated
    half = precision.rpartition("+")[2]
    if precision.startswith("int8") or not check.passed:
        steps = None if isolated is None else isolated.noise
        noise = null.noise(tolerance, steps=steps, rounding=half if half in ("fp16", "bf16") else None)
        check = check.against({**null.orders(tolerance), **noise})
    if not check.passed:
        check.first_divergence = "The file as written passed, so the difference lies in this engine's kernels."
    return check, isolated
