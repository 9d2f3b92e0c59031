"""ONNX: a module's ``forward`` in eval mode as one file, with the Q/DQ nodes that were trained."""

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from inspect import signature
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_accel import __version__
from lightning_accel.call_shapes import ResultShape, batch_shapes, describe_inputs, example_inputs, traced_batch
from lightning_accel.inputs import (
    Call,
    canonical_call,
    isolated_random,
    mode,
    named_keywords,
    own_forward,
    own_signature,
)
from lightning_accel.quantization.capture import CaptureError, no_logs
from lightning_accel.quantization.convert import TrainedIntegers, convert
from lightning_accel.quantization.prepare import quantized_forwards

OPSET = 18  # the lowest that torch's exporter writes without conversion; carries per-channel Q/DQ and all our operators


@dataclass(frozen=True)
class OnnxExport:
    """An exported file and what is needed to check it against the module.

    Args:
        path: the file.
        input_names: names of its inputs, in the order of the tensors in the call.
        output_names: names of its outputs, in the order of the tensors in the result.
        program: the captured graph that was written; its node names are the file's tensor names.
        trained: integers of each quantized part, by module path; empty for a float export.
        result: how the result is nested.
    """

    path: Path
    input_names: tuple[str, ...]
    output_names: tuple[str, ...]
    program: ExportedProgram = field(repr=False)
    trained: dict[str, TrainedIntegers] = field(repr=False)
    result: ResultShape = field(repr=False)


def export_onnx(
    module: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    quantized: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> OnnxExport:
    """Write ``module.forward`` in eval mode as ONNX, with a dynamic batch.

    A module that was trained quantization-aware is written with its integers and Q/DQ nodes. The file holds no paths of
    this machine: the same weights give the same bytes in any folder.

    Args:
        module: any module; mode, weights and random generators stay as they are.
        inputs: example of a call: a tensor, a tuple of positional or a dict of keyword arguments. Only shapes and types
            matter; the first dimension is the batch.
        path: file to write.
        quantized: ``False`` writes the float network under the fake-quants.
        input_names: default: the parameter names of ``forward`` and keys of dicts.
        output_names: default: ``"output"``, or the keys of the result.

    Returns:
        The file's names and the program behind it.

    Raises:
        CaptureError: the module can't be captured.
        ValueError: a number of names that doesn't fit.

    Example:
        >>> export = export_onnx(nn.Linear(4, 2), torch.zeros(1, 4), tmp_path / "linear.onnx")  # doctest: +SKIP
        >>> export.input_names  # doctest: +SKIP
        ('input',)
    """
    given: Call = inputs if _is_call(inputs) else _as_call(inputs)
    call = canonical_call(own_signature(module), *given)
    description = describe_inputs(*call)
    tensor = next(module.parameters(), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    args, kwargs = example_inputs(description, device)
    trained: dict[str, TrainedIntegers] = {}
    with ExitStack() as stack:
        stack.enter_context(mode(module, False))
        stack.enter_context(isolated_random())
        stack.enter_context(torch.no_grad())
        source = stack.enter_context(_shipped(module, quantized, trained))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # notes of the exporter to its own developers
        stack.enter_context(no_logs())
        if source is module:
            stack.enter_context(named_keywords(module, kwargs))
        shapes = batch_shapes(source, args, kwargs, traced_batch(description))
        results = stack.enter_context(_tensors_only(source))
        try:
            program = torch.export.export(source, args, kwargs, dynamic_shapes=shapes)
        except Exception as error:  # torch.export documents no common base
            if str(error).startswith("Method `forward` must"):
                raise
            raise CaptureError(
                f"Argument `module` must be one that torch.export can capture, but got: {error}"
            ) from error
        names_in = list(input_names or _input_names(module, call))
        result = results[-1]
        names_out = _output_names(result, output_names)
        try:
            written = torch.onnx.export(
                program, dynamo=True, opset_version=OPSET, input_names=names_in, output_names=names_out, verbose=False
            )
        except torch.onnx.OnnxExporterError as error:
            cause: BaseException = error
            while cause.__cause__ is not None:
                cause = cause.__cause__
            reason = str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
            raise CaptureError(
                f"Argument `module` must be one that torch.onnx can write, but got {type(module).__name__}: {reason}."
            ) from error
    assert written is not None
    model = written.model_proto
    _clean(model)
    onnx.checker.check_model(model, full_check=True)
    _write(model, Path(path))
    return OnnxExport(Path(path), tuple(names_in), tuple(names_out), program, trained, result)


def _is_call(inputs: Any) -> bool:
    """Whether ``inputs`` already is ``(args, kwargs)``."""
    return (
        isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict)
    )


def _as_call(inputs: Any) -> Call:
    if isinstance(inputs, tuple):
        return inputs, {}
    return ((), dict(inputs)) if isinstance(inputs, dict) else ((inputs,), {})


@contextmanager
def _shipped(module: nn.Module, quantized: bool, trained: dict[str, TrainedIntegers]) -> Iterator[nn.Module]:
    """What is to be traced: the converted graph of the module, or the module with converted parts in its tree."""
    parts = quantized_forwards(module)
    with ExitStack() as stack:
        if not quantized or not parts:
            for path in parts:
                stack.enter_context(own_forward(module.get_submodule(path)))
            yield module
            return
        converted = {}
        for path, forward in parts.items():
            converted[path], trained[path] = convert(forward)
        if "" in converted:
            yield converted[""]
            return
        for path, graph in converted.items():
            parent, _, key = path.rpartition(".")
            owner = module.get_submodule(parent)
            stack.callback(owner._modules.__setitem__, key, owner._modules[key])
            owner._modules[key] = graph
        yield module


def _input_names(module: nn.Module, call: Call) -> list[str]:
    bound = own_signature(module).bind(*call[0], **call[1])
    leaves = pytree.tree_flatten_with_path(dict(bound.arguments))[0]
    return _names([path for path, leaf in leaves if isinstance(leaf, torch.Tensor)], "input")


@contextmanager
def _tensors_only(module: nn.Module) -> Iterator[list[ResultShape]]:
    """``module.forward`` returns its tensors alone, as ONNX does; yields the shapes that its results had."""
    if isinstance(
        module, GraphModule
    ):  # made by convert for this export; torch.export doesn't see an instance's forward
        yield [_graph_tensors_only(module)]
        return
    forward, taken = module.forward, module.__dict__.get("forward")
    shapes: list[ResultShape] = []

    def tensors(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        shape, found = ResultShape.of(forward(*args, **kwargs))
        shapes.append(shape)
        return tuple(found)

    tensors.__signature__ = signature(forward)  # type: ignore[attr-defined]
    module.__dict__["forward"] = tensors
    try:
        yield shapes
    finally:
        del module.__dict__["forward"]
        if taken is not None:
            module.__dict__["forward"] = taken


def _graph_tensors_only(graph_module: GraphModule) -> ResultShape:
    """The same for a captured graph, whose result is written in its output node."""
    output, codegen = graph_module.graph.output_node(), cast(Any, graph_module.graph._codegen)
    leaves, _ = pytree.tree_flatten(output.args[0])
    values = [leaf.meta.get("val") if isinstance(leaf, Node) else leaf for leaf in leaves]
    result, _ = ResultShape.of(pytree.tree_unflatten(values, codegen.pytree_info.out_spec))
    tensors = tuple(leaf for leaf in leaves if isinstance(leaf, Node))
    output.args = (tensors,)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(tensors))
    graph_module.recompile()
    return result


def _output_names(result: ResultShape, given: Sequence[str] | None) -> list[str]:
    names = _names(result.paths(), "output")
    if given is not None and len(given) != len(names):
        raise ValueError(f"Argument `output_names` must hold {len(names)} names, but got {len(given)}: {list(given)}.")
    return list(given or names)


def _names(paths: list[Any], default: str) -> list[str]:
    """Short names from paths in a nested structure: the last key, with its predecessors where that says too little."""
    keys = [[str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path] for path in paths]

    def text(parts: list[str], keep: int) -> str:
        joined = re.sub(r"\W+", "_", "_".join(parts[-keep:]))
        return f"{default}_{joined}" if joined.isdigit() else joined or default

    depth = [next((n for n in range(1, len(parts) + 1) if not parts[-n].isdigit()), len(parts) or 1) for parts in keys]
    while True:
        names = [text(parts, keep) for parts, keep in zip(keys, depth, strict=True)]
        twice = [i for i, name in enumerate(names) if names.count(name) > 1 and depth[i] < len(keys[i])]
        if not twice:
            return names if len(set(names)) == len(names) else [f"{default}_{i}" for i in range(len(paths))]
        for i in twice:
            depth[i] += 1


def _clean(model: onnx.ModelProto) -> None:
    """Drop stack traces and other notes with paths of this machine; say who wrote the file."""
    graphs = [model.graph, *model.functions]
    for holder in [model, *graphs]:
        holder.ClearField("metadata_props")
        holder.doc_string = ""
    for graph in graphs:
        for node in graph.node:
            node.ClearField("metadata_props")
            node.doc_string = ""
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output, *model.graph.initializer]:
        value.ClearField("metadata_props")
        value.doc_string = ""
    symbol = next((d.dim_param for i in model.graph.input for d in i.type.tensor_type.shape.dim[:1] if d.dim_param), "")
    for value in [*model.graph.value_info, *model.graph.input, *model.graph.output]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param == symbol:
                dim.dim_param = "batch"
    model.graph.name = "network"
    model.producer_name, model.producer_version = "lightning-accel", __version__


def _write(model: onnx.ModelProto, path: Path) -> None:
    """All or nothing: a crash leaves no half file."""
    if model.ByteSize() >= 2**31:
        raise ValueError("Argument `module` must give an ONNX file below 2 GB, but got a larger one.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(model.SerializeToString(deterministic=True))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def feeds_of(call: Call, names: Sequence[str]) -> dict[str, np.ndarray]:
    """A call's tensors as named arrays for an engine."""
    tensors = [leaf for leaf in pytree.tree_leaves(call) if isinstance(leaf, torch.Tensor)]
    return {name: tensor.detach().cpu().numpy() for name, tensor in zip(names, tensors, strict=True)}
