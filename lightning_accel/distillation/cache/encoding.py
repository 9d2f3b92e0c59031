"""Encode teacher outputs as bytes: float32, float16, or the largest logits and the probability mass of the rest."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_accel.errors import InvalidArgumentError


class Encoding(ABC):
    """Encoding of tensors ``(N, *shape)`` as rows of bytes.

    Args:
        shape: shape of one sample.
    """

    row_bytes: int

    def __init__(self, shape: Sequence[int]) -> None:
        self.shape = tuple(shape)

    @abstractmethod
    def encode(self, values: Tensor) -> np.ndarray:
        """Rows ``(N, row_bytes)``, uint8, of values ``(N, *shape)``."""

    @abstractmethod
    def decode(self, rows: np.ndarray) -> Tensor:
        """Values ``(N, *shape)`` in float32."""


class Dense(Encoding):
    """All values, in float32 or float16.

    Args:
        shape: shape of one sample.
        dtype: ``"float32"`` or ``"float16"``; the latter has a relative error of at most 2^-11.

    Example:
        >>> Dense((3,), "float16").row_bytes
        6
    """

    def __init__(self, shape: Sequence[int], dtype: str) -> None:
        super().__init__(shape)
        self.dtype = np.dtype(dtype)
        self.row_bytes = math.prod(self.shape) * self.dtype.itemsize

    def encode(self, values: Tensor) -> np.ndarray:
        """Rows ``(N, row_bytes)`` of values ``(N, *shape)``.

        Raises:
            InvalidArgumentError: a value is not finite, or beyond float16's 65504.
        """
        array = values.detach().float().cpu().numpy()
        limit = np.finfo(self.dtype).max
        if not (np.abs(array) <= limit).all():
            raise InvalidArgumentError(
                f"Argument `storage` must hold the teacher's outputs, but got {self.dtype} for values up to "
                f"{np.abs(array).max():g}. "
                + ('Use `storage="float32"`.' if np.isfinite(array).all() else "The teacher returns no finite numbers.")
            )
        return np.ascontiguousarray(array.astype(self.dtype)).reshape(len(array), -1).view(np.uint8)

    def decode(self, rows: np.ndarray) -> Tensor:
        """Values ``(N, *shape)`` in float32."""
        array = np.ascontiguousarray(rows).view(self.dtype).astype(np.float32)
        return torch.from_numpy(array).reshape(len(rows), *self.shape)


class TopK(Encoding):
    """The ``k`` largest logits, and the total probability of the others (https://arxiv.org/abs/2112.01528).

    The others are decoded with equal logits, so that their total probability is exact at temperature 1.

    Args:
        shape: of one sample: ``(C,)``.
        k: logits kept, below C - 1.

    Raises:
        InvalidArgumentError: the outputs aren't logits ``(N, C)``, or ``k`` is out of its range.

    Example:
        >>> encoding = TopK((4,), k=1)
        >>> encoding.decode(encoding.encode(torch.tensor([[5.0, 1.0, 1.0, 1.0]])))
        tensor([[5., 1., 1., 1.]])
    """

    def __init__(self, shape: Sequence[int], k: int) -> None:
        super().__init__(shape)
        if len(self.shape) != 1 or not 0 < k < self.shape[0] - 1:
            raise InvalidArgumentError(
                f"Argument `top_k` must be in [1, C - 2] for logits (N, C), but got {k} for outputs "
                f'(N, {", ".join(map(str, self.shape))}). Use `storage="float16"`.'
            )
        self.k = k
        self._row = np.dtype(
            [("values", "<f4", (k,)), ("classes", "<u2" if self.shape[0] <= 65536 else "<u4", (k,)), ("rest", "<f4")]
        )
        self.row_bytes = self._row.itemsize

    def encode(self, values: Tensor) -> np.ndarray:
        """Rows ``(N, row_bytes)`` of logits ``(N, C)``."""
        logits = values.detach().float().cpu()
        top, classes = logits.topk(self.k, dim=1)
        rest = logits.scatter(1, classes, -math.inf).logsumexp(1)
        rows = np.zeros(len(logits), self._row)
        rows["values"], rows["classes"], rows["rest"] = top.numpy(), classes.numpy(), rest.numpy()
        return rows.view(np.uint8).reshape(len(rows), -1)

    def decode(self, rows: np.ndarray) -> Tensor:
        """Logits ``(N, C)`` in float32."""
        fields = np.ascontiguousarray(rows).view(self._row)[:, 0]
        others = torch.from_numpy(fields["rest"].copy()) - math.log(self.shape[0] - self.k)
        logits = others[:, None].repeat(1, self.shape[0])
        classes = torch.from_numpy(fields["classes"].astype(np.int64))
        return logits.scatter_(1, classes, torch.from_numpy(fields["values"].copy()))
