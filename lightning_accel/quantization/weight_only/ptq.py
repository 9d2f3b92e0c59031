"""Weight-only quantization without training: round to nearest, GPTQ, or AWQ."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from itertools import groupby
from typing import Any

import torch
from torch import nn

from lightning_accel.calls.batches import InputsFunction, call_from_batch
from lightning_accel.calls.contexts import mode
from lightning_accel.core import structure
from lightning_accel.core.effective_weight import EffectiveWeight
from lightning_accel.core.globs import as_patterns
from lightning_accel.core.patching import removed
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.awq import scale_and_clip_
from lightning_accel.quantization.weight_only.block_runs import BlockRuns, LatestInput
from lightning_accel.quantization.weight_only.gptq import gptq_weights
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import block_of, inputs_of, quantize_change, rows_of, select_layers
from lightning_accel.quantization.weight_only.targets import WeightOnlyTarget, weight_only_target

METHODS = ("rtn", "gptq", "awq")


def quantize_weights_(
    module: nn.Module,
    target: str | WeightOnlyTarget = "int4",
    *,
    group: int = 32,
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    method: str = "rtn",
    batches: Iterable[Any] | None = None,
    call: Callable[[Any], Any] | None = None,
) -> list[str]:
    """Quantize the weights of linear layers in place, without training.

    GPTQ and AWQ run block by block: a transformer block runs a few times for each batch, however many there are. A layer that reads
    nothing in the calibration, such as an expert that no token is sent to, is rounded to the nearest.

    Args:
        module: the network; it computes with the rounded weights afterwards.
        target: ``"int4"`` or ``"int8-weights"``.
        group: inputs that share a scale.
        include: globs of layers; ``None`` means all.
        exclude: globs of layers that stay float; ``"lm_head"`` also matches ``"model.lm_head"``.
        method: ``"rtn"`` (round to nearest), ``"gptq"`` (https://arxiv.org/abs/2210.17323) or ``"awq"`` (https://arxiv.org/abs/2306.00978,
            which also changes the weights of norms in front of the layers). The latter two need ``batches``.
        batches: calibration data, kept in memory; a few dozen sequences.
        call: runs the network on a batch; by default ``module(**batch)`` or ``module(batch)``.

    Returns:
        Names of the quantized layers.

    Raises:
        InvalidArgumentError: an argument is out of its range, see :func:`select_layers`; layers already quantized or with adapters.

    Example:
        >>> network = nn.Sequential(nn.Linear(64, 4, bias=False))
        >>> quantize_weights_(network)
        ['0']
    """
    if method not in METHODS:
        raise InvalidArgumentError(f"Argument `method` must be one of {METHODS}, but got {method!r}.")
    kept = list(batches or ())
    if (method != "rtn") != bool(kept):
        raise InvalidArgumentError(
            f'Argument `batches` must hold calibration data with `method="gptq"` or "awq", and be left out with "rtn", but got '
            f"{len(kept)} batches with {method!r}."
        )
    grid = GroupGrid(weight_only_target(target).bits, group)
    names, _ = select_layers(module, group, as_patterns("include", include), as_patterns("exclude", exclude))
    for name in names:
        layer = module.get_submodule(name)
        if isinstance(layer, EffectiveWeight) and (layer.rounding is not None or layer.adapters_by_name):
            raise InvalidArgumentError(
                f"Argument `module` must have float layers without adapters, but got `{name}`, which is quantized or adapted already."
            )
    if method != "rtn":
        with mode(module, False):
            (_gptq_ if method == "gptq" else scale_and_clip_)(module, names, grid, kept, call or _default_call(module))
    structure.apply(module, quantize_change(names, grid, f"quantize_weights_.{method}"))
    return names


def quantize_weights(
    module: nn.Module, batches: Sequence[Any], *, inputs: InputsFunction | None = None, **options: Any
) -> nn.Module:
    """A copy of a network with the weights of linear layers quantized.

    Args:
        module: the network; not changed.
        batches: calibration data as a loader yields it; may be empty for ``method="rtn"``, which doesn't use it.
        inputs: maps a batch to the arguments of ``forward``.
        options: further arguments of :func:`quantize_weights_`.
    """
    with removed(module, "_trainer"):  # a run isn't part of the network
        copy = deepcopy(module)

    def call(batch: Any) -> Any:
        args, kwargs = call_from_batch(copy, batch, inputs)
        return copy(*args, **kwargs)

    if options.get("method", METHODS[0]) != METHODS[0]:
        options |= {"batches": batches, "call": call}
    quantize_weights_(copy, **options)
    return copy


def _default_call(module: nn.Module) -> Callable[[Any], Any]:
    return lambda batch: module(**batch) if isinstance(batch, dict) else module(batch)


@torch.no_grad()
def _gptq_(
    module: nn.Module, names: list[str], grid: GroupGrid, batches: list[Any], call: Callable[[Any], Any]
) -> None:
    """Round block by block: each block's Hessians are of inputs that come through the blocks rounded before."""
    runs = BlockRuns(module, names, batches, call)
    for _, group in groupby(names, block_of):
        block = list(group)
        for readers, hessian in _hessians({name: module.get_submodule(name) for name in block}, runs):
            rows = [rows_of(module.get_submodule(name)) for name in readers]
            for weight, rounded in zip(rows, gptq_weights(rows, hessian, grid), strict=True):
                weight.copy_(rounded.to(weight.dtype))
        runs.finish(block)


def _hessians(
    layers: dict[str, nn.Module], runs: BlockRuns, share: bool = True
) -> list[tuple[list[str], torch.Tensor]]:
    """Sum of ``x xᵀ`` over all inputs of each layer, with the names of the layers that read the same ones."""
    sums: dict[str, torch.Tensor] = {}
    calls = Counter[str]()
    # How often a layer read the tensor that another had read just before.
    leaders = {name: Counter[str]() for name in layers}
    latest = LatestInput[str]()

    def watch(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            leader = latest.get(args[0]) if share else None
            leaders[name][leader or name] += 1
            if leader is None:
                x = args[0].detach().float().reshape(-1, args[0].shape[-1])
                before = sums.get(name, x.new_zeros(x.shape[-1], x.shape[-1]))
                sums[name] = before.to(x.device).addmm_(x.t(), x)
                calls[name] += 1
                latest.put(args[0], name)

        return add

    hooks = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        runs.through(layers)
    finally:
        for hook in hooks:
            hook.remove()
    if any(len(found) > 1 or any(calls[leader] != n for leader, n in found.items()) for found in leaders.values()):
        return _hessians(layers, runs, share=False)  # they don't always read the same
    readers: dict[str, list[str]] = {}
    for name, found in leaders.items():
        readers.setdefault(next(iter(found), name), []).append(name)
    return [(group, _or_zero(sums.get(leader), layers[leader])) for leader, group in readers.items()]


def _or_zero(hessian: torch.Tensor | None, layer: nn.Module) -> torch.Tensor:
    """The Hessian of a layer that reads nothing, such as an expert that no token is sent to, is zero."""
    inputs = inputs_of(layer)
    return rows_of(layer).new_zeros(inputs, inputs, dtype=torch.float32) if hessian is None else hessian
