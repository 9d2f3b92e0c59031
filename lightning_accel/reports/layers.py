"""What was done to each layer, gathered from the report's tables: channels that left, zeros, and int8 or float."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass
class Layer:
    """One layer.

    Args:
        channels: what is left of its channels, in words.
        zeros: share of zeros in its weight.
        precision: ``"int8"``, or ``"float: "`` and the reason.
    """

    channels: str = ""
    zeros: float | None = None
    precision: str = ""


def layers_of(report: Mapping[str, Any]) -> dict[str, Layer]:
    """Each layer that anything is known of, by name, in the order of the tables.

    Args:
        report: as in ``report.json``.
    """
    layers: dict[str, Layer] = {}
    for title, table in (report.get("compression") or {}).items():
        if not isinstance(table, Mapping):
            continue
        for name, value in table.items():
            if name == "all":
                continue
            if title.startswith("sparsity"):
                layers.setdefault(str(name).removesuffix(".weight"), Layer()).zeros = float(value)
            elif title.startswith("channels"):
                layers.setdefault(str(name), Layer()).channels = str(value)
    for name, value in (report.get("quantization") or {}).items():
        layers.setdefault(str(name), Layer()).precision = str(value)
    return layers


def totals_of(report: Mapping[str, Any]) -> dict[str, str]:
    """What the tables say of the whole network, by title."""
    found = {}
    for title, table in (report.get("compression") or {}).items():
        if isinstance(table, Mapping) and "all" in table:
            value = table["all"]
            found[title] = f"{value:.1%} zeros" if isinstance(value, float) else str(value)
    return found
