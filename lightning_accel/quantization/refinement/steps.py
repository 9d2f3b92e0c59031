"""Refine a calibrated network step by step; a step that makes its results worse is undone."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn
from torch.utils import _pytree as pytree

from lightning_accel.calls.batches import Call
from lightning_accel.calls.contexts import mode
from lightning_accel.core.decibels import POOR, decibels
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.observers import Ranks
from lightning_accel.quantization.arithmetic.targets import finer_targets
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.quantization.refinement.bias_correction import correct_biases
from lightning_accel.quantization.refinement.rounding import refine_rounding
from lightning_accel.quantization.refinement.smoothing import smooth_inputs

Step = Callable[[Sequence[QuantizedForward], nn.Module, Sequence[Call], Ranks | None], None]

EFFORTS: dict[str, tuple[tuple[str, Step], ...]] = {
    "low": (),
    "standard": (("smoothing", smooth_inputs), ("bias correction", correct_biases)),
    "high": (
        ("smoothing", smooth_inputs),
        ("second-order rounding", refine_rounding),
        ("bias correction", correct_biases),
    ),
}
SAMPLES = 64  # that steps look at, rounded up to whole calls


def check_effort(effort: str) -> str:
    """Return ``effort`` if it is known.

    Raises:
        InvalidArgumentError: it isn't.
    """
    if effort not in EFFORTS:
        raise InvalidArgumentError(f"Argument `effort` must be one of {sorted(EFFORTS)}, but got {effort!r}.")
    return effort


@torch.no_grad()
def refine_(
    forwards: Sequence[QuantizedForward],
    caller: nn.Module,
    calls: Sequence[Call],
    effort: str,
    ranks: Ranks | None = None,
) -> None:
    """Bring calibrated forwards nearer to the float network.

    Args:
        forwards: calibrated forwards that are in place and active.
        caller: module that is called.
        calls: arguments of calls, from training data; about :data:`SAMPLES` samples are enough.
        effort: ``"low"``, ``"standard"`` or ``"high"``.
        ranks: reductions over the ranks of a distributed run; each rank must make the same number of calls.
    """
    if not calls or not any(forward.bank.keys for forward in forwards):
        return
    with mode(caller, False):
        for forward in forwards:
            forward.bank.active = False
        wanted = _results(caller, calls)
        for forward in forwards:
            forward.bank.active = True
        noise = _noise(_results(caller, calls), wanted, ranks)
        for name, step in EFFORTS[effort]:
            before = [forward.bank.refined_state() for forward in forwards]
            step(forwards, caller, calls, ranks)
            then = _noise(_results(caller, calls), wanted, ranks)
            if then > noise:
                for forward, state in zip(forwards, before, strict=True):
                    forward.bank.load_refined(state)
                rank_zero_info(f"Quantization: {name} would make the results worse, and is left out.")
            noise = min(then, noise)
    _tell(noise, forwards[0])


def _results(caller: nn.Module, calls: Sequence[Call]) -> list[list[torch.Tensor]]:
    """Floating-point tensors of the result of each call."""
    return [[leaf for leaf in pytree.tree_leaves(caller(*args, **kwargs)) if _is_float(leaf)] for args, kwargs in calls]


def _is_float(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) and leaf.is_floating_point()


def _noise(found: list[list[torch.Tensor]], wanted: list[list[torch.Tensor]], ranks: Ranks | None) -> float:
    """Squared error of the results divided by their square, averaged over the tensors."""
    shares = []
    for index in range(len(wanted[0])):
        error = sum(float((a[index] - b[index]).square().sum()) for a, b in zip(found, wanted, strict=True))
        power = sum(float(b[index].square().sum()) for b in wanted)
        shares.append(error / max(power, 1e-30))
    mean = torch.tensor(sum(shares) / max(len(shares), 1))
    return float(mean if ranks is None else ranks.mean(mean))


def _tell(noise: float, forward: QuantizedForward) -> None:
    ratio = decibels(1.0, max(noise, 1e-30))
    text = f"results have a signal-to-noise ratio of {ratio:.1f} dB against the float network, on calibration data"
    if ratio >= POOR:
        rank_zero_info(f"Quantization for {forward.target.name}: {text}.")
        return
    ways = (
        'Try `effort="high"`, keep the operators that `sensitivity` ranks first in float with `exclude`, or train with'
    )
    rank_zero_warn(
        f"Quantization for {forward.target.name} is coarse: {text}.{finer_targets(forward.target)} {ways} QuantizationAwareTraining."
    )
