"""Try an engine on the file of an untrained network: it must load it, and compute what PyTorch computes.

The outputs of an untrained network may be ties, or all but constant, so nothing random may refuse an engine. Outputs as close as
float32 allows are accepted. Where they aren't, the operators are compared one by one, each fed PyTorch's values. An engine is refused
for an operator that it computes otherwise, or can't load; or, if there is none, for outputs that are off by far more than the network
is from itself.
"""

import tempfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx

from lightning_accel.engines.base import load_runner
from lightning_accel.errors import MissingPackageError, RunError, VerificationError
from lightning_accel.onnx.export import OnnxExport
from lightning_accel.verification.channels import PEAK
from lightning_accel.verification.compare import Network, verify
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.nodes import Reference, node_sentence, record_program
from lightning_accel.verification.null_divergence import NullDivergence
from lightning_accel.verification.segments import Segment, cut_segments, run_segments
from lightning_accel.verification.tolerances import FLOAT

OPERATOR = 1e-3  # of an operator's range: engines approximate, and sum in other orders; what is computed otherwise is off by more
_MANY = 8  # samples that operators are compared on
_GROSS = 1e-2  # of the output's range in the median: only this refuses an engine none of whose operators differs
_WAYS_OUT = {  # operator -> what can be written instead
    "Resize": "resize without antialiasing, or in preprocessing outside of the network",
    "AveragePool": "pad the input and pool with ceil_mode=False",
    "MaxPool": "pad the input and pool with ceil_mode=False",
    "Pad": "concatenate slices of the tensor instead of circular padding",
    "BitShift": "divide by a power of two and round down instead of shifting bits",
    "DFT": "multiply by the matrix of the transform, or compute it in preprocessing outside of the network",
    "STFT": "compute spectrograms in preprocessing outside of the network",
    "Loop": "use nn.Embedding and a mean over the tokens instead of nn.EmbeddingBag, or unroll the loop",
    "Scan": "use nn.Embedding and a mean over the tokens instead of nn.EmbeddingBag, or unroll the loop",
}


def try_engine(
    export: OnnxExport,
    network: Network,
    engine: str,
    samples: Mapping[str, np.ndarray],
    rms: Mapping[str, float] | None = None,
    layout: Layout | None = None,
) -> None:
    """Load a file in an engine, and compare a few samples with PyTorch, unless it is quantized: there, a rounding may spread.

    Args:
        export: the file, which was proven equal to PyTorch node by node.
        network: the module, see :class:`~lightning_accel.verification.network.ModuleNetwork`.
        engine: name of an engine that runs ONNX files.
        samples: inputs, each ``(S, ...)``.
        rms: noise of the file's nodes, see :class:`~lightning_accel.verification.nodes.NodeCheck`.
        layout: how samples become the inputs of a call; ``None``: they are.

    Raises:
        RunError: it can't load or run the file; the message names the operator, if there is one that it can't load alone.
        VerificationError: it computes something else; the message names the operator.
        MissingPackageError: the engine isn't installed.
    """
    count, form = len(next(iter(samples.values()))), layout or Layout.of_samples(samples)
    try:
        with load_runner(export.path, engine) as runner:
            check = verify(
                form.adapt(network),
                form.adapt(runner.run),
                samples,
                batch_sizes=(1, count),
                tolerance=FLOAT,
                check_agreement=False,
                axes=export.axes,
            )
    except MissingPackageError:
        raise
    except Exception as error:  # engines raise a dozen unrelated types
        found = _first_operator(export, engine, samples, form, compare=False)
        reason = found or f"{engine} can't run it: {' '.join(str(error).split())[:600]}"
        raise RunError(_sentence("engines that run this network", engine, reason, found)) from error
    if check.passed or (export.trained and not check.broken):
        return
    if found := _first_operator(export, engine, samples, form):
        raise VerificationError(_sentence("engines that compute this network", engine, found, found))
    own = NullDivergence(export.path, samples, rms or {}, network, layout=form).noise(FLOAT)
    limit = max(_GROSS, PEAK * max(null.median_error for null in own.values()))
    if check.broken or not check.median_error <= limit:
        reason = f"No operator differs by itself; of the outputs, {'; '.join(check.failures[:3])}."
        raise VerificationError(_sentence("engines that compute this network", engine, reason, ""))


def _sentence(rule: str, engine: str, reason: str, operator: str) -> str:
    ways = [way for kind, way in _WAYS_OUT.items() if f"{kind} `" in operator]
    way = f"Leave {engine} out, or {ways[0] if ways else 'replace what it names'}."
    return f"Argument `engines` must name {rule}, but got {engine!r}. {reason.rstrip('.')}. {way}"


def _first_operator(
    export: OnnxExport, engine: str, samples: Mapping[str, np.ndarray], layout: Layout, *, compare: bool = True
) -> str:
    """The first operator that the engine can't run alone or computes otherwise, in one sentence; empty if there is none."""
    model = onnx.load(export.path)
    feeds = layout.first(samples, _MANY)
    named, whole = {name: feeds[name] for name in export.input_names}, () if layout.plain else export.input_names
    reference = record_program(export.program, named, [value.name for value in model.graph.output], whole)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    segments = list(cut_segments(model, reference.values, constants))

    def execute(part: onnx.ModelProto, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "part.onnx"
            onnx.save(part, file, save_as_external_data=part.ByteSize() > 2**30)
            with load_runner(file, engine) as runner:
                return list(runner.run({name: feeds[name] for name in runner.input_names}).values())

    shapes = _shapes(model, reference)
    for segment, got, failure in run_segments(model, segments, constants, reference.values, execute, shapes):
        says = f"{engine} can't run it: {failure}" if got is None else ""
        if got is not None and compare:
            says = _difference(reference, segment, got, engine)
        if says:
            sentence = node_sentence(segment, reference.origin.get(segment.output, ""), constants, says)
            return sentence.replace("First diverging node", "First operator").replace("fed the reference's inputs ", "")
    return ""


def _difference(reference: Reference, segment: Segment, got: np.ndarray, engine: str) -> str:
    """By how much an operator differs; empty if by no more than float32 and approximations allow."""
    want = reference.values[segment.output]
    if want.shape != got.shape:
        return f"{engine} gives the shape {got.shape} instead of {want.shape}"
    if not np.issubdtype(want.dtype, np.floating):
        differ = float((want != got).mean()) if want.size else 0.0
        several = len(segment.nodes) > 1 and want.dtype != bool  # a rounding on the edge may go either way
        wrong = differ > 0.0 and not (several and np.abs(want.astype(np.float64) - got.astype(np.float64)).max() <= 1.0)
        return f"{engine} computes another value for {differ:.1%} of its elements" if wrong else ""
    a, b = want.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    finite = a[np.isfinite(a)]
    size = max(float(np.ptp(finite)) if finite.size else 0.0, 1e-3 * float(np.abs(finite).max(initial=0.0)), 1e-30)
    share = float(np.where(np.isfinite(off), off, np.inf).max(initial=0.0)) / size
    return f"{engine} is off by {share:.1e} of its range" if share > OPERATOR else ""


def _shapes(model: onnx.ModelProto, reference: Reference) -> dict[str, list[int | str | None]]:
    """Shapes as in the file: with a dynamic batch, engines choose other kernels, and can't load some operators."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    found: dict[str, list[int | str | None]] = {}
    for value in (*inferred.input, *inferred.value_info, *inferred.output):
        kind = value.type.tensor_type
        array = reference.values.get(value.name)
        if array is not None and kind.HasField("shape") and len(kind.shape.dim) == array.ndim:
            found[value.name] = [
                d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim
            ]
    return found
