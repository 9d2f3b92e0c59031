"""Pack integers of a weight into the layouts of file formats, and unpack them again."""

import numpy as np
import torch

_Q4_0, _Q8_0 = 18, 34  # bytes per block of 32: a float16 scale and the integers


def pack_int32(integers: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack along the inputs into int32, the lowest bits first, as compressed-tensors' ``pack-quantized`` does.

    Args:
        integers: ``(out, in)``, signed; stored with an offset of ``2 ** (bits - 1)``.
        bits: 4 or 8.

    Returns:
        ``(out, in * bits / 32)``, int32.
    """
    per = 32 // bits
    values = (integers.to(torch.int64) + (1 << (bits - 1))).reshape(integers.shape[0], -1, per)
    packed = (values << (bits * torch.arange(per))).sum(-1)
    return torch.where(packed >= 2**31, packed - 2**32, packed).to(torch.int32)


def unpack_int32(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Inverse of :func:`pack_int32`: int8 ``(out, in)``."""
    per = 32 // bits
    values = packed.to(torch.int64).unsqueeze(-1) >> (bits * torch.arange(per))
    integers = (values & ((1 << bits) - 1)) - (1 << (bits - 1))
    return integers.reshape(packed.shape[0], -1).to(torch.int8)


def pack_ggml(integers: torch.Tensor, scales: torch.Tensor, bits: int) -> np.ndarray:
    """Blocks of ggml's Q4_0 (``bits=4``) or Q8_0: the scale in float16, then 32 integers.

    Args:
        integers: ``(out, in)``, int8.
        scales: ``(out, in / 32)``, float16.
        bits: 4 or 8.

    Returns:
        ``(out, in / 32 * 18)`` or ``(out, in / 32 * 34)``, uint8.
    """
    out, count = scales.shape
    values = integers.numpy().reshape(out, count, 32)
    if bits == 4:
        unsigned = (values + 8).astype(np.uint8)
        stored = unsigned[..., :16] | (unsigned[..., 16:] << 4)
    else:
        stored = values.view(np.uint8)
    half = scales.numpy().astype(np.float16).reshape(out, count, 1).view(np.uint8)
    return np.concatenate([half, stored], -1).reshape(out, -1)


def unpack_ggml(blocks: np.ndarray, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse of :func:`pack_ggml`: integers ``(out, in)`` in int8 and scales in float16."""
    size = _Q4_0 if bits == 4 else _Q8_0
    rows = np.ascontiguousarray(blocks).reshape(blocks.shape[0], -1, size)
    scales = np.ascontiguousarray(rows[..., :2]).view(np.float16)[..., 0]
    stored = rows[..., 2:]
    values = np.concatenate([stored & 15, stored >> 4], -1).astype(np.int8) - 8 if bits == 4 else stored.view(np.int8)
    return torch.from_numpy(values.reshape(len(rows), -1).copy()), torch.from_numpy(scales.copy())


def pack_gptq(integers: torch.Tensor) -> torch.Tensor:
    """Integers of 4 bits as GPTQ's ``qweight``: ``(in / 8, out)``, int32, packed along the inputs."""
    return pack_int32(integers, 4).t().contiguous()


def unpack_gptq(qweight: torch.Tensor) -> torch.Tensor:
    """Inverse of :func:`pack_gptq`: int8 ``(out, in)``."""
    return unpack_int32(qweight.t().contiguous(), 4)


def gptq_zeros(scales: torch.Tensor) -> torch.Tensor:
    """GPTQ's ``qzeros`` of a symmetric grid, ``(in / group, out / 8)``: the zero point 8, stored as 7 in the format's first version."""
    return torch.full((scales.shape[1], scales.shape[0] // 8), 0x77777777, dtype=torch.int32)


def unpack_matmul_nbits(blob: np.ndarray, outputs: int, inputs: int) -> torch.Tensor:
    """Integers of 4 bits of ONNX Runtime's MatMulNBits: ``(out, blocks, group / 2)`` uint8 to int8 ``(out, in)``."""
    values = np.stack([blob & 15, blob >> 4], -1).reshape(outputs, -1)[:, :inputs].astype(np.int8) - 8
    return torch.from_numpy(values)
