"""Write ONNX files atomically, without local paths, and with large weights in a file beside them."""

import ast
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
from onnx.external_data_helper import convert_model_to_external_data, write_external_data_tensors

from lightning_accel import __version__
from lightning_accel.errors import CaptureError

LARGEST = 2**31 - 2**24  # protobuf refuses 2 GB; what isn't weights needs some of them
_SMALL = 1024  # bytes of a tensor that stays in the file, for shape inference reads it


def clean(
    model: onnx.ModelProto,
    axes: Mapping[str, Mapping[int, str]],
    metadata: Mapping[str, Any],
    batch: Mapping[str, int],
) -> None:
    """Drop stack traces and other notes with paths of this machine; name nodes after their modules, and the dynamic axes.

    Shapes of intermediate tensors are dropped too: every reader infers them, and in a small int8 file they take an eighth of the size.

    Args:
        model: changed in place.
        axes: names of dynamic axes beyond the batch, ``{input: {axis: name}}``.
        metadata: further notes; values that are no strings are written as JSON.
        batch: axis of each input that is the batch.
    """
    graphs = [model.graph, *model.functions]
    for holder in [model, *graphs]:
        holder.ClearField("metadata_props")
        holder.doc_string = ""
    for graph in graphs:
        for node in graph.node:
            if scope := _scope_of(node):  # engines name their layers after nodes
                node.name = f"{scope}/{node.name}"
            node.ClearField("metadata_props")
            node.doc_string = ""
    model.graph.ClearField("value_info")
    for value in [*model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.ClearField("metadata_props")
        value.doc_string = ""
    names: dict[str, str] = {}
    for value in model.graph.input:
        wanted = {**axes.get(value.name, {}), **({batch[value.name]: "batch"} if value.name in batch else {})}
        for axis, dim in enumerate(value.type.tensor_type.shape.dim):
            if dim.dim_param and axis in wanted:
                names.setdefault(dim.dim_param, wanted[axis])
    for value in [*model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = names[dim.dim_param]
    model.graph.name = "network"
    model.producer_name, model.producer_version = "lightning-accel", __version__
    for key in sorted(metadata):
        value = metadata[key]
        model.metadata_props.add(key=key, value=value if isinstance(value, str) else json.dumps(value, sort_keys=True))


def _scope_of(node: onnx.NodeProto) -> str:
    """Dotted path of the module that a node comes from, as torch's exporter noted it; empty for the network itself."""
    for entry in node.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = ast.literal_eval(entry.value)
            return str(scopes[-2]) if len(scopes) > 1 else ""
    return ""


def write(model: onnx.ModelProto, path: Path, largest: int = LARGEST) -> None:
    """Check a model and write it atomically.

    Args:
        model: left alone, unless its weights are written beside it.
        path: the file; weights go to ``<path>.data`` where the file would be larger than ``largest``.
        largest: most bytes of the file itself.
    """
    weights = sum(len(tensor.raw_data) for tensor in model.graph.initializer)
    beside = path.with_name(f"{path.name}.data")
    if weights < largest:
        _check(model)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            temporary.write_bytes(model.SerializeToString(deterministic=True))
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        beside.unlink(missing_ok=True)
        return
    folder = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    folder.mkdir()
    try:
        convert_model_to_external_data(model, location=beside.name, size_threshold=_SMALL, convert_attribute=False)
        write_external_data_tensors(model, str(folder))
        (folder / path.name).write_bytes(model.SerializeToString(deterministic=True))
        _check(str(folder / path.name))  # by path: it reads the weights too
        os.replace(folder / beside.name, beside)  # first: a file whose weights are missing is refused by every reader
        os.replace(folder / path.name, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(model: onnx.ModelProto | str) -> None:
    """Check that a file is valid and that its shapes fit together.

    Raises:
        CaptureError: they don't; the message names the node, which is called after its module.
    """
    try:
        onnx.checker.check_model(model, full_check=True)
    except (onnx.shape_inference.InferenceError, onnx.checker.ValidationError) as error:
        reason = " ".join(str(error).split())[:400]
        raise CaptureError(
            f"Argument `module` must be one that torch.onnx writes as a valid file, but got one whose file isn't: {reason}. Compute what "
            "the named node stands for in another way, and report it to PyTorch."
        ) from error


def reads(node: onnx.NodeProto) -> list[str]:
    """Tensors that a node reads, those of the graphs inside it included."""
    names = list(node.input)
    for attribute in node.attribute:
        for graph in [attribute.g] if attribute.HasField("g") else list(attribute.graphs):
            own = {name for inner in graph.node for name in inner.output} | {v.name for v in graph.input}
            own |= {tensor.name for tensor in graph.initializer}
            names += [name for inner in graph.node for name in reads(inner) if name not in own]
    return names
