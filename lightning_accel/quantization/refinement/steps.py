"""Refine a calibrated network step by step; a step that makes its results worse is undone."""

from collections.abc import Callable, Sequence

import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.calls.contexts import mode
from lightning_accel.calls.copies import sample_count
from lightning_accel.core.decibels import POOR, decibels
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.arithmetic.observers import Ranks
from lightning_accel.quantization.arithmetic.targets import finer_targets
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.quantization.refinement.bias_correction import correct_biases
from lightning_accel.quantization.refinement.noise import noise_of, results_of
from lightning_accel.quantization.refinement.rounding import refine_rounding
from lightning_accel.quantization.refinement.smoothing import smooth_inputs
from lightning_accel.quantization.refinement.training import train_integers

Step = Callable[[Sequence[QuantizedForward], nn.Module, Sequence[Call], Ranks | None], None]

EFFORTS: dict[str, tuple[tuple[str, Step], ...]] = {
    "low": (),
    "standard": (("smoothing", smooth_inputs), ("bias correction", correct_biases)),
    "high": (
        ("smoothing", smooth_inputs),
        ("second-order rounding", refine_rounding),
        ("bias correction", correct_biases),
    ),
    "trained": (("smoothing", smooth_inputs), ("bias correction", correct_biases), ("training", train_integers)),
}
_SAMPLES, _TRAINED_SAMPLES = 64, 1024  # that steps look at, and that training sees, rounded up to whole calls


def check_effort(effort: str) -> str:
    """Return ``effort`` if it is known and can be made here.

    Raises:
        InvalidArgumentError: it isn't, or can't.
    """
    if effort not in EFFORTS:
        raise InvalidArgumentError(f"Argument `effort` must be one of {sorted(EFFORTS)}, but got {effort!r}.")
    if effort == "trained" and torch.is_inference_mode_enabled():
        raise InvalidArgumentError(
            'Argument `effort` must not be "trained" inside of `torch.inference_mode()`, which has no gradients, but got it there. '
            "Call it outside."
        )
    return effort


def samples_for(effort: str) -> int:
    """Samples of calibration data that the steps of an effort look at, rounded up to whole calls."""
    return _TRAINED_SAMPLES if any(step is train_integers for _, step in EFFORTS[effort]) else _SAMPLES


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
        calls: arguments of calls, from training data; :func:`samples_for` says how many are enough.
        effort: ``"low"``, ``"standard"``, ``"high"`` or ``"trained"``.
        ranks: reductions over the ranks of a distributed run; each rank must make the same number of calls.
    """
    if not calls or not any(forward.bank.keys for forward in forwards):
        return
    few = _first(calls, _SAMPLES)
    with mode(caller, False):
        for forward in forwards:
            forward.bank.active = False
        wanted = results_of(caller, few)
        for forward in forwards:
            forward.bank.active = True
        noise = noise_of(results_of(caller, few), wanted, ranks)
        for name, step in EFFORTS[effort]:
            before = [forward.bank.refined_state() for forward in forwards]
            step(forwards, caller, calls if step is train_integers else few, ranks)
            then = noise_of(results_of(caller, few), wanted, ranks)
            if then > noise and step is not train_integers:  # that one has decided on samples that it hasn't seen
                for forward, state in zip(forwards, before, strict=True):
                    forward.bank.load_refined(state)
                rank_zero_info(f"Quantization: {name} would make the results worse, and is left out.")
                then = noise
            noise = then
    _tell(noise, forwards[0])


def _first(calls: Sequence[Call], samples: int) -> Sequence[Call]:
    """The first calls with that many samples, rounded up to whole calls."""
    count = 0
    for index, call in enumerate(calls):
        if count >= samples:
            return calls[:index]
        count += sample_count(call)
    return calls


def _tell(noise: float, forward: QuantizedForward) -> None:
    ratio = decibels(1.0, max(noise, 1e-30))
    text = f"results have a signal-to-noise ratio of {ratio:.1f} dB against the float network, on calibration data"
    if ratio >= POOR:
        rank_zero_info(f"Quantization for {forward.target.name}: {text}.")
        return
    ways = 'Try `effort="high"` or "trained", keep the operators that `sensitivity` ranks first in float with `exclude`, or train with'
    rank_zero_warn(
        f"Quantization for {forward.target.name} is coarse: {text}.{finer_targets(forward.target)} {ways} QuantizationAwareTraining."
    )
