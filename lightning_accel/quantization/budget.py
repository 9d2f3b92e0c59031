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

_EFFORTS = ("standard", "high")


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

    The effort is raised first. If that isn't enough, the operators that :func:`~lightning_accel.quantization.sensitivity.sensitivity` ranks
    first stay in float, as few of them as possible.

    Args:
        model: a trained model; not changed.
        data: batches of training data as the loader yields them.
        metric: measures a model in eval mode on held-out data; called with the float model and with each candidate.
        max_drop: largest loss of the metric, in its own unit.
        higher_is_better: whether a higher metric is better; ``False`` for a loss or an error.
        calibration_batches: largest number of batches that are read.
        options: further arguments of :func:`~lightning_accel.quantization.ptq.quantize_`, except ``effort``.

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
    if "effort" in options:
        raise InvalidArgumentError(
            f"Argument `effort` must be left out, since it is raised as needed, but got {options['effort']!r}."
        )
    batches = list(islice(data, calibration_batches))
    settings = {"calibration_batches": calibration_batches, **options}
    excluded = as_patterns("exclude", settings.pop("exclude", None))
    sign = 1.0 if higher_is_better else -1.0
    base = _measured(metric, model)

    def tried(effort: str, kept: list[str]) -> tuple[nn.Module, float]:
        candidate = quantize(model, batches, effort=effort, exclude=[*excluded, *kept] or None, **settings)
        return candidate, sign * (base - _measured(metric, candidate))

    drops: list[str] = []
    for effort in _EFFORTS:
        candidate, drop = tried(effort, [])
        if drop <= max_drop:
            return candidate
        drops.append(f"{drop:.4g} with effort {effort!r}")
    ranked = list(sensitivity(model, batches, exclude=list(excluded) or None, **settings).costs)
    enough, best = len(ranked), None  # operators that are kept in float, and the network
    few, count = 0, 1
    while count < len(ranked) and best is None:
        candidate, drop = tried(_EFFORTS[-1], ranked[:count])
        if drop <= max_drop:
            enough, best = count, candidate
        else:
            few, count = count, 2 * count
    while best is not None and enough - few > 1:
        middle = (few + enough) // 2
        candidate, drop = tried(_EFFORTS[-1], ranked[:middle])
        if drop <= max_drop:
            enough, best = middle, candidate
        else:
            few = middle
    if best is None:
        raise RunError(
            f"A network with quantized operators must be within `max_drop` ({max_drop}), but the metric drops by {' and '.join(drops)}, "
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
