"""LSTM with projected hidden states, which ONNX's LSTM doesn't have, step by step."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, argument

aten = torch.ops.aten


def projected_lstm(
    x: torch.Tensor,
    hx: Sequence[torch.Tensor],
    params: Sequence[torch.Tensor],
    has_biases: bool,
    num_layers: int,
    dropout: float,
    train: bool,
    bidirectional: bool,
    batch_first: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``nn.LSTM`` with ``proj_size`` in evaluation (https://arxiv.org/abs/1402.1128), unrolled over a fixed length.

    Args:
        x: ``(T, B, I)``, or ``(B, T, I)`` with ``batch_first``.
        hx: hidden ``(layers, B, P)`` and cell states ``(layers, B, H)``.
        params: of each layer and direction: input and hidden weights, biases if there are any, projection.
        has_biases: whether there are.
        num_layers: layers.
        dropout: between layers in training; not applied here.
        train: whether it would be; rules take evaluation only.
        bidirectional: whether each layer also runs backwards.
        batch_first: layout of ``x`` and of the result.
    """
    sequence = x.transpose(0, 1) if batch_first else x
    each, directions = 5 if has_biases else 3, 2 if bidirectional else 1
    hidden, cells = [], []
    for layer in range(num_layers):
        outputs = []
        for direction in range(directions):
            place = layer * directions + direction
            weights = params[place * each : (place + 1) * each]
            biases = weights[2:4] if has_biases else (None, None)
            h, c = hx[0][place], hx[1][place]
            steps, order = [], range(sequence.shape[0])
            for t in reversed(order) if direction else order:
                gates = F.linear(sequence[t], weights[0], biases[0]) + F.linear(h, weights[1], biases[1])
                i, f, g, o = gates.chunk(4, -1)
                c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
                h = F.linear(torch.sigmoid(o) * torch.tanh(c), weights[-1])
                steps.append(h)
            outputs.append(torch.stack(steps[::-1] if direction else steps))
            hidden.append(h)
            cells.append(c)
        sequence = torch.cat(outputs, -1)
    result = sequence.transpose(0, 1) if batch_first else sequence
    return result, torch.stack(hidden), torch.stack(cells)


def _projects(node: Node) -> Stand | None:
    h, c = (state.meta["val"] for state in argument(node, "hx"))
    return projected_lstm if h.shape[-1] != c.shape[-1] and not argument(node, "train") else None


RULES: Mapping[Any, Rule] = {aten.lstm.input: _projects}
