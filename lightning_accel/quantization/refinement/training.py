"""Training after quantization: the float network teaches its own integers.

The integers of the weights and the biases are trained for a few steps, with the squared error against the float network's results as the
loss, as in quantization-aware training with the network as its own teacher (https://arxiv.org/abs/1911.12491): no labels, no loss and no
optimizer of the user's are needed. Ranges and batch norm stay as they are. Weights move in units of their own integers' steps and biases in
units of their results' (https://arxiv.org/abs/2006.10518 trains both, layer by layer), so that one rate means the same in every network.
Which rate is best depends on the network: each is tried for some steps, and samples that no step has seen decide, also on whether training
helps at all.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.calls.copies import sample_count, split_samples
from lightning_accel.calls.shapes import batch_axes
from lightning_accel.core.decibels import decibels
from lightning_accel.quantization.arithmetic.fake_quant import per_channel, quantize_weight, straight
from lightning_accel.quantization.arithmetic.observers import PLAIN, RangeBank, Ranks, SeenOperator
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.quantization.refinement.noise import Results, noise_of, powers_of, results_of
from lightning_accel.quantization.refinement.observed import observe_operators

STEPS = 80  # of the training
TRIAL_STEPS = 16  # of each rate that is tried
RATES = (0.001, 0.003, 0.01, 0.03)  # largest change of a weight in a step, in steps of its integers
BATCH = 32  # samples of a step
_Values = list[list[torch.Tensor]]  # of each weight: its steps, and the shifts of its operators
_HELD_OUT = 4  # every fourth batch decides
_BYTES = 2**29  # of the float network's results that are kept
_LOOKS = 5  # at the held-out samples during training, of which the best counts
_RESULT_STEPS = 128  # of 8 bits on either side of 0: what biases move by


@dataclass
class _Weight:
    """A weight that is trained.

    Args:
        bank: of its operators.
        names: of the operators that read it.
        limit: largest integer.
        steps: the weight in steps of its integers, with their fractions.
        kept: where the float weight isn't zero: pruned weights stay zero.
        shifts: what is added to the result of each of the operators ``(C,)``.
        units: of each of the shifts.
    """

    bank: RangeBank
    names: list[str]
    limit: int
    steps: torch.Tensor
    kept: torch.Tensor
    shifts: list[torch.Tensor]
    units: list[float]

    def place(self, trained: Sequence[torch.Tensor]) -> None:
        """Compute with trained values: the steps, and each shift in its unit."""
        steps, *shifts = trained
        integers = straight(steps, steps.detach().round().clamp(-self.limit, self.limit) * self.kept)
        for name, shift, unit in zip(self.names, shifts, self.units, strict=True):
            refined = self.bank.refined.get(name, PLAIN)
            self.bank.refined[name] = replace(refined, integers=integers, shift=shift * unit)

    def start(self) -> list[torch.Tensor]:
        """Values that :meth:`place` takes, as calibration left them."""
        found = [self.steps.clone(), *(s / u for s, u in zip(self.shifts, self.units, strict=True))]
        return [value.requires_grad_() for value in found]

    def settle(self) -> None:
        """Store the integers as such."""
        for name in self.names:
            refined = self.bank.refined[name]
            assert refined.integers is not None
            assert refined.shift is not None
            integers = refined.integers.detach().to(torch.int8)
            self.bank.refined[name] = replace(refined, integers=integers, shift=refined.shift.detach())


class _Found:
    """Operators with a weight, as a tap sees them."""

    def __init__(self) -> None:
        self.weights: dict[int, tuple[torch.Tensor, int, list[str]]] = {}
        self.results: dict[str, tuple[int, float]] = {}  # channels, and power of the result

    def seen(self, operator: SeenOperator) -> torch.Tensor:
        result = operator.result.detach()
        if result.numel():
            _, _, names = self.weights.setdefault(id(operator.weight), (operator.weight, operator.axis, []))
            if operator.name not in names:
                names.append(operator.name)
            power = float(result.float().square().mean())
            known = self.results.get(operator.name, (0, 0.0))[1]
            self.results[operator.name] = result.shape[operator.channel], max(known, power)
        return operator.result

    def trained(self, bank: RangeBank) -> Iterator[_Weight]:
        """The weights with their state in a bank."""
        for weight, axis, names in self.weights.values():
            refined = bank.refined.get(names[0], PLAIN)  # of one factor: they read one tensor
            weight = refined.scaled(weight.detach().float())
            integers, scale = quantize_weight(weight, axis, bank.target, refined.integers)
            exact = weight / per_channel(scale, weight.ndim, axis)
            steps = torch.maximum(torch.minimum(exact, integers + 0.49), integers - 0.49)  # rounds to the integers
            shifts = []
            for name in names:
                known = bank.refined.get(name, PLAIN).shift
                shifts.append(weight.new_zeros(self.results[name][0]) if known is None else known.float())
            units = [max(math.sqrt(self.results[name][1]) / _RESULT_STEPS, 1e-20) for name in names]
            yield _Weight(bank, names, bank.target.weight_max, steps, weight != 0, shifts, units)


@dataclass
class _Trainer:
    """Trains weights on calls.

    Args:
        caller: module that is called, in eval mode.
        weights: that are trained.
        calls: to train on.
        wanted: the float network's results of these calls.
        held_out: calls that decide.
        held_out_wanted: the float network's results of those.
        ranks: reductions over the ranks of a distributed run.
    """

    caller: nn.Module
    weights: Sequence[_Weight]
    calls: Sequence[Call]
    wanted: Results
    held_out: Sequence[Call]
    held_out_wanted: Results
    ranks: Ranks | None

    def place(self, values: _Values) -> None:
        """Compute with trained values."""
        for weight, own in zip(self.weights, values, strict=True):
            weight.place(own)

    def start(self) -> _Values:
        """The values before training."""
        return [weight.start() for weight in self.weights]

    def noise(self, values: _Values) -> float:
        """Noise of the results of the held-out calls."""
        with torch.no_grad():
            self.place(values)
            return noise_of(results_of(self.caller, self.held_out), self.held_out_wanted, self.ranks)

    def train(self, values: _Values, rate: float, steps: int, looks: int) -> tuple[float, _Values]:
        """Train values in place, with a rate that falls to zero.

        Returns:
            The smallest noise of the held-out calls, and the values with it.
        """
        leaves = [value for own in values for value in own]
        optimizer = torch.optim.Adam(leaves, lr=rate)
        powers = [power / len(self.calls) for power in powers_of(self.wanted)]
        best = math.inf, values
        order = torch.Generator().manual_seed(0)
        left: list[int] = []
        for step in range(steps):
            left = left or torch.randperm(len(self.calls), generator=order).tolist()
            index = left.pop()
            with torch.enable_grad():
                self.place(values)
                found = results_of(self.caller, [self.calls[index]])[0]
                pairs = zip(found, self.wanted[index], powers, strict=True)
                loss = torch.stack([(a - b).square().sum() / power for a, b, power in pairs]).mean()
                if not loss.requires_grad:
                    return best
                gradients = torch.autograd.grad(loss, leaves, allow_unused=True)
            for leaf, gradient in zip(leaves, self._averaged(leaves, gradients), strict=True):
                leaf.grad = gradient
            optimizer.param_groups[0]["lr"] = rate * (1 + math.cos(math.pi * step / steps)) / 2
            optimizer.step()
            if (step + 1) % (steps // looks) == 0:
                noise = self.noise(values)
                if noise < best[0]:
                    best = noise, [[value.detach().clone() for value in own] for own in values]
        return best

    def _averaged(self, leaves: Sequence[torch.Tensor], gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
        whole = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, gradients, strict=True)]
        if self.ranks is None:
            return whole
        mean = self.ranks.mean(torch.cat([g.flatten() for g in whole]))
        parts = mean.split([g.numel() for g in whole])
        return [part.view_as(g) for part, g in zip(parts, whole, strict=True)]


def train_integers(
    forwards: Sequence[QuantizedForward], caller: nn.Module, calls: Sequence[Call], ranks: Ranks | None = None
) -> None:
    """Train the integers of weights and the biases on the float network's results; left out where it doesn't help.

    Args:
        forwards: calibrated forwards that are in place and active.
        caller: module that is called, in eval mode.
        calls: arguments of each call; batches of training data.
        ranks: reductions over the ranks of a distributed run; each rank must make the same number of calls.
    """
    parts = _parts(forwards, caller, calls)
    if len(parts) < 2:
        rank_zero_info("Quantization: training is left out: it needs two batches, so that one can decide.")
        return
    wanted = _taught(forwards, caller, parts)
    parts = parts[: len(wanted)]
    taps = [_Found() for _ in forwards]
    observe_operators(forwards, taps, caller, parts[:1], quantized=True)
    weights = [weight for f, tap in zip(forwards, taps, strict=True) for weight in tap.trained(f.bank)]
    if not weights or not wanted[0] or not math.isfinite(sum(powers_of(wanted))):
        return
    seen = [index for index in range(len(parts)) if index % _HELD_OUT]
    trainer = _Trainer(
        caller,
        weights,
        [parts[i] for i in seen],
        [wanted[i] for i in seen],
        parts[::_HELD_OUT],
        wanted[::_HELD_OUT],
        ranks,
    )
    before = noise = trainer.noise(best := trainer.start())
    tried = {rate: trainer.train(trainer.start(), rate, TRIAL_STEPS, 1) for rate in RATES}
    rate = min(tried, key=lambda rate: tried[rate][0])
    for then, values in (tried[rate], trainer.train(trainer.start(), rate, STEPS, _LOOKS)):
        if then < noise:
            noise, best = then, values
    with torch.no_grad():
        trainer.place(best)
    for weight in weights:
        weight.settle()
    rank_zero_info(
        f"Quantization: trained {STEPS} steps with the float network as the teacher; the rate {rate:g} is the best of "
        f"{', '.join(f'{r:g}' for r in RATES)}. Signal-to-noise ratio on samples that it hasn't seen: {decibels(1, before):.1f} dB "
        f"before, {decibels(1, noise):.1f} dB after{'' if noise < before else ': it is left out'}."
    )


def _parts(forwards: Sequence[QuantizedForward], caller: nn.Module, calls: Sequence[Call]) -> list[Call]:
    """The calls, shorter where their batch is known to be the first dimension."""
    axes = {axis for forward in forwards for axis in batch_axes(forward.inputs)} - {None}
    if axes != {0}:
        return list(calls)
    size = max(1, min(BATCH, sum(sample_count(call) for call in calls) // (2 * _HELD_OUT)))
    return [part for call in calls for part in split_samples(call, caller, size)]


def _taught(forwards: Sequence[QuantizedForward], caller: nn.Module, parts: Sequence[Call]) -> Results:
    """The float network's results of the first calls, as many as there is memory for."""
    found: Results = []
    for forward in forwards:
        forward.bank.active = False
    try:
        for part in parts:
            found += results_of(caller, [part])
            if sum(t.nbytes for result in found for t in result) > _BYTES and len(found) > 1:
                break
    finally:
        for forward in forwards:
            forward.bank.active = True
    return found
