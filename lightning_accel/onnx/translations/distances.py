"""Pairwise distances between rows."""

from collections.abc import Mapping
from typing import Any

import torch

from lightning_accel.onnx.translations.rule import Rule, always

aten = torch.ops.aten
_ROWS = 25  # above which PyTorch computes Euclidean distances by a matrix product


def pairwise(a: torch.Tensor, b: torch.Tensor, p: float = 2.0, compute_mode: int | None = None) -> torch.Tensor:
    """Distance of each row of ``a`` ``(..., P, M)`` to each of ``b`` ``(..., R, M)`` in the p-norm: ``(..., P, R)``.

    Args:
        a: rows.
        b: others.
        p: of the norm, from 0 to infinity.
        compute_mode: 1 by a matrix product, 2 by differences; ``None`` or 0 by the number of rows, as PyTorch does.
    """
    many = all(isinstance(x.shape[-2], int) for x in (a, b)) and max(a.shape[-2], b.shape[-2]) > _ROWS
    if p == 2.0 and (compute_mode == 1 or (compute_mode in (None, 0) and many)):
        squares = a.square().sum(-1, keepdim=True) + b.square().sum(-1).unsqueeze(-2)
        return (squares - 2.0 * (a @ b.transpose(-1, -2))).clamp(min=0.0).sqrt()
    apart = (a.unsqueeze(-2) - b.unsqueeze(-3)).abs()
    if p == 2.0:
        return apart.square().sum(-1).sqrt()
    if p == 1.0:
        return apart.sum(-1)
    if p == float("inf"):
        return apart.amax(-1)
    return (apart != 0).to(a.dtype).sum(-1) if p == 0.0 else apart.pow(p).sum(-1).pow(1.0 / p)


RULES: Mapping[Any, Rule] = {aten.cdist.default: always(pairwise), aten._cdist_forward.default: always(pairwise)}
