"""Prove that an exported file computes what the module computes, node by node and end to end.

Each node, fed PyTorch's values, must compute what PyTorch computes. End to end the file may differ from PyTorch as
much as PyTorch differs from itself, which in a deep network is far more than one node's rounding.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lightning_accel.engines.base import load_runner
from lightning_accel.errors import VerificationError
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.compare import Feeds, Memory, Network, Remembered, verify
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.network import ModuleNetwork
from lightning_accel.verification.nodes import NodeCheck, check_nodes
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.result import Verification
from lightning_accel.verification.tolerances import FLOAT, Tolerance

_FEW = 8
_NONE = (
    "No node differs by itself when fed the reference's inputs: what differs lies in the order of the file's inputs or "
    "outputs, or in how the engine runs the file."
)


@dataclass(frozen=True)
class FileProof:
    """Proof that a file computes what the network computes.

    Args:
        check: the comparison of the outputs.
        nodes: the comparison node by node.
        null: null divergence of the network.
    """

    check: Verification
    nodes: NodeCheck
    null: NullDivergence

    @property
    def counts(self) -> dict[str, Any]:
        """Counts of compared nodes, for a report."""
        nodes = self.nodes
        return {
            "compared": nodes.nodes,
            "of": nodes.of,
            "largest_error": nodes.largest_error,
            "largest_ratio": nodes.largest_ratio,
        }


def check_repeatable(network: Network, samples: Feeds) -> str:
    """Reason why a network can't be verified: its outputs differ between calls with the same inputs; empty if they don't.

    Args:
        network: the module.
        samples: inputs, each ``(S, ...)``; 8 samples are used.
    """
    few = {name: array[:_FEW] for name, array in samples.items()}
    again = verify(network, network, few, tolerance=FLOAT, batch_sizes=(_FEW,))
    if again.passed:
        return ""
    return (
        f"in PyTorch, too, the same inputs give outputs that differ by up to {again.max_error:.1e} of their range: the network draws "
        "random numbers in evaluation, or keeps a state"
    )


def prove_nodes(
    export: OnnxExport, samples: Feeds, what: str, repeat: str = "", layout: Layout | None = None
) -> NodeCheck:
    """Compare each node of a file with PyTorch. For an untrained network no other comparison is meaningful.

    Args:
        export: the file and the program it was written from.
        samples: inputs, each ``(S, ...)``.
        what: name of the file in messages.
        repeat: command that repeats the step, for the message.
        layout: how samples become the inputs of a call; ``None``: they are.

    Raises:
        VerificationError: a node computes something else; the message names it.
    """
    nodes = _nodes(export, samples, layout)
    if nodes.diverging:
        again = f" Repeat this step with: {repeat}" if repeat else ""
        raise VerificationError(
            f"{what[:1].upper()}{what[1:]} must compute what PyTorch does. {nodes.diverging}{again}"
        )
    return nodes


def _nodes(export: OnnxExport, samples: Feeds, layout: Layout | None) -> NodeCheck:
    if layout is None or layout.plain:
        return check_nodes(export.path, export.program, samples)
    feeds = layout.first(samples, _FEW)
    names = export.input_names
    return check_nodes(export.path, export.program, {name: feeds[name] for name in names}, names)


def prove_file(
    export: OnnxExport,
    network: Network,
    samples: Feeds,
    *,
    tolerance: Tolerance,
    what: str = "file (as written)",
    batch_sizes: Sequence[int] = (1, 7, 32),
    check_agreement: bool = True,
    repeat: str = "",
    layout: Layout | None = None,
) -> FileProof:
    """Compare a file, run with all engine optimizations turned off, with PyTorch.

    Args:
        export: the file and the program it was written from.
        network: the module, see :class:`~lightning_accel.verification.network.ModuleNetwork`; ``Remembered`` if it is compared again.
        samples: inputs, each ``(S, ...)``.
        tolerance: limits for the outputs of a network that hardly differs from itself.
        what: name of the file in the result and in messages.
        batch_sizes: as in :func:`~lightning_accel.verification.compare.verify`.
        check_agreement: as in :func:`~lightning_accel.verification.compare.verify`.
        repeat: command that repeats the step, for the message.
        layout: how samples become the inputs of a call; ``None``: they are.

    Returns:
        What was measured.

    Raises:
        VerificationError: they differ; the message names the first diverging node.
    """
    form = layout or Layout.of_samples(samples)
    known = network if isinstance(network, Remembered) else Remembered(network)
    others = known.network.orders() if isinstance(known.network, ModuleNetwork) else {}
    written: Memory = {}
    check = _end_to_end(export, form, known, written, samples, tolerance, what, batch_sizes, check_agreement)
    nodes = _nodes(export, samples, layout)
    null = NullDivergence(export.path, samples, nodes.noise, known, others, layout, written)
    random = "" if check.passed else check_repeatable(form.adapt(known.network), samples)
    if random:  # such a network is as far from itself as from anything
        check.failures.append(random)
    elif not nodes.diverging and not check.broken and (export.trained or not check.passed):
        check = check.against({**null.orders(tolerance), **null.noise(tolerance)})
    if nodes.diverging and check.passed:
        check.failures.append("a node computes something else")
    check.first_divergence = nodes.diverging or ("" if check.passed else _NONE)
    check.raise_if_failed(repeat)
    return FileProof(check, nodes, null)


def _end_to_end(
    export: OnnxExport,
    form: Layout,
    network: Network,
    written: Memory,
    samples: Feeds,
    tolerance: Tolerance,
    what: str,
    batch_sizes: Sequence[int],
    check_agreement: bool,
) -> Verification:
    try:
        with load_runner(export.path, "onnxruntime", emulate=True) as runner:
            return verify(
                form.adapt(network),
                form.adapt(Remembered(runner.run, written)),
                samples,
                engine=what,
                tolerance=tolerance,
                batch_sizes=batch_sizes,
                axes=export.axes,
                check_agreement=check_agreement,
            )
    except ModuleNotFoundError:
        raise
    except Exception as error:  # what isn't the file that was written may fail with anything
        infinite, count = float("inf"), len(next(iter(samples.values())))
        fails = [f"it fails: {str(error).splitlines()[0]}"]
        return Verification(
            what, count, {}, infinite, infinite, infinite, None, tolerance, failures=fails, broken=list(fails)
        )
