"""Quantize without training until the user's own metric is within a budget: with more effort, then with fewer operators."""

from collections.abc import Callable, Iterable
from itertools import islice
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_accel.core.arguments import checked
from lightning_accel.core.globs import as_patterns
from lightning_accel.errors import InvalidArgumentError, RunError
from lightning_accel.quantization.ptq import quantize
from lightning_accel.quantization.sensitivity import sensitivity
from lightning_accel.quantization.weight_only.ptq import METHODS, quantize_weights
from lightning_accel.quantization.weight_only.targets import is_weight_only

_EFFORTS = ("standard", "high", "trained")


@checked()
def quantize_within(
    model: nn.Module,
    data: Iterable[Any],
    metric: Callable[[nn.Module], float],
    max_drop: float,
    *,
    higher_is_better: bool = True,
    calibration_batches: int = 32,
    **options: Any,
) -> nn.Module:
    """Return a quantized copy of a model whose metric is at most ``max_drop`` worse than the float model's.

    The effort is raised first; with ``target="int4"`` or ``"int8-weights"`` the methods of
    :func:`~lightning_accel.quantization.weight_only.ptq.quantize_weights_` are tried in turn. If that isn't enough, the operators that
    :func:`~lightning_accel.quantization.sensitivity.sensitivity` ranks first stay in float, as few of them as possible.

    Args:
        model: a trained model; not changed.
        data: batches of training data as the loader yields them.
        metric: measures a model in eval mode on held-out data; called with the float model and with each candidate.
        max_drop: largest loss of the metric, in its own unit.
        higher_is_better: whether a higher metric is better; ``False`` for a loss or an error.
        calibration_batches: largest number of batches that are read.
        options: further arguments of :func:`~lightning_accel.quantization.ptq.quantize_`, except ``effort``, or of ``quantize_weights_``,
            except ``method``.

    Returns:
        The first copy within the budget.

    Raises:
        InvalidArgumentError: a negative ``max_drop``.
        RunError: no copy with a quantized operator is within it.

    Example:
        >>> network, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(64, 4)
        >>> error = lambda candidate: float((candidate(x) - network(x)).square().mean().detach())
        >>> small = quantize_within(network, [x], error, max_drop=0.1, higher_is_better=False, target="portable")
        >>> error(small) < 0.1
        True
    """
    if not max_drop >= 0:
        raise InvalidArgumentError(f"Argument `max_drop` must be at least 0, but got {max_drop}.")
    weights = is_weight_only(options.get("target"))
    raised, ways = ("method", METHODS) if weights else ("effort", _EFFORTS)
    if raised in options:
        raise InvalidArgumentError(
            f"Argument `{raised}` must be left out, since it is raised as needed, but got {options[raised]!r}."
        )
    batches = list(islice(data, calibration_batches))
    settings = options if weights else {"calibration_batches": calibration_batches, **options}
    made: Callable[..., nn.Module] = quantize_weights if weights else quantize
    excluded = as_patterns("exclude", settings.pop("exclude", None))
    sign = 1.0 if higher_is_better else -1.0
    base = _measured(metric, model)

    def tried(way: str, kept: list[str]) -> tuple[nn.Module, float]:
        candidate = made(model, batches, exclude=[*excluded, *kept] or None, **{raised: way}, **settings)
        return candidate, sign * (base - _measured(metric, candidate))

    drops: dict[str, float] = {}
    for way in ways:
        candidate, drops[way] = tried(way, [])
        if drops[way] <= max_drop:
            return candidate
    best_way = min(drops, key=lambda way: drops[way])
    ranked = list(sensitivity(model, batches, exclude=list(excluded) or None, **settings).costs)
    enough, best = len(ranked), None  # operators that are kept in float, and the network
    few, count = 0, 1
    while count < len(ranked) and best is None:
        candidate, drop = tried(best_way, ranked[:count])
        if drop <= max_drop:
            enough, best = count, candidate
        else:
            few, count = count, 2 * count
    while best is not None and enough - few > 1:
        middle = (few + enough) // 2
        candidate, drop = tried(best_way, ranked[:middle])
        if drop <= max_drop:
            enough, best = middle, candidate
        else:
            few = middle
    if best is None:
        tries = " and ".join(f"{drop:.4g} with {raised} {way!r}" for way, drop in drops.items())
        raise RunError(
            f"A network with quantized operators must be within `max_drop` ({max_drop}), but the metric drops by {tries}, "
            f"and by more than that with up to {few} of {len(ranked)} operators in float. Allow more, or train with fake-quantization."
        )
    rank_zero_info(
        f"Quantization within {max_drop}: {enough} of {len(ranked)} operators stay in float: {ranked[:enough]}."
    )
    return best


def _measured(metric: Callable[[nn.Module], float], model: nn.Module) -> float:
    training = model.training
    try:
        with torch.no_grad():
            return float(metric(model.eval()))
    finally:
        model.train(training)
