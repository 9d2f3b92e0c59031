"""Combine the report's tables by layer: channels, zeros, and precision."""

from dataclasses import dataclass

from lightning_accel.reports.model import CHANNELS, SPARSITY, Report


@dataclass
class Layer:
    """One layer.

    Args:
        channels: its remaining channels, as text.
        zeros: share of zeros in its weight.
        precision: ``"int8"``, or ``"float: "`` and the reason.
    """

    channels: str = ""
    zeros: float | None = None
    precision: str = ""


def layers_of(report: Report) -> dict[str, Layer]:
    """Layers in the report's tables, by name, in their order.

    Args:
        report: of a bundle.
    """
    layers: dict[str, Layer] = {}
    for table in report.layers:
        for name, value in table.values.items():
            if table.kind == SPARSITY:
                layers.setdefault(name.removesuffix(".weight"), Layer()).zeros = float(value)
            elif table.kind == CHANNELS:
                layers.setdefault(name, Layer()).channels = str(value)
    for name, value in report.quantization.items():
        layers.setdefault(name, Layer()).precision = value
    return layers


def totals_of(report: Report) -> dict[str, str]:
    """Totals of the tables, by title."""
    totals = {table.title: table.total for table in report.layers if table.total is not None}
    return {title: f"{value:.1%} zeros" if isinstance(value, float) else str(value) for title, value in totals.items()}
