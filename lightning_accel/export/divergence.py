"""Divergence: the first node of a file that doesn't compute what PyTorch computes on the same inputs.

Each node is fed the reference's values, so an error is seen where it is made and not where it has grown.
"""

from collections.abc import Mapping
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
_FLIP = 1.01  # integers: one step either way is a rounding on the edge


def first_divergence(path: str | Path, program: ExportedProgram, feeds: Mapping[str, np.ndarray]) -> str:
    """Name the first node that differs from the program it was exported from.

    Args:
        path: the ONNX file.
        program: from :func:`~lightning_accel.export.onnx.export_onnx`.
        feeds: inputs by the file's names, in the order of the program's inputs.

    Returns:
        One sentence with the node, its operator, its error and the module it came from; it also says when no node
        differs by itself.
    """
    model = onnx.load(path)
    values, origin = _reference_values(program, feeds)
    values.update(feeds)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    known = {name for name in values if name in producer or name in feeds}
    for node in model.graph.node:
        for name in node.output:
            if name not in known or name in feeds:
                continue
            nodes = _segment(model, name, known - {name}, producer, constants)
            if nodes is None:
                continue
            got = _run(model, nodes, name, known - {name}, constants, values)
            error, differs = _differs(values[name], got)
            if differs:
                path = " -> ".join(f"{n.op_type} `{n.name}`" for n in nodes)
                weights = [f"`{i}`" for n in nodes for i in n.input if i in constants]
                return (
                    f"First diverging node: {path}{f' (of {origin[name]})' if origin.get(name) else ''}"
                    f"{f', which reads {weights[0]}' if weights else ''}: fed the reference's inputs it is off by {error:.2e} of its range."
                )
    return (
        "No node differs by itself when fed the reference's inputs: what differs lies in how the engine runs the file."
    )


def _reference_values(
    program: ExportedProgram, feeds: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Every tensor of the program, and the module each comes from, by name."""
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
    session = ort.InferenceSession(segment.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return session.run([output], {name: values[name] for name in inputs})[0]


def _differs(want: np.ndarray, got: np.ndarray) -> tuple[float, bool]:
    if want.shape != got.shape:
        return float("inf"), True
    a, b = want.astype(np.float64), got.astype(np.float64)
    error = float(np.abs(np.where(a == b, 0.0, a - b)).max(initial=0.0))
    span = max(float(a.max(initial=0.0) - a.min(initial=0.0)), 1e-30)
    if np.issubdtype(want.dtype, np.integer):
        return error / span, error > _FLIP
    return error / span, not error / span <= _LIMIT
