"""Compare each node of a file with PyTorch on the same inputs, and find the first one that differs.

Each node is fed the reference's values, so that an error shows where it originates. How exact a node
must be isn't a fixed number: the error of PyTorch's own float32 result against float64 is measured, and the file's error may be
``FACTOR`` times as large, channel by channel. Integers, booleans, QuantizeLinear and DequantizeLinear must be equal.
"""

import math
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import numpy_helper
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node
from torch.utils import _pytree as pytree

from lightning_accel.onnx.file import reads
from lightning_accel.quantization.graph.plan import module_of
from lightning_accel.verification.segments import CHUNK, Segment, cut_segments, run_segments

FACTOR = 32.0  # kernels of one operator differ by a few units in the last place; on right files the largest ratio seen was 11
_EXACT = {"QuantizeLinear", "DequantizeLinear"}
# Approximated by polynomials, which are exact to the last places of the function's range and not of each small value.
_APPROXIMATED = {"Sigmoid", "Tanh", "Erf", "Softmax", "Exp", "Gelu", "Softplus", "Sin", "Cos", "LSTM", "GRU", "RNN"}
# Rounded like the values that they add up, which may cancel: on a grid of integers PyTorch's own sum may even be exact.
_SUMS = {"ReduceMean", "ReduceSum", "GlobalAveragePool", "AveragePool"}
_UNIT = 2.0**-24  # unit roundoff of float32
_FLIP = 1.01  # integers made by several nodes at once: one step either way is a rounding on the edge
_FEW, _MANY = 2, 8  # samples: of a network whose tensors take much memory, and of others


@dataclass(frozen=True)
class NodeCheck:
    """Result of comparing the nodes of a file one by one.

    Args:
        nodes: nodes of the file that were compared, each fed the reference's values.
        of: nodes of the file.
        largest_error: largest error among them, as a share of the node's own output range.
        diverging: the first that differs or can't be run, and the module it came from, in one sentence; empty if none does.
        largest_ratio: largest error of a channel, in multiples of PyTorch's own float32 error there.
        noise: root mean square of each floating-point tensor's error, by name.
    """

    nodes: int
    of: int
    largest_error: float
    diverging: str = ""
    largest_ratio: float = 0.0
    noise: dict[str, float] = field(default_factory=dict, repr=False)


def check_nodes(
    path: str | Path, program: ExportedProgram, feeds: Mapping[str, np.ndarray], constants: Collection[str] = ()
) -> NodeCheck:
    """Compare each node of a file with the program it was exported from.

    Nodes whose output isn't in the program (the exporter writes some operators as several nodes) are run together
    with the next one whose output is. Random operators are only compared end to end.

    Args:
        path: the ONNX file.
        program: from :func:`~lightning_accel.onnx.export.export_onnx`.
        feeds: inputs by the file's names, in the order of the program's inputs; at most 8 samples of them are used.
        constants: inputs that have no batch and stay whole.
    """
    model = onnx.load(path)
    reference = record_program(program, feeds, [value.name for value in model.graph.output], constants)
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    if wrong := _wrong_constant(reference, stored):
        return NodeCheck(0, len(model.graph.node), float("inf"), wrong, float("inf"))
    segments = list(cut_segments(model, reference.values, stored))
    seen: set[int] = set()  # places of nodes
    largest, ratio, noise = 0.0, 0.0, dict[str, float]()
    for segment, got, failure in run_segments(model, segments, stored, reference.values):
        seen |= set(segment.places)
        if got is None:
            says, share = f"it can't be run: {failure}", float("inf")
        else:
            error, own = _errors(reference, segment, got)
            noise[segment.output], share = error.rms, error.share
            largest, ratio = max(largest, share), max(ratio, own)
            if own <= FACTOR:
                continue
            says = f"it is off by {share:.2e} of its range"
        sentence = node_sentence(segment, reference.origin.get(segment.output, ""), stored, says)
        return NodeCheck(len(seen), len(model.graph.node), share, sentence, float("inf"), noise)
    return NodeCheck(len(seen), len(model.graph.node), largest, "", ratio, noise)


def _wrong_constant(reference: "Reference", constants: Mapping[str, onnx.TensorProto]) -> str:
    """The first stored tensor that the exporter computed in advance and that isn't PyTorch's, in one sentence; empty if there is none.

    Its readers are fed PyTorch's value, so that no node shows it.
    """
    for name in sorted(constants.keys() & reference.nodes.keys()):
        want, stored = reference.values[name], numpy_helper.to_array(constants[name])
        same = want.shape == stored.shape and np.array_equal(want, stored)
        if not same and want.shape == stored.shape and np.issubdtype(want.dtype, np.floating):
            a, b = want.astype(np.float64), stored.astype(np.float64)
            # Not against `a`: what is left of a difference, as of `scale - 1`, is rounding alone.
            same = _ratio(reference.exact(name, set()), a, b, 0.0) <= FACTOR
        if not same:
            origin = f" (of {reference.origin[name]})" if reference.origin.get(name) else ""
            return f"First diverging node: the stored tensor `{name}`{origin} isn't the one that PyTorch computes."
    return ""


def node_sentence(segment: Segment, origin: str, constants: Mapping[str, onnx.TensorProto], says: str) -> str:
    """Which nodes differ, the module they come from, and by how much."""
    chain = " -> ".join(f"{node.op_type} `{node.name}`" for node in segment.nodes)
    weights = [f"`{name}`" for node in segment.nodes for name in node.input if name in constants]
    return (
        f"First diverging node: {chain}{f' (of {origin})' if origin else ''}"
        f"{f', which reads {weights[0]}' if weights else ''}: fed the reference's inputs {says}."
    )


class _Recorder(Interpreter):
    """Runs a program in PyTorch and keeps every tensor of it."""

    def __init__(self, graph_module: Any) -> None:
        super().__init__(graph_module, garbage_collect_values=False)

    def run_node(self, n: Node) -> Any:
        if n.target is torch.ops.quantized_decomposed.quantize_per_tensor.default:
            # PyTorch's own decomposition multiplies by 1 / scale; files, engines and fake-quant divide.
            (x, scale, zero_point, low, high, dtype), _ = self.fetch_args_kwargs_from_env(n)
            steps = torch.round(x / torch.tensor(scale, dtype=x.dtype)) + zero_point
            return steps.clamp(low, high).to(dtype)
        return super().run_node(n)


@dataclass
class Reference:
    """Every tensor of a program on a few samples.

    Args:
        values: by the file's names, inputs and outputs included.
        nodes: the program's node of each tensor that it computes.
        origin: the module that each comes from, in words.
        env: what the program computed, node by node.
    """

    values: dict[str, np.ndarray]
    nodes: dict[str, Node]
    origin: dict[str, str]
    env: dict[Node, Any]

    def exact(self, name: str, known: set[str]) -> np.ndarray:
        """A tensor in float64, computed from the recorded values of the tensors in ``known``; the recorded one if PyTorch can't."""
        done: dict[Node, Any] = {}

        def argument(node: Node) -> Any:
            return _double(self.env[node]) if node.name in known or node.op != "call_function" else computed(node)

        def computed(node: Node) -> Any:
            if node not in done:
                args, kwargs = torch.fx.node.map_arg((node.args, node.kwargs), argument)
                done[node] = node.target(*pytree.tree_map(_wide, args), **pytree.tree_map(_wide, kwargs))  # type: ignore[operator]
            return done[node]

        try:
            with torch.no_grad():
                result = computed(self.nodes[name])
        except Exception:  # operators without float64 kernels raise RuntimeError, NotImplementedError and others
            result = None
        recorded = self.values[name].astype(np.float64)
        same = isinstance(result, torch.Tensor) and result.dtype == torch.float64 and result.shape == recorded.shape
        return result.numpy() if same else recorded


def _double(value: Any) -> Any:
    def cast(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, torch.Tensor) and leaf.dtype == torch.float32 else leaf

    return pytree.tree_map(cast, value)


def _wide(argument: Any) -> Any:
    return torch.float64 if argument is torch.float32 else argument


def record_program(
    program: ExportedProgram, feeds: Mapping[str, np.ndarray], outputs: list[str], constants: Collection[str] = ()
) -> Reference:
    """Run the program on as many samples as fit into memory."""

    def first(count: int) -> dict[str, np.ndarray]:
        return {name: array if name in constants else array[:count] for name, array in feeds.items()}

    reference = _run_program(program, first(_FEW), outputs)
    bytes_each = sum(array.nbytes for array in reference.values.values()) / _FEW
    if bytes_each * _MANY > CHUNK or all(len(a) <= _FEW for name, a in feeds.items() if name not in constants):
        return reference
    return _run_program(program, first(_MANY), outputs)


def _run_program(program: ExportedProgram, feeds: Mapping[str, np.ndarray], outputs: list[str]) -> Reference:
    graph_module: Any = program.module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    recorder = _Recorder(graph_module)
    with torch.no_grad():
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        tensors = iter([torch.from_numpy(np.array(array)) for array in feeds.values()])
        inputs = [
            next(tensors) if isinstance(n.meta.get("val"), torch.Tensor) else n.meta.get("val") for n in placeholders
        ]
        recorder.run(*inputs, enable_io_processing=False)
    reference = Reference(dict(feeds), {}, {}, recorder.env)
    for node, value in recorder.env.items():
        # A file holds complex numbers as pairs, so such a tensor is no place to cut it.
        if isinstance(value, torch.Tensor) and node.op == "call_function" and not value.is_complex():
            reference.values[node.name] = value.detach().cpu().numpy()
            reference.nodes[node.name] = node
            reference.origin[node.name] = f"module `{module_of(node)}`" if module_of(node) else ""
    ends = [n for n in pytree.tree_leaves(graph_module.graph.output_node().args) if isinstance(n, Node)]
    for end, name in zip(ends, outputs, strict=False) if len(ends) == len(outputs) else ():
        if end.name in reference.nodes and name not in reference.values:
            reference.values[name], reference.nodes[name] = reference.values[end.name], end
            reference.origin[name] = reference.origin[end.name]
    return reference


@dataclass(frozen=True)
class _Error:
    share: float  # of the tensor's range
    rms: float


def _errors(reference: Reference, segment: Segment, got: np.ndarray) -> tuple[_Error, float]:
    """The error of a segment, and the largest of its channels in multiples of PyTorch's own."""
    want = reference.values[segment.output]
    if want.shape != got.shape:
        return _Error(float("inf"), float("inf")), float("inf")
    a, b = want.astype(np.float64), got.astype(np.float64)
    off = _difference(a, b)
    finite = a[np.isfinite(a)]  # masks hold infinities
    span = max(float(finite.max(initial=0.0) - finite.min(initial=0.0)), 1e-30)
    error = _Error(float(off.max(initial=0.0)) / span, math.sqrt(float(np.mean(off**2))) if off.size else 0.0)
    if not np.issubdtype(want.dtype, np.floating):
        allowed = 0.0 if len(segment.nodes) == 1 or want.dtype == bool else _FLIP
        return error, 0.0 if float(off.max(initial=0.0)) <= allowed else float("inf")
    if not off.any():
        return error, 0.0
    if segment.nodes[-1].op_type in _EXACT and len(segment.nodes) == 1:
        return error, float("inf")
    known = {name for node in segment.nodes for name in reads(node)} & reference.values.keys()
    exact = reference.exact(segment.output, known)
    largest = 0.0
    if any(node.op_type in _APPROXIMATED for node in segment.nodes):
        largest = float(np.abs(finite).max(initial=0.0))
    if any(node.op_type in _SUMS for node in segment.nodes):
        read = [reference.values[name] for name in known if np.issubdtype(reference.values[name].dtype, np.floating)]
        largest = max([largest, *(float(np.abs(x[np.isfinite(x)]).max(initial=0.0)) for x in read)])
    return error, _ratio(exact, a, b, largest)


def _ratio(exact: np.ndarray, torch_result: np.ndarray, file_result: np.ndarray, largest: float) -> float:
    """Largest error of the file among all channels, in multiples of PyTorch's own, or of the last place of ``largest``."""
    # Where float32 overflows, PyTorch's result is what is right: its distance from float64 would excuse anything.
    exact = np.where(np.isfinite(exact) & np.isfinite(torch_result), exact, torch_result)
    own, theirs, size = _difference(exact, torch_result), _difference(exact, file_result), np.abs(exact)
    size = np.where(np.isfinite(size), size, 0.0)
    worst = 0.0
    for axis in {1, exact.ndim - 1} if exact.ndim > 1 else {None}:
        others = tuple(i for i in range(exact.ndim) if i != axis) if axis is not None else None
        mine, file, large = (x.max(axis=others, initial=0.0) for x in (own, theirs, size))
        # A channel of a few values may be exact by chance: then what PyTorch is off in most channels counts, too.
        usual = float(np.quantile(mine / np.maximum(large, 1e-300), 0.9)) if np.size(mine) > 1 else 0.0
        floor = np.maximum.reduce(
            [np.asarray(mine), usual * large, _UNIT * large, np.full_like(large, max(_UNIT * largest, 1e-37))]
        )
        worst = max(worst, float(np.nan_to_num(np.max(file / floor), nan=np.inf)))
    return worst


def _difference(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    with np.errstate(invalid="ignore"):
        off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    return np.where(np.isnan(off), np.inf, off)
