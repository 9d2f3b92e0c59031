"""Smoothing: move outliers of single channels from the input of linear layers into their weights.

One range serves all channels of an input; a few large channels leave few steps to the others. As in SmoothQuant
(https://arxiv.org/abs/2211.10438, equation 4) each channel is divided by a factor, and the weights that read it are multiplied by it.
Factors are powers of two, so that the product is the same in float, bit for bit.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.quantization.arithmetic.fake_quant import activation_qparams, fake_quantize, quantize_weight
from lightning_accel.quantization.arithmetic.observers import PLAIN, RangeBank, Ranks, SeenOperator
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.quantization.refinement.observed import observe_operators

_STRENGTHS = (0.35, 0.5, 0.65, 0.8)  # share of the outliers that goes to the weights
_ROWS = 256  # input vectors of a call that are kept


class _Inputs:
    """Inputs of linear layers in float: some vectors, and the largest value of each channel."""

    def __init__(self, names: set[str]) -> None:
        self._names = names
        self.vectors: dict[str, list[torch.Tensor]] = {}
        self.largest: dict[str, torch.Tensor] = {}
        self.weights: dict[str, torch.Tensor] = {}
        self.readers: dict[int, set[str]] = {}  # of each weight

    def seen(self, operator: SeenOperator) -> torch.Tensor:
        self.readers.setdefault(id(operator.weight), set()).add(operator.name)
        if operator.name in self._names and operator.x.numel():
            flat = operator.x.detach().float().flatten(0, -2)
            self.vectors.setdefault(operator.name, []).append(flat[:: max(1, len(flat) // _ROWS) | 1])
            peak = flat.abs().amax(0)
            known = self.largest.get(operator.name, peak)
            self.largest[operator.name] = torch.maximum(known, peak)
            self.weights[operator.name] = operator.weight.detach().float()
        return operator.result


def smooth_inputs(
    forwards: Sequence[QuantizedForward], caller: nn.Module, calls: Sequence[Call], ranks: Ranks | None = None
) -> None:
    """Find factors for the input channels of linear layers, where they make the layers' results better.

    Args:
        forwards: calibrated forwards that are in place and active.
        caller: module that is called, in eval mode.
        calls: arguments of each call; batches of training data.
        ranks: reductions over the ranks of a distributed run.
    """
    rows = [dict(_rows_of_linear_layers(forward)) for forward in forwards]
    taps = [_Inputs({name for names in of.values() for name in names}) for of in rows]
    observe_operators(forwards, taps, caller, calls, quantized=False)
    for forward, tap, of in zip(forwards, taps, rows, strict=True):
        # A weight that also reads other tensors would need other integers there: it is stored once.
        shared = {name for readers in tap.readers.values() for name in readers if len(readers) > 1}
        for row, names in of.items():
            if all(name in tap.vectors and name not in shared for name in names):
                _smooth(forward.bank, row, names, tap, ranks)
        forward.bank.refresh()


def _rows_of_linear_layers(forward: QuantizedForward) -> Iterator[tuple[int, list[str]]]:
    """Each row of the bank that may be scaled and that only linear layers read, with the layers' names."""
    others: set[int] = set()
    readers: dict[int, list[str]] = {}
    for (_, function, _), action in forward.live.actions.items():
        reads = {row: place for place, row in action.operands.items()}
        linear = function == "linear" and action.kind == "static" and action.axis == 0
        for row, place in reads.items():
            if linear and place == (0, "input"):
                readers.setdefault(row, []).append(action.operator)
            else:
                others.add(row)
        others |= {
            *action.joined.values(),
            *action.attention.values(),
            *([] if action.result is None else [action.result]),
        }
    for row, names in readers.items():
        if row not in others and row in forward.smoothable:
            yield row, names


def _smooth(bank: RangeBank, row: int, names: Sequence[str], tap: _Inputs, ranks: Ranks | None) -> None:
    x = torch.cat(tap.vectors[names[0]])
    peak, weights = tap.largest[names[0]], [tap.weights[name] for name in names]
    heaviest = torch.stack([weight.abs().amax(0) for weight in weights]).amax(0)
    if ranks is not None:
        _, peak = ranks.extremes(-peak, peak)
    wanted = [x @ weight.T for weight in weights]
    found = [(_loss(bank, x, weights, wanted, torch.ones_like(peak)), torch.ones_like(peak))]
    for strength in _STRENGTHS:
        ratio = peak.clamp(min=1e-5) ** strength / heaviest.clamp(min=1e-5) ** (1 - strength)
        factor = torch.exp2(torch.log2(ratio / ratio.log().mean().exp()).round())
        found.append((_loss(bank, x, weights, wanted, factor), factor))
    losses = torch.stack([loss for loss, _ in found])
    losses = losses if ranks is None else ranks.mean(losses)
    best = int(losses.argmin())
    if best == 0:
        return
    factor = found[best][1]
    low, high = bank.least_error((x / factor).flatten())
    if ranks is not None:
        low, high = (bound.squeeze(0) for bound in ranks.extremes(low[None], high[None]))
    bank.low[row], bank.high[row], bank.smooth[row] = low, high, 1 / factor
    for name in names:
        bank.refined[name] = replace(bank.refined.get(name, PLAIN), factor=factor)


def _loss(
    bank: RangeBank,
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    wanted: Sequence[torch.Tensor],
    factor: torch.Tensor,
) -> torch.Tensor:
    """Squared error of the layers' results, each divided by the square of its layer's, with input and weights quantized."""
    smoothed = x / factor
    low, high = bank.least_error(smoothed.flatten())
    scale, zero_point = activation_qparams(low[None], high[None], bank.target)
    inputs = fake_quantize(smoothed, scale[0], int(zero_point[0]), *bank.target.limits)
    loss = x.new_zeros(())
    for weight, want in zip(weights, wanted, strict=True):
        integers, steps = quantize_weight(weight * factor, 0, bank.target)
        got = inputs @ (integers * steps[:, None]).T
        loss = loss + (got - want).square().mean() / want.square().mean().clamp(min=1e-30)
    return loss
