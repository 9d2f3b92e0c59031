"""Measure the cost of quantizing each operator alone, and select operators to keep in float."""

from collections.abc import Callable, Iterable, Mapping, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import InputsFunction, call_from_batch
from lightning_accel.calls.contexts import isolated_random
from lightning_accel.core.arguments import checked
from lightning_accel.core.effective_weight import set_rounding_
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.graph.prepare import quantized_forwards
from lightning_accel.quantization.ptq import calibration_call, on_device_of, quantize
from lightning_accel.quantization.weight_only.layers import rounded_layers
from lightning_accel.quantization.weight_only.ptq import quantize_weights
from lightning_accel.quantization.weight_only.targets import is_weight_only

OutputLoss = Callable[[Any, Any], torch.Tensor]
Results = Callable[[Set[str]], list[Any]]  # of the network with only these operators quantized


@dataclass(frozen=True)
class Sensitivity:
    """Cost of quantizing each operator alone.

    Args:
        costs: cost by operator, in descending order.
        total: cost of quantizing all operators.
        what: description of the cost.
    """

    costs: Mapping[str, float]
    total: float
    what: str

    def keep_float(self, budget: float) -> list[str]:
        """Operators to keep in float (pass them as ``exclude``) so that the costs of the others add up to at most ``budget``.

        Costs of single operators are only approximately additive: measure the resulting network.

        Raises:
            InvalidArgumentError: a negative budget.
        """
        if not budget >= 0:
            raise InvalidArgumentError(f"Argument `budget` must be at least 0, but got {budget}.")
        left, kept = sum(max(cost, 0.0) for cost in self.costs.values()), []
        for name, cost in self.costs.items():
            if left <= budget:
                break
            kept.append(name)
            left -= max(cost, 0.0)
        return kept

    def __str__(self) -> str:
        width = max((len(name) for name in self.costs), default=0)
        lines = [f"{name:<{width}}  {cost:.3e}" for name, cost in self.costs.items()]
        return "\n".join([f"{self.what}, operator by operator:", *lines, f"{'all':<{width}}  {self.total:.3e}"])


@checked()
def sensitivity(
    model: nn.Module,
    data: Iterable[Any],
    *,
    loss: OutputLoss | None = None,
    calibration_batches: int = 8,
    inputs: InputsFunction | None = None,
    **options: Any,
) -> Sensitivity:
    """Rank the operators of a model by the cost of quantizing each of them alone.

    Args:
        model: a trained module; not changed.
        data: training batches as the loader yields them; used for calibration and for the cost.
        loss: ``(result, batch) -> scalar``: the cost is the increase of its mean; ``None``: noise-to-signal ratio of the results, i.e.
            their mean squared difference from the float network's results divided by the variance of those.
        calibration_batches: largest number of batches to read.
        inputs: maps a batch to the arguments of ``forward``.
        options: further arguments of :func:`~lightning_accel.quantization.ptq.quantize_`; of
            :func:`~lightning_accel.quantization.weight_only.ptq.quantize_weights_` with ``target="int4"`` or ``"int8-weights"``.

    Raises:
        InvalidArgumentError: as those functions.

    Example:
        >>> network = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
        >>> sorted(sensitivity(network, [torch.randn(16, 4)], target="portable").costs)
        ['0', '2']
    """
    with isolated_random():
        kept = [batch for batch, _ in zip(data, range(calibration_batches), strict=False)]
    if is_weight_only(options.get("target")):
        names, results = _weights_alone(model, kept, inputs, options)
    else:
        names, results = _operators(model, kept, inputs, {"calibration_batches": calibration_batches, **options})

    if loss is None:
        reference = _values(results(frozenset()))

        def cost(on: Set[str]) -> float:
            return float((_values(results(on)) - reference).square().mean() / reference.var())
    else:

        def mean_loss(on: Set[str]) -> float:
            return sum(float(loss(r, batch)) for r, batch in zip(results(on), kept, strict=True)) / len(kept)

        base = mean_loss(frozenset())

        def cost(on: Set[str]) -> float:
            return mean_loss(on) - base

    costs = {name: cost({name}) for name in names}
    ranked = dict(sorted(costs.items(), key=lambda item: -item[1]))
    what = "noise-to-signal ratio of the results" if loss is None else "growth of the loss"
    return Sensitivity(ranked, cost(set(names)), what)


def _operators(
    model: nn.Module, batches: list[Any], inputs: InputsFunction | None, options: dict[str, Any]
) -> tuple[list[str], Results]:
    options = {"effort": "low", **options}  # what further steps find belongs to the whole network
    copy = quantize(model, batches, inputs=inputs, **options)
    forwards = quantized_forwards(copy)
    before = {path: f"{path}." if path else "" for path in forwards}
    names = {f"{before[path]}{name}": (path, name) for path, f in forwards.items() for name in f.quantized}
    caller, _, inputs = calibration_call(copy, list(forwards), batches, inputs)
    calls = [call_from_batch(caller, on_device_of(batch, copy), inputs) for batch in batches]

    def results(on: Set[str]) -> list[Any]:
        for path, forward in forwards.items():
            forward.bank.off = frozenset(
                name for whole, (where, name) in names.items() if where == path and whole not in on
            )
        with torch.no_grad():
            return [caller(*args, **kwargs) for args, kwargs in calls]

    return list(names), results


def _weights_alone(
    model: nn.Module, batches: list[Any], inputs: InputsFunction | None, options: dict[str, Any]
) -> tuple[list[str], Results]:
    copy = quantize_weights(model, [], **options).eval()
    layers = rounded_layers(copy)
    grids = {name: layer.rounding for name, layer in layers.items()}
    calls = [call_from_batch(copy, on_device_of(batch, copy), inputs) for batch in batches]

    def results(on: Set[str]) -> list[Any]:
        for name, layer in layers.items():
            set_rounding_(layer, grids[name] if name in on else None)
        with torch.no_grad():
            return [copy(*args, **kwargs) for args, kwargs in calls]

    return list(layers), results


def _values(results: list[Any]) -> torch.Tensor:
    """All floating-point values of the results as one vector."""
    leaves = [v for v in pytree.tree_leaves(results) if isinstance(v, torch.Tensor) and v.is_floating_point()]
    return torch.cat([leaf.flatten().float() for leaf in leaves])
