"""Capture a module's ``forward`` as a graph that shares the module's parameters and buffers.

The module is not changed: the graph is stored outside of ``_modules`` and reads the module's tensors at each call, so that
optimizers, EMA, checkpoints and device moves work as before.
"""

import io
import logging
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, redirect_stderr
from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.fx import Graph, GraphModule, Node
from torch.nn.modules.batchnorm import _BatchNorm

from lightning_accel.calls.batches import canonical_call
from lightning_accel.calls.containers import registered_results
from lightning_accel.calls.contexts import kept_state, mode, named_keywords, own_forward, own_signature, unlogged
from lightning_accel.calls.shapes import (
    batch_axes,
    batch_elsewhere,
    batch_shapes,
    describe_inputs,
    dynamic_axes,
    example_inputs,
)
from lightning_accel.calls.user_code import user_line
from lightning_accel.core.patching import swapped
from lightning_accel.errors import CaptureError
from lightning_accel.quantization.graph.fixed_sizes import FixedSizeError, exported_program
from lightning_accel.quantization.graph.operators import is_view
from lightning_accel.quantization.graph.sites import marked_sites

CALLS = "calls"  # in a captured graph's `meta`: how often each function was called in each submodule
CACHES = "caches"  # and the classes of the caches that `forward` returns, and the graph doesn't


def capture(module: nn.Module, description: Mapping[str, Any], path: str = "") -> GraphModule:
    """Capture ``module.forward`` in eval mode.

    Args:
        module: the module; neither its mode, its tensors nor the random generators change.
        description: inputs, from :func:`describe_inputs`.
        path: the module's name, for the error message.

    Returns:
        A graph of ``aten`` operators; its parameters and buffers are the module's own objects.

    Raises:
        CaptureError: ``torch.export`` fails; the message names the user's file and line, and a submodule that can be captured.
    """
    try:
        return _export(module, description)
    except Exception as error:  # torch.export raises unrelated types
        raise CaptureError(_explain(module, description, path, error)) from error


@contextmanager
def one_rank(module: nn.Module) -> Iterator[None]:
    """Let the SyncBatchNorms of a module use this rank's batch only, which can be captured."""
    with ExitStack() as stack:
        for norm in (m for m in module.modules() if isinstance(m, nn.SyncBatchNorm)):
            stack.enter_context(swapped(norm, "forward", MethodType(_BatchNorm.forward, norm)))
        yield


@contextmanager
def no_logs() -> Iterator[None]:
    """Suppress torch.export's developer logs and the graphs that it prints when it fails; errors are still raised."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(before)


def _export(module: nn.Module, description: Mapping[str, Any]) -> GraphModule:
    tensor = next(iter(module.parameters()), None)
    device = torch.device("cpu") if tensor is None else tensor.device
    args, kwargs = example_inputs(description, device)
    keep = torch.get_rng_state()
    with (
        kept_state(module),
        unlogged(module),
        named_keywords(module, kwargs),
        registered_results(module) as caches,
        one_rank(module),
        mode(module, False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # developer notes of torch.export
        with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False), no_logs():
            try:
                shapes = batch_shapes(module, args, kwargs, batch_axes(description), dynamic_axes(description))
                with marked_sites(module) as counts:
                    program = exported_program(module, (args, kwargs), shapes)
                graph_module = program.module()
                graph_module.meta |= {CALLS: counts[-1], CACHES: caches}
            finally:
                torch.set_rng_state(keep)
    graph_module._forward_pre_hooks.clear()  # compare inputs with the example's structure, before `forward` could bind them
    for node in list(graph_module.graph.nodes):  # inputs are compared by InputGuard, with better messages
        if node.op == "call_module" and node.target == "_guards_fn":
            graph_module.graph.erase_node(node)
    _out_of_place(graph_module)
    graph_module.graph.eliminate_dead_code()
    graph_module.recompile()
    return graph_module


def _out_of_place(graph_module: GraphModule) -> None:
    """Replace in-place operators such as ``relu_``, since a fake-quantization may keep the tensor that they overwrite.

    Later readers in a captured graph read the operator's own node, so values don't change. Operators that write to inputs,
    parameters, buffers and views have effects elsewhere and are not replaced.
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


def _explain(module: nn.Module, description: Mapping[str, Any], path: str, error: Exception) -> str:
    what = f"submodule `{path}`" if path else f"`{type(module).__name__}.forward`"
    reason = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    where = f" (at {error.line})" if isinstance(error, FixedSizeError) else ""
    if fixed := re.findall(r"You marked .*?\.size\(\)\[(\d+)\] as dynamic but .* a constant \((\d+)\)", str(error)):
        return (
            f"Argument `dynamic` must name axes along which {what} computes the same at any size, but torch.export fixes "
            f"{', '.join(f'axis {axis} at {size}' for axis, size in fixed)}{where}: a size that the code compares or unrolls (LSTM and GRU "
            "unroll time). Leave it out and pad to one size."
        )
    line = user_line(error, module)
    at = f"{what} (at {line})" if line and not isinstance(error, FixedSizeError) else what  # which names its own
    if reason_known := taken_name(error, module) or fixed_batch(error, at) or unknown_result(error, at):
        return reason_known
    message = f"Argument `module` must be one that torch.export can capture, but got {what}: {reason}"
    if line:
        message += f" (at {line})"
    works = _submodule_that_works(module, description)
    if works:
        name = f"{path}.{works}" if path else works
        return f'{message}. Its submodule `{name}` can be captured: use QuantizationAwareTraining(module="{name}").'
    elsewhere = batch_elsewhere(description)
    return f"{message}. Keep data-dependent Python out of `forward`, or name a submodule with `module=`.{elsewhere}"


def taken_name(error: BaseException, module: nn.Module) -> str:
    """Explanation if a submodule's name is reserved by torch's captured graphs; otherwise empty."""
    missed = re.search(r"target (\w+)\.\S+ references nonexistent attribute", str(error))
    taken = set(dir(GraphModule(nn.Module(), Graph()))) - set(dir(nn.Module()))
    if missed is None or missed[1] not in taken:
        return ""
    return (
        f"Argument `module` must have no submodule named `{missed[1]}`, a name that graphs of torch.export use themselves, but got "
        f"`{type(module).__name__}.{missed[1]}`. Rename it."
    )


def fixed_batch(error: BaseException, what: str) -> str:
    """Explanation if the code fixes the batch size as a constant; otherwise empty."""
    where = f" at {error.line}" if isinstance(error, FixedSizeError) else ""
    if re.search(r"You marked batch as dynamic but your code specialized it to be a constant \(\d+\)", str(error)):
        return (
            f"Argument `module` must be one whose `forward` takes a batch of any size, but got {what}, whose code makes the size a constant"
            f"{where}. Take it as `x.shape[0]`: `len(x)`, `int(...)`, comparisons and loops over samples turn it into a number. For a "
            'network that takes one batch size only, pass batch="fixed" to `export_onnx` and `quantize`.'
        )
    if guard := re.search(r"Not all values of batch = .* satisfy the generated guard (.*)", str(error)):
        return (
            f"Argument `module` must be one whose `forward` takes a batch of any size, but got {what}, whose code takes another way for "
            f"some sizes{where or f' ({guard[1]})'}. Leave comparisons of the batch size out of `forward`."
        )
    return ""


def unknown_result(error: BaseException, what: str) -> str:
    """Explanation if the code returns an object that torch.export can't take apart; otherwise empty."""
    found = re.search(r"Found <class '([\w.]+)'> in output, which is not a known type", str(error))
    if found is None:
        return ""
    name = found[1].rpartition(".")[2]
    return (
        f"Method `forward` must return tensors and plain values, but {what} returns a {name}. Leave it out, or register it with "
        "`torch.utils._pytree.register_dataclass`."
    )


def _submodule_that_works(module: nn.Module, description: Mapping[str, Any]) -> str:
    """Largest submodule, at most two levels deep, that can be captured with its inputs; empty if there is none."""
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
    except Exception:  # the forward fails on zeros: submodules called before the failure are still candidates
        pass
    finally:
        torch.set_rng_state(keep)
        for handle in handles:
            handle.remove()
    for name in sorted(calls, key=lambda n: -sum(p.numel() for p in candidates[n].parameters()))[:6]:
        try:
            _export(candidates[name], calls[name])
        except Exception:  # can't be captured either
            continue
        return name
    return ""
