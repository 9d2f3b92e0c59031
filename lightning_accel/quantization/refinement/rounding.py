"""Second-order rounding: choose the integers of a weight by the error of its operator's result, not by their own.

Rounding to the nearest integer minimizes the error of the weight. The error of the result also depends on how inputs go together: with
their second moments ``H`` it is ``(w - q)' H (w - q)``. As in GPTQ (https://arxiv.org/abs/2210.17323) the integers are chosen one after the
other, and the weights that remain take up the error of those that are chosen. It minimizes what AdaRound
(https://arxiv.org/abs/2004.10568) minimizes, without training. Half of the inputs choose, and the other half decides, channel by channel,
whether the choice is better than the nearest integers.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from lightning_accel.calls.batches import Call
from lightning_accel.quantization.arithmetic.fake_quant import quantize_weight
from lightning_accel.quantization.arithmetic.observers import PLAIN, RangeBank, Ranks, SeenOperator
from lightning_accel.quantization.graph.prepare import QuantizedForward
from lightning_accel.quantization.refinement.observed import observe_operators

_FUNCTIONS = ("linear", "conv1d", "conv2d", "conv3d")
_ROWS = 4096  # input vectors of a call at most that moments are taken over
_DAMPING = 0.01  # of the mean moment: what calibration hasn't seen must not become free
_LARGEST = 8192  # inputs of an output channel; the moments of more would need gigabytes
_BLOCK = 128  # columns after which the remaining ones are updated at once


class _Moments:
    """Second moments of the inputs of each weight."""

    def __init__(self) -> None:
        self.names: dict[int, list[str]] = {}  # operators that use a weight
        self.weights: dict[int, torch.Tensor] = {}
        self.sums: dict[int, torch.Tensor] = {}  # (2 halves, groups, inputs of a channel, the same)
        self.counts: dict[int, int] = {}  # of both halves
        self._generator = torch.Generator().manual_seed(0)

    def seen(self, operator: SeenOperator) -> torch.Tensor:
        weight, key = operator.weight, id(operator.weight)
        if (
            not operator.x.numel()
            or operator.function not in _FUNCTIONS
            or operator.axis != 0
            or weight[0].numel() > _LARGEST
        ):
            return operator.result
        vectors = self._vectors(operator)  # (groups, rows, inputs)
        moments = torch.stack([half.mT @ half for half in (vectors[:, ::2], vectors[:, 1::2])])
        if key not in self.sums:
            self.weights[key], self.sums[key], self.counts[key], self.names[key] = weight, moments, 0, []
        else:
            self.sums[key] += moments
        self.counts[key] += vectors.shape[1]
        if operator.name not in self.names[key]:
            self.names[key].append(operator.name)
        return operator.result

    def _vectors(self, operator: SeenOperator) -> torch.Tensor:
        """Input vectors ``(G, rows, inputs of an output channel)`` of some positions."""
        weight, x = operator.weight, operator.x.detach()
        size = weight[0].numel()
        if operator.function == "linear":
            return self._some(x.reshape(-1, size))[None]
        groups = max(1, x.shape[1] // weight.shape[1])
        one_hot = torch.eye(size, dtype=weight.dtype, device=weight.device).reshape(size, *weight.shape[1:])
        # A convolution with one-hot kernels returns the patches, whatever stride, padding and dilation are.
        patches = operator.run(one_hot.repeat(groups, *[1] * (weight.ndim - 1)))
        found = patches.movedim(1, -1).reshape(-1, groups * size)
        return self._some(found).reshape(-1, groups, size).movedim(1, 0)

    def _some(self, vectors: torch.Tensor) -> torch.Tensor:
        if len(vectors) <= _ROWS:
            return vectors
        return vectors[torch.randperm(len(vectors), generator=self._generator)[:_ROWS].to(vectors.device)]


def refine_rounding(
    forwards: Sequence[QuantizedForward], caller: nn.Module, calls: Sequence[Call], ranks: Ranks | None = None
) -> None:
    """Choose the integers of the weights of convolutions and linear layers by the error of their results.

    Args:
        forwards: calibrated forwards that are in place and active.
        caller: module that is called, in eval mode.
        calls: arguments of each call; batches of training data.
        ranks: reductions over the ranks of a distributed run.
    """
    taps = [_Moments() for _ in forwards]
    observe_operators(forwards, taps, caller, calls, quantized=True)
    for forward, tap in zip(forwards, taps, strict=True):
        for key in list(tap.sums):
            moments = tap.sums.pop(key) / (tap.counts[key] / 2)
            moments = moments if ranks is None else ranks.mean(moments)
            _refine(forward.bank, tap.names[key], tap.weights[key], moments)


def _refine(bank: RangeBank, names: Sequence[str], weight: torch.Tensor, moments: torch.Tensor) -> None:
    limit = bank.target.weight_max
    weight = bank.refined.get(names[0], PLAIN).scaled(weight.detach().float())  # of one factor: they read one tensor
    nearest, scale = quantize_weight(weight, 0, bank.target)
    first, second = moments
    steps = (weight / scale.view(-1, *[1] * (weight.ndim - 1))).reshape(len(first), -1, first.shape[-1])
    nearest = nearest.reshape(steps.shape)
    chosen = second_order_integers(steps, first, limit)
    better = _error(steps - chosen, second) < _error(steps - nearest, second)
    integers = torch.where(better[..., None], chosen, nearest).reshape(weight.shape).to(torch.int8)
    for name in names:
        bank.refined[name] = replace(bank.refined.get(name, PLAIN), integers=integers)


def _error(difference: torch.Tensor, moments: torch.Tensor) -> torch.Tensor:
    """Mean squared error ``(G, channels)`` of the results, in squares of a step."""
    return ((difference @ moments) * difference).sum(-1)


def second_order_integers(steps: torch.Tensor, moments: torch.Tensor, limit: int) -> torch.Tensor:
    """Integers near weights, chosen for small errors of their products with inputs.

    Args:
        steps: weights divided by their scales, ``(G, channels, inputs)``; zeros stay zero: they may be pruned.
        moments: second moments of the inputs ``(G, inputs, inputs)``.
        limit: largest integer.

    Returns:
        Integers in float, of the shape of ``steps``.

    Example:
        >>> together = torch.tensor([[[1.0, 1.0], [1.0, 1.0]]])  # both inputs are always equal: only the sum of the weights counts
        >>> second_order_integers(torch.tensor([[[0.4, 0.4]]]), together, 127)
        tensor([[[0., 1.]]])
    """
    diagonal = moments.diagonal(dim1=-2, dim2=-1)
    order = diagonal.argsort(-1, descending=True)  # inputs that count most first, while all others can make up for them
    back = order.argsort(-1)
    moments = moments.gather(1, order[..., None].expand_as(moments)).gather(2, order[:, None].expand_as(moments))
    left = steps.gather(2, order[:, None].expand_as(steps)).clone()
    kept = left != 0
    damping = _DAMPING * diagonal.mean(-1).clamp(min=1e-12)
    eye = torch.eye(moments.shape[-1], device=moments.device, dtype=moments.dtype)
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(moments + damping[:, None, None] * eye))
    factor = torch.linalg.cholesky(inverse, upper=True)
    chosen = torch.empty_like(left)
    count = left.shape[-1]
    for begin in range(0, count, _BLOCK):
        end = min(begin + _BLOCK, count)
        errors = torch.empty_like(left[..., begin:end])
        for i in range(begin, end):
            chosen[..., i] = left[..., i].round().clamp(-limit, limit) * kept[..., i]
            errors[..., i - begin] = (left[..., i] - chosen[..., i]) / factor[:, i, i, None]
            left[..., i:end] -= errors[..., i - begin, None] * factor[:, None, i, i:end]
        left[..., end:] -= errors @ factor[:, begin:end, end:]
    return chosen.gather(2, back[:, None].expand_as(chosen))
