"""Capture: a module's ``forward`` as a graph that shares the module's parameter and buffer objects.

The module itself is left alone: the graph lies outside ``_modules`` and looks its tensors up in the module at each call,
so optimizers, EMA, checkpoints and device moves keep working on the module.
"""

import inspect
import logging
import sysconfig
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

from lightning_accel.inputs import canonical_call, mode, named_keywords, own_forward, own_signature
from lightning_accel.quantization.quantizer import is_view

_TENSOR = "tensor"


class CaptureError(RuntimeError):
    """A module's ``forward`` can't be captured as a graph."""


def describe_inputs(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Shapes and types of a call's inputs as plain values that fit into a checkpoint.

    Tensors whose first dimension equals that of the first tensor have a dynamic batch. Anything that isn't a tensor is
    kept as it is.

    Raises:
        ValueError: there is no tensor among the inputs.
    """
    tensors = [leaf for leaf in pytree.tree_leaves((args, dict(kwargs))) if isinstance(leaf, torch.Tensor)]
    if not tensors or tensors[0].ndim == 0:
        raise ValueError("Argument `inputs` must hold a tensor with a batch dimension, but got none.")
    batch = tensors[0].shape[0]

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            dynamic = value.ndim > 0 and value.shape[0] == batch
            return {_TENSOR: list(value.shape), "dtype": str(value.dtype).removeprefix("torch."), "batch": dynamic}
        if isinstance(value, Mapping):
            return {"mapping": [[key, plain(item)] for key, item in value.items()]}
        if isinstance(value, list | tuple):
            return {"sequence": [plain(item) for item in value], "tuple": isinstance(value, tuple)}
        return {"value": value}

    return {"args": [plain(value) for value in args], "kwargs": {key: plain(value) for key, value in kwargs.items()}}


def traced_batch(description: Mapping[str, Any]) -> int:
    """Batch to capture with: not 0 or 1, which torch.export treats as special, nor the size of something fixed."""
    fixed: set[int] = set()

    def look(entry: Any) -> None:
        if isinstance(entry, Mapping) and _TENSOR in entry:
            fixed.update(entry[_TENSOR][:1] if not entry["batch"] else [])
        elif isinstance(entry, Mapping):
            for item in entry.values():
                look(item)
        elif isinstance(entry, list | tuple):
            for item in entry:
                look(item)

    look(dict(description))
    return next(n for n in range(3, 10**6) if n not in fixed)


def example_inputs(description: Mapping[str, Any], device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Inputs of the described shapes and types, all zeros, with a batch of :func:`traced_batch`."""
    batch = traced_batch(description)

    def build(entry: Mapping[str, Any]) -> Any:
        if _TENSOR in entry:
            shape = [batch, *entry[_TENSOR][1:]] if entry["batch"] else entry[_TENSOR]
            return torch.zeros(shape, dtype=getattr(torch, entry["dtype"]), device=device)
        if "mapping" in entry:
            return {key: build(item) for key, item in entry["mapping"]}
        if "sequence" in entry:
            items = [build(item) for item in entry["sequence"]]
            return tuple(items) if entry["tuple"] else items
        return entry["value"]

    args = tuple(build(entry) for entry in description["args"])
    return args, {key: build(entry) for key, entry in description["kwargs"].items()}


def batch_shapes(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], size: int) -> Any:
    """``dynamic_shapes`` for ``torch.export``: the first dimension is the batch wherever it has the traced ``size``."""
    shapes = torch.export.ShapesCollection()
    batch = torch.export.Dim("batch")
    for leaf in pytree.tree_leaves((args, kwargs)):
        if isinstance(leaf, torch.Tensor) and leaf.ndim and leaf.shape[0] == size:
            shapes[leaf] = {0: batch}
    return shapes.dynamic_shapes(module, args, kwargs)


def capture(module: nn.Module, description: Mapping[str, Any], training: bool | None, path: str = "") -> GraphModule:
    """Capture ``module.forward`` in train or eval mode.

    Args:
        module: the module; neither its mode, its tensors nor the random generators change.
        description: inputs, from :func:`describe_inputs`.
        training: mode in which it is captured; ``None``: each submodule in the mode it is in.
        path: the module's name, for the error message.

    Returns:
        A graph of ``aten`` operators; its parameters and buffers are the module's own objects.

    Raises:
        CaptureError: ``torch.export`` can't; the message names the user's file and line, and a submodule for which it works.
    """
    try:
        return _export(module, description, training)
    except Exception as error:  # torch.export documents no common base
        raise CaptureError(_explain(module, description, training, path, error)) from error


@contextmanager
def no_logs() -> Iterator[None]:
    """Without the log lines that torch.export writes for its own developers; errors are raised all the same."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def _export(module: nn.Module, description: Mapping[str, Any], training: bool | None) -> GraphModule:
    tensor = next(iter(module.parameters()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    args, kwargs = example_inputs(description, device)
    keep = torch.get_rng_state()
    with (
        named_keywords(module, kwargs),
        nullcontext() if training is None else mode(module, training),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # notes of torch.export to its own developers, as are its logs
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), no_logs():
            try:
                shapes = batch_shapes(module, args, kwargs, traced_batch(description))
                program = torch.export.export(module, args, kwargs, dynamic_shapes=shapes)
                graph_module = program.module()
            finally:
                torch.set_rng_state(keep)
    for node in list(graph_module.graph.nodes):  # we check the inputs ourselves, in microseconds and in words
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    _out_of_place(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _out_of_place(graph_module: GraphModule) -> None:
    """``relu_`` becomes ``relu``: a fake-quant may keep the tensor that an operator in place would overwrite.

    In a captured graph every later reader reads the operator's own node, so values stay. Operators on inputs, parameters,
    buffers and views write into something that is seen elsewhere; they are left alone.
    """
    for node in graph_module.graph.nodes:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload) or not node.args:
            continue
        name, source = node.target._schema.name.split("::")[1], node.args[0]
        if (
            not name.endswith("_")
            or name.endswith("__")
            or not isinstance(source, Node)
            or source.op != "call_function"
        ):
            continue
        if is_view(source) or any(is_view(reader) for reader in source.users):
            continue
        twin = getattr(getattr(torch.ops.aten, name[:-1], None), node.target._overloadname, None)
        if twin is not None:
            node.target = twin


def _explain(
    module: nn.Module, description: Mapping[str, Any], training: bool | None, path: str, error: Exception
) -> str:
    what = f"submodule `{path}`" if path else f"`{type(module).__name__}.forward`"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    message = f"Argument `module` must be one that torch.export can capture, but got {what}: {reason}"
    if line := _user_line(error, module):
        message += f" (at {line})"
    works = _submodule_that_works(module, description, training)
    if works:
        name = f"{path}.{works}" if path else works
        return f'{message}. Its submodule `{name}` can be captured: use QuantizationAwareTraining(module="{name}").'
    return f"{message}. Keep data-dependent Python out of `forward`, or name a submodule with `module=`."


def _user_line(error: BaseException, module: nn.Module) -> str:
    """The innermost line of the traceback that lies in no installed package."""
    installed = sysconfig.get_paths()["purelib"]
    here = str(Path(__file__).parent)
    found = ""
    seen: BaseException | None = error
    while seen is not None:
        for frame in traceback.extract_tb(seen.__traceback__):
            file = frame.filename
            if not file.startswith((installed, here, "<", sysconfig.get_paths()["stdlib"])):
                found = f"{file}:{frame.lineno}"
        seen = seen.__cause__ or seen.__context__
    if found:
        return found
    source = inspect.getsourcefile(type(module))
    return f"{source}:{inspect.getsourcelines(type(module))[1]}" if source else ""


def _submodule_that_works(module: nn.Module, description: Mapping[str, Any], training: bool | None) -> str:
    """The largest submodule, at most two levels down, that can be captured with the inputs it gets; empty if none."""
    calls: dict[str, dict[str, Any]] = {}

    def watch(name: str) -> Callable[..., None]:
        def note(m: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            try:
                calls.setdefault(name, describe_inputs(*canonical_call(own_signature(m), args, kwargs)))
            except (TypeError, ValueError):
                return

        return note

    candidates = {
        name: m
        for name, m in module.named_modules()
        if name and name.count(".") < 2 and any(True for _ in m.parameters())
    }
    handles = [m.register_forward_pre_hook(watch(name), with_kwargs=True) for name, m in candidates.items()]
    tensor = next(module.parameters(), torch.zeros(()))
    args, kwargs = example_inputs(description, tensor.device)
    keep = torch.get_rng_state()
    try:
        with own_forward(module), mode(module, False), torch.no_grad():
            module(*args, **kwargs)
    except Exception:  # the forward fails on zeros: the submodules called before that are still candidates
        pass
    finally:
        torch.set_rng_state(keep)
        for handle in handles:
            handle.remove()
    for name in sorted(calls, key=lambda n: -sum(p.numel() for p in candidates[n].parameters()))[:6]:
        try:
            _export(candidates[name], calls[name], training)
        except Exception:  # this one can't be captured either
            continue
        return name
    return ""


class Bindings:
    """Keeps a captured graph's tensors those of the module, also after ``.to(device)`` has replaced buffer objects."""

    def __init__(self, graph_module: GraphModule, module: nn.Module) -> None:
        self._links: list[tuple[dict[str, Any], dict[str, Any], str]] = []
        for node in graph_module.graph.nodes:
            if node.op != "get_attr":
                continue
            prefix, _, key = node.target.rpartition(".")
            try:
                owner = module.get_submodule(prefix)
            except AttributeError:  # a constant that torch.export lifted: it belongs to the graph alone
                continue
            inner = graph_module.get_submodule(prefix)
            for theirs, ours in ((owner._parameters, inner._parameters), (owner._buffers, inner._buffers)):
                if key in theirs and key in ours:
                    self._links.append((theirs, ours, key))

    def sync(self) -> None:
        """Point the graph at the module's present tensors."""
        for theirs, ours, key in self._links:
            if ours[key] is not theirs[key]:
                ours[key] = theirs[key]


class InputGuard:
    """Holds calls against the inputs a graph was captured with: structure, shapes but for the batch, constants."""

    def __init__(self, inputs: Mapping[str, Any], what: str) -> None:
        self._what = what
        leaves, self._spec = pytree.tree_flatten(example_inputs(inputs, torch.device("meta")))
        batch = traced_batch(inputs)
        self._wanted = [
            (tuple(None if i == 0 and n == batch else n for i, n in enumerate(leaf.shape)), leaf.dtype)
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in leaves
        ]

    def check(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Check a call in canonical form.

        Raises:
            ValueError: it differs from what was captured.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        if spec != self._spec:
            raise ValueError(
                f"Inputs of the quantized `{self._what}` must have the structure they were captured with, {self._spec}, "
                f"but got {spec}. Pass `inputs=` so that it shows this call."
            )
        for leaf, want in zip(leaves, self._wanted, strict=True):
            if not isinstance(leaf, torch.Tensor):
                if leaf is not want and leaf != want:
                    raise ValueError(
                        f"A constant input of the quantized `{self._what}` must be {want!r}, as captured, but got {leaf!r}."
                    )
                continue
            shape, dtype = want
            if len(shape) != leaf.ndim or any(n is not None and n != m for n, m in zip(shape, leaf.shape, strict=True)):
                raise ValueError(
                    f"An input of the quantized `{self._what}` must have shape "
                    f"({', '.join('N' if n is None else str(n) for n in shape)}), as captured, but got {tuple(leaf.shape)}."
                )
            if leaf.dtype is not dtype and leaf.is_floating_point() != dtype.is_floating_point:
                raise ValueError(
                    f"An input of the quantized `{self._what}` must have dtype {dtype}, as captured, but got {leaf.dtype}."
                )
