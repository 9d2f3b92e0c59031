"""Proof: an exported file is the module, end to end on samples and node by node.

An engine may be faster than the file and a little off; the file itself, run as it is written, may not.
"""

from collections.abc import Sequence

from lightning_accel.engines.base import load_runner
from lightning_accel.export.divergence import check_nodes
from lightning_accel.export.onnx import OnnxExport
from lightning_accel.export.tolerances import Tolerance
from lightning_accel.export.verification import Feeds, Network, Verification, verify

_FEW = 8  # samples for the comparison of single nodes
_NONE = (
    "No node differs by itself when fed the reference's inputs: what differs lies in the order of the file's inputs or "
    "outputs, or in how the engine runs the file."
)


def prove_file(
    export: OnnxExport,
    network: Network,
    samples: Feeds,
    *,
    tolerance: Tolerance,
    what: str = "file (as written)",
    batch_sizes: Sequence[int] = (1, 7, 32),
    repeat: str = "",
    check_agreement: bool = True,
) -> tuple[Verification, dict[str, float]]:
    """Hold what a file says, run with every optimization of the engine turned off, against PyTorch.

    Args:
        export: the file and the program it was written from.
        network: the module, see :func:`~lightning_accel.export.evaluate.module_network`.
        samples: inputs, each ``(S, ...)``.
        tolerance: limits for the outputs.
        what: name of the file in the result and in messages.
        batch_sizes: as in :func:`~lightning_accel.export.verification.verify`.
        repeat: command that repeats the step, for the message.
        check_agreement: as in :func:`~lightning_accel.export.verification.verify`.

    Returns:
        What was measured end to end; and node by node: how many nodes were compared, of how many, and the largest error.

    Raises:
        VerificationError: they differ; the message names the first diverging node.
    """
    check = _end_to_end(export, network, samples, tolerance, what, batch_sizes, check_agreement)
    nodes = check_nodes(export.path, export.program, {name: array[:_FEW] for name, array in samples.items()})
    if nodes.diverging and check.passed:
        check.failures.append("a node computes something else")
    check.first_divergence = nodes.diverging or ("" if check.passed else _NONE)
    check.raise_if_failed(repeat)
    return check, {"compared": nodes.nodes, "of": nodes.of, "largest_error": nodes.largest_error}


def _end_to_end(
    export: OnnxExport,
    network: Network,
    samples: Feeds,
    tolerance: Tolerance,
    what: str,
    batch_sizes: Sequence[int],
    check_agreement: bool,
) -> Verification:
    try:
        with load_runner(export.path, "onnxruntime", emulate=True) as runner:
            return verify(
                network,
                runner.run,
                samples,
                engine=what,
                tolerance=tolerance,
                batch_sizes=batch_sizes,
                check_agreement=check_agreement,
                axes=export.axes,
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # what isn't the file that was written may fail with anything
        infinite, count = float("inf"), len(next(iter(samples.values())))
        fails = [f"it fails: {str(error).splitlines()[0]}"]
        return Verification(what, count, {}, infinite, infinite, infinite, None, tolerance, failures=fails)
