"""Divergence: each node of a file against PyTorch on the same inputs, and the first one that computes something else.

Each node is fed the reference's values, so an error is seen where it is made and not where it has grown.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import helper
from torch.export import ExportedProgram
from torch.fx import Interpreter, Node

from lightning_accel.extras import require
from lightning_accel.quantization.quantizer import module_of

_LIMIT = 1e-4  # of the node's output range: a single operator differs by a few units in the last place
_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
_FLIP = 1.01  # integers: one step either way is a rounding on the edge


@dataclass(frozen=True)
class NodeCheck:
    """What comparing the nodes of a file one by one gave.

    Args:
        nodes: nodes of the file that were compared, each fed the reference's values.
        of: nodes of the file.
        largest_error: largest error among them, as a share of the node's own output range.
        diverging: the first that differs or can't be run, and the module it came from, in one sentence; empty if none does.
    """

    nodes: int
    of: int
    largest_error: float
    diverging: str = ""


def check_nodes(path: str | Path, program: ExportedProgram, feeds: Mapping[str, np.ndarray]) -> NodeCheck:
    """Compare each node of a file with the program it was exported from.

    Nodes whose output the program doesn't have (the exporter writes some operators as several nodes) are run together
    with the next one whose output it has. What draws random numbers is left to the comparison of the outputs.

    Args:
        path: the ONNX file.
        program: from :func:`~lightning_accel.export.onnx.export_onnx`.
        feeds: inputs by the file's names, in the order of the program's inputs.
    """
    model = onnx.load(path)
    values, origin = _reference_values(program, feeds, [value.name for value in model.graph.output])
    values.update(feeds)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    known = {name for name in values if name in producer or name in feeds}
    seen: set[int] = set()
    largest = 0.0
    for node in model.graph.node:
        for name in node.output:
            if name not in known or name in feeds:
                continue
            nodes = _segment(model, name, known - {name}, producer, constants)
            if nodes is None or any(n.op_type in _RANDOM for n in nodes):
                continue
            seen |= {id(n) for n in nodes}
            try:
                error, differs = _differs(values[name], _run(model, nodes, name, known - {name}, constants, values))
                says = f"it is off by {error:.2e} of its range"
            except Exception as failure:  # ONNX Runtime's exceptions have no common class but this one
                error, differs, says = float("inf"), True, f"it can't be run: {str(failure).splitlines()[0]}"
            if differs:
                chain = " -> ".join(f"{n.op_type} `{n.name}`" for n in nodes)
                weights = [f"`{i}`" for n in nodes for i in n.input if i in constants]
                return NodeCheck(
                    len(seen),
                    len(model.graph.node),
                    error,
                    f"First diverging node: {chain}{f' (of {origin[name]})' if origin.get(name) else ''}"
                    f"{f', which reads {weights[0]}' if weights else ''}: fed the reference's inputs {says}.",
                )
            largest = max(largest, error)
    return NodeCheck(len(seen), len(model.graph.node), largest)


def _reference_values(
    program: ExportedProgram, feeds: Mapping[str, np.ndarray], outputs: list[str]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of the program, and the module each comes from, by name; outputs by the file's names too."""
    graph_module: Any = program.module()
    for node in list(graph_module.graph.nodes):
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    values: dict[str, np.ndarray] = {}
    origin: dict[str, str] = {}

    class Record(Interpreter):
        def run_node(self, n: Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor) and n.op == "call_function":
                values[n.name] = result.detach().cpu().numpy()
                origin[n.name] = f"module `{module_of(n)}`" if module_of(n) else ""
            return result

    with torch.no_grad():
        placeholders = [n for n in graph_module.graph.nodes if n.op == "placeholder"]
        tensors = iter([torch.from_numpy(np.array(array)) for array in feeds.values()])
        inputs = [
            next(tensors) if isinstance(n.meta.get("val"), torch.Tensor) else n.meta.get("val") for n in placeholders
        ]
        Record(graph_module).run(*inputs, enable_io_processing=False)
    ends = [n for n in torch.utils._pytree.tree_leaves(graph_module.graph.output_node().args) if isinstance(n, Node)]
    if len(ends) == len(outputs):
        for end, name in zip(ends, outputs, strict=True):
            if end.name in values:
                values.setdefault(name, values[end.name])
                origin.setdefault(name, origin[end.name])
    return values, origin


def _segment(
    model: onnx.ModelProto,
    output: str,
    known: set[str],
    producer: Mapping[str, onnx.NodeProto],
    constants: Mapping[str, onnx.TensorProto],
) -> list[onnx.NodeProto] | None:
    """The nodes between a tensor and the nearest ones whose reference values are known; mostly one."""
    nodes: list[onnx.NodeProto] = []
    open_names, done = [output], set()
    while open_names:
        name = open_names.pop()
        if not name or name in done or name in known or name in constants:
            continue
        done.add(name)
        if name not in producer:
            return None
        if not any(producer[name] is node for node in nodes):
            nodes.append(producer[name])
            open_names.extend(producer[name].input)
    order = {id(node): i for i, node in enumerate(model.graph.node)}
    return sorted(nodes, key=lambda node: order[id(node)])


def _run(
    model: onnx.ModelProto,
    nodes: list[onnx.NodeProto],
    output: str,
    known: set[str],
    constants: Mapping[str, onnx.TensorProto],
    values: Mapping[str, np.ndarray],
) -> np.ndarray:
    """Compute one tensor with a few nodes, fed the reference's values."""
    read = {name for node in nodes for name in node.input}
    inputs = sorted(read & known)
    graph = helper.make_graph(
        nodes,
        "segment",
        [
            helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(values[n].dtype), values[n].shape)
            for n in inputs
        ],
        [helper.make_tensor_value_info(output, helper.np_dtype_to_tensor_dtype(values[output].dtype), None)],
        [constants[name] for name in sorted(read & constants.keys())],
    )
    segment = helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, functions=model.functions
    )
    ort = require("onnxruntime", "cpu", "Verification")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1  # a pool of threads for each node costs more than the node
    session = ort.InferenceSession(segment.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([output], {name: values[name] for name in inputs})[0]


def _differs(want: np.ndarray, got: np.ndarray) -> tuple[float, bool]:
    if want.shape != got.shape:
        return float("inf"), True
    a, b = want.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        error = float(np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b)).max(initial=0.0))
    finite = a[np.isfinite(a)]  # masks hold infinities
    span = max(float(finite.max(initial=0.0) - finite.min(initial=0.0)), 1e-30)
    if np.issubdtype(want.dtype, np.integer):
        return error / span, error > _FLIP
    return error / span, not error / span <= _LIMIT
