"""Places of quantization in a captured graph, and free names for added modules and tensors."""

from collections.abc import Sequence

from torch import nn

from lightning_accel.quantization.arithmetic.observers import RangeBank


class ActivationFakeQuant(nn.Module):
    """Place where one activation is quantized; the conversion replaces it.

    Args:
        bank: holds its range.
        index: its row in the bank.
    """

    def __init__(self, bank: RangeBank, index: int) -> None:
        super().__init__()
        self.bank, self.index = bank, index

    def qparams(self) -> tuple[float, int]:
        """Present scale (exactly representable in float32) and zero point."""
        return float(self.bank.scales[self.index]), int(self.bank.zero_points[self.index])


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
