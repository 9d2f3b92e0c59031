"""Fake-quantization modules of a captured graph, and free names for added modules and tensors."""

from collections.abc import Sequence

import torch
from torch import nn

from lightning_accel.quantization.arithmetic.fake_quant import per_channel, quantize_weight, straight
from lightning_accel.quantization.arithmetic.observers import RangeBank


class WeightFakeQuant(nn.Module):
    """Fake-quantization of a weight with its present range; stateless. All values lie within the range, so the gradient is 1.

    Args:
        bank: ranges and target, and whether fake-quantization is active.
        axis: output channels; ``None``: one scale for all of the weight.
    """

    def __init__(self, bank: RangeBank, axis: int | None) -> None:
        super().__init__()
        self.bank, self.axis = bank, axis

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        """Quantized weight, of the same shape."""
        if not self.bank.active:
            return weight
        integers, scale = quantize_weight(weight.float(), self.axis, self.bank.target)
        return straight(weight, integers.mul_(per_channel(scale, weight.ndim, self.axis)))


class ActivationFakeQuant(nn.Module):
    """Fake-quant of one activation.

    Args:
        bank: holds its range.
        index: its row in the bank.
        training: whether it is part of the train graph.
        operators: the operators that read it; inactive while all of them compute in float.
        clip: limits of a fused activation.
    """

    def __init__(
        self,
        bank: RangeBank,
        index: int,
        training: bool,
        operators: frozenset[str] = frozenset(),
        clip: tuple[float, float] = (-torch.inf, torch.inf),
    ) -> None:
        super().__init__()
        self.bank, self.index, self.training_graph, self.operators, self.clip = bank, index, training, operators, clip

    def qparams(self) -> tuple[float, int]:
        """Present scale (exactly representable in float32) and zero point."""
        return float(self.bank.scales[self.index]), int(self.bank.zero_points[self.index])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Same shape as ``x``."""
        if self.bank.off and self.operators <= self.bank.off:
            return x
        return self.bank.quantize(self.index, x, self.training_graph, self.clip)


def free_name(graph_module: nn.Module, name: str, suffixes: Sequence[str] = ("",)) -> str:
    """Append underscores to ``name`` until the graph has no attribute ``name + suffix``, for any of the suffixes.

    Operators ``a.b`` and ``a_b`` would otherwise share a name, and a user's own ``head_bias`` would be overwritten.

    Args:
        graph_module: the graph to add an attribute to.
        name: the preferred name.
        suffixes: endings that are appended to the name, e.g. ``("_weight_int8", "_bias")``.
    """
    while any(hasattr(graph_module, name + suffix) for suffix in suffixes):
        name += "_"
    return name
