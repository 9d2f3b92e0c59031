"""Fourier transforms of real signals as matrix products and convolutions, which every engine has."""

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch.fx import Node

from lightning_accel.onnx.translations.rule import Rule, Stand, argument

aten = torch.ops.aten
_LONGEST = 2048  # samples of a transform that is written as a matrix: 2048 x 1025 complex weights take 16 MB


def basis(length: int, bins: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and negative sines ``(length, bins)`` of the discrete Fourier transform.

    Angles are reduced to [-pi, pi) as integers, so that float32 keeps them to the last place.
    """
    steps = torch.arange(length, device=like.device).unsqueeze(1) * torch.arange(bins, device=like.device) % length
    steps = torch.where(2 * steps >= length, steps - length, steps)
    angle = steps.to(like.dtype) * (2.0 * math.pi / length)
    return torch.cos(angle), -torch.sin(angle)


def real_transform(x: torch.Tensor, n: int | None = None, dim: int = -1, norm: str | None = None) -> torch.Tensor:
    """``torch.fft.rfft``: the first ``n // 2 + 1`` bins of a real signal, cut or filled with zeros to length ``n``."""
    x = x.movedim(dim, -1)
    length = x.shape[-1] if n is None else n
    if length < x.shape[-1]:
        x = x[..., :length]
    elif length > x.shape[-1]:
        x = F.pad(x, (0, length - x.shape[-1]))
    cosines, sines = basis(length, length // 2 + 1, x)
    scale = {"ortho": 1.0 / math.sqrt(length), "forward": 1.0 / length}.get(norm or "backward", 1.0)
    return (
        torch.complex(x @ cosines, x @ sines) * scale if scale != 1.0 else torch.complex(x @ cosines, x @ sines)
    ).movedim(-1, dim)


def inverse_real_transform(
    x: torch.Tensor, n: int | None = None, dim: int = -1, norm: str | None = None
) -> torch.Tensor:
    """``torch.fft.irfft``: the real signal of ``n`` samples, by default ``2 (bins - 1)``, with these first bins."""
    parts = torch.view_as_real(x.movedim(dim, -1).contiguous())
    length = 2 * (parts.shape[-2] - 1) if n is None else n
    bins = length // 2 + 1
    if bins < parts.shape[-2]:
        parts = parts[..., :bins, :]
    elif bins > parts.shape[-2]:
        parts = F.pad(parts, (0, 0, 0, bins - parts.shape[-2]))
    cosines, sines = synthesis(length, parts)
    scale = {"ortho": math.sqrt(length), "forward": float(length)}.get(norm or "backward", 1.0)
    return ((parts[..., 0] @ cosines + parts[..., 1] @ sines) * scale).movedim(-1, dim)


def synthesis(length: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights ``(length // 2 + 1, length)`` of real and imaginary parts in a real signal of this length."""
    bins = length // 2 + 1
    cosines, sines = basis(length, bins, like)
    place = torch.arange(bins, device=like.device)
    once = (place == 0) | (2 * place == length)  # bins without a mirror image
    weight = torch.where(once, 1.0, 2.0).to(like.dtype) / length
    return (cosines * weight).transpose(0, 1), (sines * weight).transpose(0, 1)


def short_time(
    x: torch.Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: torch.Tensor | None = None,
    normalized: bool = False,
    onesided: bool | None = None,
    return_complex: bool | None = None,
    align_to_window: bool | None = None,
) -> torch.Tensor:
    """``torch.stft`` of real signals ``(B, L)`` or ``(L,)``, already centered, as one convolution: ``(B, bins, frames)``.

    Args:
        x: the signals.
        n_fft: length of a frame.
        hop_length: samples between frames; default a quarter of ``n_fft``.
        win_length: length of the window, which is centered in the frame.
        window: its values ``(win_length,)``; default ones.
        normalized: whether frames are scaled by ``1 / sqrt(n_fft)``.
        onesided: whether only the first half of the bins is returned; default yes.
        return_complex: whether the result is complex, or has real and imaginary parts along a last axis.
        align_to_window: whether frames begin with the window instead of around it.
    """
    hop, length = hop_length or n_fft // 4, win_length or n_fft
    shape = torch.ones(length, dtype=x.dtype, device=x.device) if window is None else window.to(x.dtype)
    left = (n_fft - length) // 2
    shape = F.pad(shape, (left, n_fft - length - left)) if length < n_fft else shape
    bins = n_fft if onesided is False else n_fft // 2 + 1
    cosines, sines = basis(n_fft, bins, x)
    kernel = torch.cat((cosines, sines), 1).transpose(0, 1) * shape  # (2 bins, n_fft)
    if normalized:
        kernel = kernel / math.sqrt(n_fft)
    signals = x.unsqueeze(0) if x.ndim == 1 else x
    frames = F.conv1d(signals.unsqueeze(1), kernel.unsqueeze(1), stride=hop)  # (B, 2 bins, frames)
    real, imaginary = frames[:, :bins], frames[:, bins:]
    if x.ndim == 1:
        real, imaginary = real.squeeze(0), imaginary.squeeze(0)
    return torch.complex(real, imaginary) if return_complex else torch.stack((real, imaginary), -1)


def inverse_short_time(
    x: torch.Tensor,
    n_fft: int,
    hop_length: int | None = None,
    win_length: int | None = None,
    window: torch.Tensor | None = None,
    center: bool = True,
    normalized: bool = False,
    onesided: bool | None = None,
    length: int | None = None,
    return_complex: bool = False,
) -> torch.Tensor:
    """``torch.istft`` of one-sided spectra ``(B, bins, frames)`` as one transposed convolution: ``(B, L)``.

    Args are those of :func:`short_time`; ``length`` cuts the result or fills it with zeros.
    """
    hop, size = hop_length or n_fft // 4, win_length or n_fft
    parts = torch.view_as_real(x)
    parts = parts.unsqueeze(0) if x.ndim == 2 else parts  # (B, bins, frames, 2)
    real, imaginary = parts[..., 0], parts[..., 1]
    shape = torch.ones(size, dtype=real.dtype, device=x.device) if window is None else window.to(real.dtype)
    left = (n_fft - size) // 2
    shape = F.pad(shape, (left, n_fft - size - left)) if size < n_fft else shape
    kernel = torch.cat(synthesis(n_fft, real)) * shape  # (2 bins, n_fft)
    if normalized:
        kernel = kernel * math.sqrt(n_fft)
    summed = F.conv_transpose1d(torch.cat((real, imaginary), 1), kernel.unsqueeze(1), stride=hop).squeeze(1)
    ones = torch.ones_like(real[:1, :1])
    envelope = F.conv_transpose1d(ones, (shape * shape).reshape(1, 1, -1), stride=hop).squeeze(1)
    start = n_fft // 2 if center else 0
    end = summed.shape[-1] - start if length is None else min(start + length, summed.shape[-1])
    result = summed[..., start:end] / envelope[..., start:end]
    if length is not None and length > end - start:
        result = F.pad(result, (0, length - (end - start)))
    return result.squeeze(0) if x.ndim == 2 else result


def _real(node: Node) -> Stand | None:
    value, length, dim = node.args[0].meta["val"], argument(node, "n"), argument(node, "dim")  # type: ignore[union-attr]
    known = value.shape[dim] if length is None else length
    return real_transform if isinstance(known, int) and known <= _LONGEST else None


def _bins(node: Node) -> Stand | None:
    value, length, dim = node.args[0].meta["val"], argument(node, "n"), argument(node, "dim")  # type: ignore[union-attr]
    known = 2 * (value.shape[dim] - 1) if length is None else length
    return inverse_real_transform if isinstance(known, int) and known <= _LONGEST else None


def _frames(node: Node) -> Stand | None:
    value: torch.Tensor = node.args[0].meta["val"]  # type: ignore[union-attr]
    return None if value.is_complex() or argument(node, "n_fft") > _LONGEST else short_time


def _spectra(node: Node) -> Stand | None:
    other = argument(node, "return_complex") or argument(node, "onesided") is False
    return None if other or argument(node, "n_fft") > _LONGEST else inverse_short_time


RULES: Mapping[Any, Rule] = {
    aten.fft_rfft.default: _real,
    aten.fft_irfft.default: _bins,
    aten.stft.default: _frames,
    aten.istft.default: _spectra,
}
