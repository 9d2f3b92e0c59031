"""Copies of a module for trial runs, with their outputs and costs."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from lightning_accel.calls.batches import Call
from lightning_accel.calls.containers import is_record, items_of, map_items
from lightning_accel.calls.contexts import isolated_random, kept_buffers, mode, own_forwards
from lightning_accel.errors import InvalidArgumentError

_SAMPLES = 2  # enough to see that samples stay apart


def copy_of(module: nn.Module, convert: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    """Copy a module with converted tensors; the original's are never held twice.

    Args:
        module: any module; quantization of its ``forward`` is left out.
        convert: from a parameter or buffer to the copy's, which must not share memory with it.

    Returns:
        The copy in eval mode; its floating-point parameters have gradients.
    """
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        data = convert(parameter.detach())
        memo[id(parameter)] = nn.Parameter(data, requires_grad=data.is_floating_point())
    for buffer in module.buffers():
        memo[id(buffer)] = convert(buffer.detach())
    with own_forwards(module):
        copy = deepcopy(module, memo)
    for part in copy.modules():
        part.training = False
    return copy


def few_samples(call: Call, module: nn.Module) -> Call:
    """A call with the first samples of its batch; the batch is the first dimension of the first tensor.

    Where first dimensions differ one tensor may point into another, as the edges of a graph do: such a call stays whole. So does one that
    the module doesn't run on when it is shorter: its batch is fixed, or another dimension.

    Args:
        call: arguments of ``forward``.
        module: in any state; its ``forward`` is run.
    """
    result = _slice(call, slice(_SAMPLES))
    if all(a is b or a.shape == b.shape for a, b in zip(_tensors(result), _tensors(call), strict=True)):
        return call
    try:  # on a copy: hooks of old parametrizations leave tensors in the module that can't be copied any more
        with torch.no_grad():
            _run(copy_of(module, lambda t: t.detach().clone()), result, training=False)
    except Exception:  # whatever a forward raises on other shapes
        return call
    return result


def split_samples(call: Call, module: nn.Module, size: int) -> list[Call]:
    """Split a call into shorter ones, where :func:`few_samples` can shorten it.

    Args:
        call: arguments of ``forward``.
        module: in any state; its ``forward`` is run.
        size: largest number of samples of each part.
    """
    count = sample_count(call)
    if count <= size or few_samples(call, module) is call:
        return [call]
    return [_slice(call, slice(at, at + size)) for at in range(0, count, size)]


def _slice(call: Call, samples: slice) -> Call:
    """Some samples of a call; the call itself where first dimensions differ."""
    sizes = {t.shape[0] for t in _tensors(call) if t.ndim}
    return call if len(sizes) != 1 else _map(call, lambda tensor: tensor[samples] if tensor.ndim else tensor)


def sample_count(call: Call) -> int:
    """Samples in a call."""
    return next((t.shape[0] for t in _tensors(call) if t.ndim), 1)


def converted(call: Call, convert: Callable[[torch.Tensor], torch.Tensor]) -> Call:
    """Replace the tensors of a call."""
    result: Call = _map(call, convert)
    return result


def outputs_of(module: nn.Module, call: Call, training: bool = False) -> list[torch.Tensor]:
    """The floating-point tensors that a module returns, always with the same random numbers.

    Gradients are enabled: without them some layers use a fused path that can't be traced.

    Args:
        module: in train mode its buffers keep their values.
        call: arguments of its ``forward``.
        training: whether it is in train mode, else in eval mode; dropout is off in both.

    Raises:
        InvalidArgumentError: the module returns none.
    """
    with torch.enable_grad(), _other_buffers(module) if training else nullcontext():
        result = _run(module, call, training)
    found = [t for t in _tensors(result) if t.is_floating_point()]
    if not found:
        raise InvalidArgumentError(
            f"Method `forward` must return tensors for channels to be removed, but got a {type(result).__name__}."
        )
    return found


class _WithoutDropout(TorchFunctionMode):
    """Inside the block dropout passes everything on: with fewer channels it would draw others."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, name = kwargs or {}, getattr(func, "__name__", "")
        if "dropout" in name:
            return args[0] if args else kwargs["input"]
        if name == "scaled_dot_product_attention":
            if len(args) > 4:
                args = (*args[:4], 0.0, *args[5:])
            else:
                kwargs = {**kwargs, "dropout_p": 0.0}
        return func(*args, **kwargs)


@contextmanager
def _other_buffers(module: nn.Module) -> Iterator[None]:
    """Copies take the place of all buffers inside the block; unlike what is restored in place, they stay right for gradients."""
    before = {part: dict(part._buffers) for part in module.modules()}
    copies = {id(b): b.clone() for kept in before.values() for b in kept.values() if b is not None}
    try:
        for part, kept in before.items():
            part._buffers.update({name: None if b is None else copies[id(b)] for name, b in kept.items()})
        yield
    finally:
        for part, kept in before.items():
            part._buffers.update(kept)


def layers_run(module: nn.Module, call: Call, training: bool) -> set[str]:
    """Names of the submodules with parameters of their own that a forward runs in that mode; buffers keep their values."""
    run: set[str] = set()
    handles = [
        part.register_forward_pre_hook(lambda *_, name=name: run.add(name))
        for name, part in module.named_modules()
        if any(True for _ in part.parameters(recurse=False))
    ]
    try:
        with kept_buffers(module), torch.no_grad():
            _run(module, call, training)
    finally:
        for handle in handles:
            handle.remove()
    return run


def _run(module: nn.Module, call: Call, training: bool) -> Any:
    """Call a module in a mode, in its own precision and always with the same random numbers."""
    dtype = torch.get_default_dtype()
    parameter = next((p for p in module.parameters() if p.is_floating_point()), None)
    try:
        with isolated_random(), mode(module, training), torch.inference_mode(False), _WithoutDropout():
            torch.manual_seed(0)
            torch.set_default_dtype(dtype if parameter is None else parameter.dtype)
            return module(*call[0], **call[1])
    finally:
        torch.set_default_dtype(dtype)


def count_macs(module: nn.Module, call: Call) -> int:
    """Count the multiply-accumulates of one sample in matrix products and convolutions while they run.

    Half of what ``torch.utils.flop_counter`` counts. Attention is counted as the two matrix products that it is.

    Args:
        module: in any state; its ``forward`` is run.
        call: how its ``forward`` is called.
    """
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        outputs_of(module, call)
    result: int = counter.get_total_flops() // 2 // sample_count(call)
    return result


def skeleton(module: nn.Module, path: str, call: Call) -> tuple[nn.Module, Call]:
    """Copy a module for cheap MAC counts: on the meta device, or with data where ``forward`` depends on values.

    Args:
        module: to copy.
        path: of the submodule that will be run.
        call: how that is called.
    """
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.get_default_dtype())
    # What was seen before the Trainer cast the module ("bf16-true") is of another precision than the module is now.
    call = converted(
        few_samples(call, module.get_submodule(path)), lambda t: t.to(dtype) if t.is_floating_point() else t
    )
    with suppress(Exception):  # whatever a forward raises on tensors without data, the other copy is the answer
        empty = copy_of(module, lambda t: torch.empty_like(t, device="meta"))
        shapes = converted(call, lambda t: t.to("meta"))
        outputs_of(empty.get_submodule(path), shapes)
        return empty, shapes
    return copy_of(module, lambda t: t.to("cpu", copy=True)), converted(call, lambda t: t.to("cpu"))


def parameter_count(module: nn.Module) -> int:
    """Number of entries of all parameters; tied ones count once."""
    return sum(p.numel() for p in module.parameters())


def _map(value: Any, function: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    return function(value) if isinstance(value, torch.Tensor) else map_items(value, lambda item: _map(item, function))


def _tensors(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in _tensors(v)]
    if isinstance(value, list | tuple):
        return [t for v in value for t in _tensors(v)]
    return _tensors(items_of(value)) if is_record(value) else []
