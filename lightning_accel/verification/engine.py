"""Compare an engine's own kernels with the file, region by region and end to end.

No torch needed, so an engine can be verified on the machine that runs it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_accel.engines.base import Runner
from lightning_accel.engines.registry import runs_onnx
from lightning_accel.verification.compare import Feeds, Network, verify
from lightning_accel.verification.kernels import KernelCheck, check_kernels
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.result import Verification
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
    check_agreement: bool = True,
    layout: Layout | None = None,
) -> tuple[Verification, KernelCheck | None]:
    """Compare an engine with the trained network, or with the file that was proven equal to it.

    Args:
        reference: the correct outputs as a function of a call's named arrays.
        runner: the engine, loaded.
        samples: inputs, each ``(S, ...)``.
        file: the ONNX file that the engine was made of.
        precision: of the engine: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"`` or ``"int8+fp16"``.
        null: null divergence of the network.
        tolerance: limits for a network that hardly differs from itself.
        batch_sizes: as in :func:`~lightning_accel.verification.compare.verify`.
        axes: as in :func:`~lightning_accel.verification.compare.verify`.
        kernels: whether integer kernels are isolated, where the engine runs regions of a file.
        check_agreement: as in :func:`~lightning_accel.verification.compare.verify`.
        layout: how samples become the inputs of a call; ``None``: they are.

    Returns:
        The comparison of the outputs, and that of the integer kernels if any can be isolated.
    """
    form = layout or Layout.of_samples(samples)
    check = verify(
        form.adapt(reference),
        form.adapt(runner.run),
        samples,
        engine=f"{runner.engine} (its kernels)",
        tolerance=tolerance,
        batch_sizes=batch_sizes,
        axes=axes,
        check_agreement=check_agreement,
    )
    isolated = None
    if precision == "int8" and kernels and runs_onnx(runner.engine):
        isolated = check_kernels(file, runner.engine, samples, form)
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
