"""Cut a file at every tensor that PyTorch has too, and run the parts, each fed the reference's values."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from lightning_accel.core.optional import require
from lightning_accel.onnx.file import reads

Execute = Callable[
    [onnx.ModelProto, list[str], dict[str, np.ndarray]], list[np.ndarray]
]  # a file, outputs, inputs -> values

_RANDOM = {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Bernoulli", "Multinomial"}
CHUNK = 2**28  # bytes of tensors that one session is fed and returns


@dataclass
class Segment:
    """A tensor that PyTorch has too, and the nodes that compute it from others of that kind; mostly one node.

    Args:
        output: name of the tensor.
        places: where the nodes stand in the file.
        nodes: the nodes, in the file's order.
    """

    output: str
    places: list[int]
    nodes: list[onnx.NodeProto]


def cut_segments(
    model: onnx.ModelProto, values: Mapping[str, np.ndarray], constants: Mapping[str, onnx.TensorProto]
) -> Iterator[Segment]:
    """The file cut at every tensor that PyTorch has too, in the order of its nodes."""
    nodes = list(model.graph.node)
    place = {name: index for index, node in enumerate(nodes) for name in node.output if name}
    inputs = {value.name for value in model.graph.input}
    for name in place:
        if name not in values or name in inputs:
            continue
        found: set[int] = set()
        waiting, complete = [name], True
        while waiting and complete:
            wanted = waiting.pop()
            if not wanted or wanted in constants or (wanted in values and wanted != name):
                continue
            complete = wanted in place
            if complete and place[wanted] not in found:
                found.add(place[wanted])
                waiting.extend(reads(nodes[place[wanted]]))
        segment = Segment(name, sorted(found), [nodes[index] for index in sorted(found)])
        if complete and not any(node.op_type in _RANDOM for node in segment.nodes):
            yield segment


def run_segments(
    model: onnx.ModelProto,
    segments: Sequence[Segment],
    constants: Mapping[str, onnx.TensorProto],
    values: Mapping[str, np.ndarray],
    execute: Execute | None = None,
    shapes: Mapping[str, Sequence[int | str | None]] | None = None,
) -> Iterator[tuple[Segment, np.ndarray | None, str]]:
    """Run the file's nodes, many in one session; ``None`` and the reason for those that fail.

    Args:
        model: the file.
        segments: its parts, from :func:`cut_segments`.
        constants: its stored tensors.
        values: the reference's tensors by the file's names.
        execute: runs a file; default: ONNX Runtime without optimizations.
        shapes: of the tensors that the parts read, where they aren't those of ``values``.
    """
    parts = _Parts(model, constants, values, execute or run_as_written, shapes or {})
    chunk: list[Segment] = []
    size = 0
    for index, segment in enumerate(segments):
        chunk.append(segment)
        size += 2 * values[segment.output].nbytes
        if size > CHUNK or index == len(segments) - 1:
            try:
                yield from [(s, array, "") for s, array in zip(chunk, parts.run(chunk), strict=True)]
            except Exception:  # engines' exceptions have no common class but this one
                yield from (parts.alone(s) for s in chunk)
            chunk, size = [], 0


def run_as_written(model: onnx.ModelProto, outputs: list[str], feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    """Run a file in ONNX Runtime without optimizations."""
    ort = require("onnxruntime", "runtime", "Verification")
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4  # a node that can't be run is reported once, by name
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # a session runs once
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    result: list[np.ndarray] = session.run(outputs, feeds)
    return result


@dataclass(frozen=True)
class _Parts:
    model: onnx.ModelProto
    constants: Mapping[str, onnx.TensorProto]
    values: Mapping[str, np.ndarray]
    execute: Execute
    shapes: Mapping[str, Sequence[int | str | None]]

    def alone(self, segment: Segment) -> tuple[Segment, np.ndarray | None, str]:
        try:
            return segment, self.run([segment])[0], ""
        except Exception as failure:  # engines' exceptions have no common class but this one
            return segment, None, " ".join(str(failure).split())[:300] or type(failure).__name__

    def run(self, segments: Sequence[Segment]) -> list[np.ndarray]:
        """Compute a few tensors, each from the reference's values: every known tensor is an input of its readers and also an output."""
        values, constants = self.values, self.constants
        ends = [segment.output for segment in segments]
        nodes: dict[int, onnx.NodeProto] = {}
        for segment in segments:
            for index, node in zip(segment.places, segment.nodes, strict=True):
                if index not in nodes:
                    nodes[index] = onnx.NodeProto()
                    nodes[index].CopyFrom(node)
                    for i, name in enumerate(node.output):
                        if name in values:  # even where it isn't asked for here, since its name is an input's
                            nodes[index].output[i] = f"{name}::file"
        read = {name for segment in segments for node in segment.nodes for name in reads(node)}
        inputs = sorted(read & values.keys())
        graph = helper.make_graph(
            [nodes[index] for index in sorted(nodes)],
            "nodes",
            [self._described(name, self.shapes.get(name, values[name].shape)) for name in inputs],
            [self._described(name, None, f"{name}::file") for name in ends],
            [constants[name] for name in sorted(read & constants.keys())],
        )
        cut = helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=self.model.functions,
        )
        return self.execute(cut, [f"{name}::file" for name in ends], {name: values[name] for name in inputs})

    def _described(self, name: str, shape: Sequence[int | str | None] | None, label: str = "") -> onnx.ValueInfoProto:
        kind = helper.np_dtype_to_tensor_dtype(self.values[name].dtype)
        return helper.make_tensor_value_info(label or name, kind, shape)
