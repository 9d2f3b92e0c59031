"""Circular padding as concatenation: OpenVINO has no padding that wraps."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, argument

aten = torch.ops.aten


def circular(x: torch.Tensor, pad: Sequence[int], mode: str = "circular", value: float | None = None) -> torch.Tensor:
    """Continue ``x`` periodically; ``pad`` counts from the last axis, negative widths cut."""
    for place in range(0, len(pad), 2):
        axis, before, after = x.ndim - 1 - place // 2, pad[place], pad[place + 1]
        length = x.shape[axis]
        parts = [x.narrow(axis, length - before, before)] if before > 0 else []
        start, end = max(-before, 0), length - max(-after, 0)
        parts.append(x.narrow(axis, start, end - start))
        parts += [x.narrow(axis, 0, after)] if after > 0 else []
        x = torch.cat(parts, axis)
    return x


def _wraps(node: Node) -> Stand | None:
    return circular if argument(node, "mode") == "circular" else None


RULES: Mapping[Any, Rule] = {
    aten.pad.default: _wraps,
    aten._pad_circular.default: lambda node: circular,
}
