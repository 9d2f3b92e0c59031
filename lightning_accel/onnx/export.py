"""Export a module's ``forward`` in eval mode as one ONNX file, with the trained Q/DQ nodes."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from inspect import Signature, signature
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_accel.calls import names as call_names
from lightning_accel.calls.batches import Call, canonical_call
from lightning_accel.calls.containers import caches_in
from lightning_accel.calls.contexts import isolated_random, mode, own_forward, own_signature
from lightning_accel.calls.example import ExampleCall
from lightning_accel.calls.names import Axes
from lightning_accel.calls.shapes import (
    ResultShape,
    batch_axes,
    batch_elsewhere,
    dynamic_axes,
    plain_call,
)
from lightning_accel.calls.user_code import user_line
from lightning_accel.core.arguments import checked
from lightning_accel.core.finite import check_weights
from lightning_accel.core.patching import swapped, swapped_child
from lightning_accel.errors import CaptureError, InvalidArgumentError, LightningAccelError
from lightning_accel.onnx import file as onnx_file
from lightning_accel.onnx.pre_post import surrounded
from lightning_accel.onnx.refusals import check_deterministic, unwritable
from lightning_accel.onnx.translations.dynamic_linear import TRANSLATIONS
from lightning_accel.onnx.translations.rewrite import rewritten
from lightning_accel.onnx.used_inputs import keep_used_inputs
from lightning_accel.onnx.writing import written_quickly
from lightning_accel.quantization.graph.capture import fixed_batch, no_logs, taken_name
from lightning_accel.quantization.graph.convert import TrainedIntegers, convert
from lightning_accel.quantization.graph.fixed_sizes import exported_program
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantized_forwards

OPSET = 18  # the lowest that torch's exporter writes without conversion; carries per-channel Q/DQ and all our operators
NEWEST = 23  # the newest that it writes


Choose = Callable[
    [ResultShape], dict[int, str]
]  # of a result: positions of the tensors that are written, and their names


@dataclass(frozen=True)
class OnnxExport:
    """An exported file and what is needed to check it against the module.

    Args:
        path: the file.
        example: how the module is called.
        output_names: names of its outputs, in the order of the tensors in the result.
        program: the captured graph that was written; its node names are the file's tensor names.
        trained: integers of each quantized part, by module path; empty for a float export.
        result: how the result is nested.
        captured: the graph before the exporter took its operators apart; PyTorch runs it.
    """

    path: Path
    example: ExampleCall
    output_names: tuple[str, ...]
    program: ExportedProgram = field(repr=False)
    trained: dict[str, TrainedIntegers] = field(repr=False)
    result: ResultShape = field(repr=False)
    captured: ExportedProgram | None = field(default=None, repr=False)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the file's inputs, in the order of the tensors in the call."""
        return self.example.input_names

    @property
    def unused(self) -> tuple[str, ...]:
        """Names of tensors of the call that no output depends on: the file has no such inputs."""
        return self.example.unused or ()

    @property
    def axes(self) -> Axes:
        """Dynamic axes beyond the batch, ``{input: {axis: name}}``."""
        return self.example.axes


@checked()
def export_onnx(
    module: nn.Module,
    inputs: Any,
    path: str | Path,
    *,
    quantized: bool = True,
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
    outputs: Sequence[str] | Mapping[str, str] | None = None,
    dynamic: Axes | None = None,
    batch: str = "dynamic",
    batch_axis: Mapping[str, int | None] | None = None,
    preprocess: nn.Module | None = None,
    postprocess: nn.Module | None = None,
    metadata: Mapping[str, Any] | None = None,
    opset: int | None = None,
    largest: int = onnx_file.LARGEST,
) -> OnnxExport:
    """Write ``module.forward`` in eval mode as ONNX without running the file.

    :func:`lightning_accel.verification.exported.export_onnx` is the public function, with the same arguments, which also compares
    the file with PyTorch; an export of a bundle compares it on held-out data instead.

    Returns:
        The file's names and the program behind it.

    Raises:
        CaptureError: the module can't be captured, holds an operator that can't be written, or draws random numbers.
        InvalidArgumentError: names, axes or an opset that don't fit.
        InvalidArgumentTypeError: ``preprocess`` or ``postprocess`` is no module.
    """
    if opset is not None and opset not in range(OPSET, NEWEST + 1):
        raise InvalidArgumentError(f"Argument `opset` must be from {OPSET} to {NEWEST}, but got {opset!r}.")
    out = Path(path)
    if out.is_dir() or not out.parent.is_dir():
        raise InvalidArgumentError(f"Argument `path` must be a file in a folder that exists, but got {path}.")
    check_weights(module, "module")
    module = surrounded(module, preprocess, postprocess)
    example = (
        inputs
        if isinstance(inputs, ExampleCall)
        else ExampleCall.of(module, inputs, names=input_names, dynamic=dynamic, batch=batch, batch_axis=batch_axis)
    )
    parts = quantized_forwards(module) if quantized else {}
    opset = max([OPSET, *(part.target.opset for part in parts.values())]) if opset is None else opset
    if dynamic is None and not example.axes and "" in parts:
        captured = zip(example.tensor_names, dynamic_axes(parts[""].inputs), strict=True)
        example = example.with_axes(
            {name: of_input for name, of_input in captured if of_input}, batch_axes(parts[""].inputs)
        )
    _check_captured(example, parts)
    device = next((tensor.device for tensor in module.parameters()), torch.device("cpu"))
    trained: dict[str, TrainedIntegers] = {}
    with ExitStack() as stack:
        stack.enter_context(mode(module, False))
        stack.enter_context(isolated_random())
        stack.enter_context(torch.no_grad())
        choose = partial(_chosen, outputs)
        source = stack.enter_context(_shipped(module, quantized, trained, choose))
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # notes of the exporter to its own developers
        stack.enter_context(no_logs())
        call, shapes = stack.enter_context(example.traceable(source, device))
        results = stack.enter_context(_tensors_only(source, choose, others=outputs is not None))
        program = _captured(source, call, shapes, example)
        check_deterministic(program, module)
        first = example.unused is None
        example = _used(example, program)
        result, chosen, caches = results[-1]
        names_out = call_names.output_names(result, output_names if outputs is None else list(chosen.values()))
        written = _written(program, module, opset, list(example.input_names), names_out)
    if first and example.unused:
        rank_zero_info(
            f"export_onnx: no output depends on the inputs {list(example.unused)}; the file has only {list(example.input_names)}."
        )
    if first and caches:
        rank_zero_info(
            f"export_onnx: a {caches[0]} isn't an output of the file, which computes each call anew. To generate text, ship a CausalLM."
        )
    model = written.model_proto
    onnx_file.clean(model, example.axes, metadata or {}, example.batch_axes)
    onnx_file.write(model, Path(path), largest)
    apart = written.exported_program or program  # decomposed by the exporter: its names are the file's
    return OnnxExport(Path(path), example, tuple(names_out), apart, trained, result, program)


def _used(example: ExampleCall, program: ExportedProgram) -> ExampleCall:
    """Drop inputs that no output depends on from the program; an example that was captured before stays as it is."""
    known = example.unused
    keep = () if known is None else tuple(i for i, name in enumerate(example.tensor_names) if name not in known)
    unused = [example.tensor_names[place] for place in keep_used_inputs(program, keep)]
    if known is not None and set(known) != set(unused):
        needed = [name for name in known if name not in unused]
        raise InvalidArgumentError(
            f"Argument `inputs` must leave out tensors that no output depends on, but the outputs depend on {needed}."
        )
    return example.without(unused)


def _chosen(outputs: Sequence[str] | Mapping[str, str] | None, result: ResultShape) -> dict[int, str]:
    """Positions of the outputs that are written, and their names."""
    return call_names.chosen_outputs(call_names.output_names(result, None), outputs)


def _check_captured(example: ExampleCall, parts: Mapping[str, QuantizedForward]) -> None:
    """Check that the file has no dynamic axes that a quantized part was not captured with.

    Raises:
        InvalidArgumentError: it has.
    """
    axes = example.axes
    for path, forward in parts.items() if axes else ():
        captured = dynamic_axes(forward.inputs)
        whole = zip(example.tensor_names, captured, strict=True) if path == "" else ()
        if not any(captured) or any(not axes.get(name, {}).keys() <= known.keys() for name, known in whole):
            raise InvalidArgumentError(
                f"Argument `dynamic` must hold axes that the quantized `{path or 'forward'}` was captured with, but got "
                f"{ {name: dict(of_input) for name, of_input in axes.items()} }. Give `dynamic` to what quantizes, too."
            )


def _captured(source: nn.Module, call: Call, shapes: Any, example: ExampleCall) -> ExportedProgram:
    try:
        return exported_program(source, call, shapes)
    except Exception as error:  # torch.export documents no common base
        if isinstance(error, LightningAccelError):  # of this library's own code around `forward`
            raise
        first, where = (str(error).strip() or type(error).__name__).splitlines()[0], user_line(error, source)
        raise CaptureError(
            fixed_batch(error, f"`{type(source).__name__}.forward`{f' (at {where})' if where else ''}")
            or f"Argument `module` must be one that torch.export can capture, but got: {first}{f' (at {where})' if where else ''}."
            f"{batch_elsewhere(example.description)}"
        ) from error


def _written(program: ExportedProgram, module: nn.Module, opset: int, names_in: list[str], names_out: list[str]) -> Any:
    try:
        with written_quickly():
            written = torch.onnx.export(
                rewritten(program),
                dynamo=True,
                opset_version=opset,
                input_names=names_in,
                output_names=names_out,
                custom_translation_table=TRANSLATIONS,
                verbose=False,
            )
    except torch.onnx.OnnxExporterError as error:
        raise CaptureError(taken_name(_first_cause(error), module) or unwritable(error, program, module)) from error
    assert written is not None
    return written


def _first_cause(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


@contextmanager
def _shipped(
    module: nn.Module, quantized: bool, trained: dict[str, TrainedIntegers], choose: Choose
) -> Iterator[nn.Module]:
    """The module to trace: its converted graph, or the module with converted parts in its tree."""
    parts = quantized_forwards(module)
    with ExitStack() as stack:
        if not quantized or not parts:
            for path in parts:
                stack.enter_context(own_forward(module.get_submodule(path)))
            yield module
            return
        converted = {}
        for path, forward in parts.items():
            converted[path], trained[path] = convert(forward, None if path else choose)
        if "" in converted:
            yield converted[""]
            return
        for path, graph in converted.items():
            parent, _, key = path.rpartition(".")
            owner = module.get_submodule(parent)
            takes = partial(_canonical, graph.forward, own_signature(module.get_submodule(path)))
            stack.enter_context(swapped(graph, "forward", takes))
            stack.enter_context(swapped_child(owner, key, graph))
        yield module


def _canonical(forward: Callable[..., Any], own: Signature, *args: Any, **kwargs: Any) -> Any:
    """Call a captured graph, which takes its arguments in canonical form, as the module it stands for is called."""
    args, kwargs = plain_call(*canonical_call(own, args, kwargs))
    return forward(*args, **kwargs)


class _Result(NamedTuple):
    """What ``forward`` returned.

    Args:
        shape: of the result, with the chosen tensors.
        chosen: their positions and names.
        caches: classes of the caches in it, which aren't written.
    """

    shape: ResultShape
    chosen: dict[int, str]
    caches: Sequence[str] = ()


@contextmanager
def _tensors_only(module: nn.Module, choose: Choose, others: bool) -> Iterator[list[_Result]]:
    """``module.forward`` returns the chosen tensors alone, as ONNX does; yields what its results were."""
    if isinstance(
        module, GraphModule
    ):  # made by convert for this export; torch.export doesn't see an instance's forward
        yield [_Result(*_graph_tensors_only(module, choose))]
        return
    forward = module.forward
    results: list[_Result] = []

    def tensors(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, ...]:
        whole = forward(*args, **kwargs)
        shape, found = ResultShape.of(whole, others=others)
        chosen = choose(shape)
        results.append(_Result(shape.select(chosen), chosen, caches_in(whole)))
        return tuple(found[place] for place in chosen)

    tensors.__signature__ = signature(forward)  # type: ignore[attr-defined]
    with swapped(module, "forward", tensors):
        yield results


def _graph_tensors_only(graph_module: GraphModule, choose: Choose) -> tuple[ResultShape, dict[int, str]]:
    """The same for a captured graph, whose result is written in its output node."""
    output, codegen = graph_module.graph.output_node(), cast(Any, graph_module.graph._codegen)
    leaves, _ = pytree.tree_flatten(output.args[0])
    values = [leaf.meta.get("val") if isinstance(leaf, Node) else leaf for leaf in leaves]
    result, _ = ResultShape.of(pytree.tree_unflatten(values, codegen.pytree_info.out_spec))
    chosen = choose(result)
    found = [leaf for leaf in leaves if isinstance(leaf, Node)]
    tensors = tuple(found[place] for place in chosen)
    output.args = (tensors,)
    codegen.pytree_info = codegen.pytree_info._replace(out_spec=pytree.tree_structure(tensors))
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return result.select(chosen), chosen
