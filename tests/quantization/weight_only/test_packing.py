import numpy as np
import pytest
import torch

from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.packing import (
    gptq_zeros,
    pack_ggml,
    pack_gptq,
    pack_int32,
    unpack_ggml,
    unpack_gptq,
    unpack_int32,
)


def integers(bits):
    low = -(1 << (bits - 1))
    return torch.randint(low, -low, (24, 64), generator=torch.Generator().manual_seed(0), dtype=torch.int8)


@pytest.mark.parametrize("bits", [4, 8])
def test_int32_is_the_packing_of_compressed_tensors(bits):
    helpers = pytest.importorskip(
        "compressed_tensors.compressors.pack_quantized.helpers", reason="the extra `lm` is not installed"
    )
    packed = pack_int32(integers(bits), bits)
    assert torch.equal(packed, helpers.pack_to_int32(integers(bits), bits))
    assert torch.equal(unpack_int32(packed, bits), integers(bits))


@pytest.mark.parametrize("bits", [4, 8])
def test_ggml_blocks_are_those_of_gguf(bits):
    gguf = pytest.importorskip("gguf", reason="the extra `lm` is not installed")
    values = torch.randn(24, 64, generator=torch.Generator().manual_seed(0))
    grid = GroupGrid(bits, 32)
    found, scales = grid.quantize(values)
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    blocks = pack_ggml(found, scales, bits)
    assert np.array_equal(gguf.quants.dequantize(blocks, kind), grid.dequantize(found, scales).numpy())
    again, again_scales = unpack_ggml(blocks, bits)
    assert torch.equal(again, found)
    assert torch.equal(again_scales, scales)


def test_gptq_packs_along_the_inputs():
    packed = pack_gptq(integers(4))
    assert packed.shape == (8, 24)
    assert packed.dtype == torch.int32
    first = sum((int(v) + 8) << (4 * i) for i, v in enumerate(integers(4)[0, :8]))
    assert int(packed[0, 0]) & 0xFFFFFFFF == first
    assert torch.equal(unpack_gptq(packed), integers(4))
    zeros = gptq_zeros(torch.zeros(24, 2))
    assert zeros.shape == (2, 3)
    assert {(int(zeros[0, 0]) >> (4 * i)) & 15 for i in range(8)} == {7}
