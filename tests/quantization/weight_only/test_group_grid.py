import numpy as np
import pytest
import torch

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.group_grid import GroupGrid, check_group
from lightning_accel.quantization.weight_only.packing import unpack_ggml, unpack_matmul_nbits


def weight(outputs=48, inputs=256, seed=0):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(outputs, inputs, generator=generator) * 0.02
    values[0] = 0.0  # a row of zeros
    values[1, :32] = torch.tensor([1.0, -1.0] * 16)  # a tie: the first one counts
    values[2, :32] = 1e-9  # below float16
    return values


def numpy_q4_0(values):
    """The rule of ggml's Q4_0 from its source, group by group."""
    groups = values.reshape(-1, 32).astype(np.float32)
    integers, scales = np.zeros_like(groups, dtype=np.int8), np.zeros(len(groups), np.float16)
    for i, group in enumerate(groups):
        largest = group[np.abs(group).argmax()]
        step = np.float32(largest / np.float32(-8))
        inverse = np.float32(0) if step == 0 else np.float32(1) / step
        scales[i] = step
        integers[i] = np.minimum(15, (group * inverse + np.float32(8.5)).astype(np.int8)) - 8
        if scales[i] == 0:
            integers[i] = 0
    return integers.reshape(values.shape), scales.reshape(len(values), -1)


def test_int4_is_ggmls_rule():
    values = weight()
    integers, scales = GroupGrid(4, 32).quantize(values)
    expected, expected_scales = numpy_q4_0(values.numpy())
    assert np.array_equal(integers.numpy(), expected)
    assert np.array_equal(scales.numpy(), expected_scales)
    assert integers.min() == -8
    assert integers[0].abs().max() == 0
    assert scales[1, 0] == -0.125


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128])
def test_rounding_what_is_on_the_grid_changes_nothing(bits, group):
    grid = GroupGrid(bits, group)
    integers, scales = grid.quantize(weight())
    on_grid = grid(weight())
    assert torch.equal(on_grid, grid.dequantize(integers, scales))
    again, again_scales = grid.quantize(on_grid)
    assert torch.equal(integers, again)
    assert torch.equal(scales, again_scales)
    assert torch.equal(grid(on_grid), on_grid)


@pytest.mark.parametrize("bits", [4, 8])
def test_the_stock_quantizer_of_gguf_keeps_every_integer(bits):
    gguf = pytest.importorskip("gguf", reason="the extra `lm` is not installed")
    kind = gguf.GGMLQuantizationType.Q4_0 if bits == 4 else gguf.GGMLQuantizationType.Q8_0
    grid = GroupGrid(bits, 32)
    integers, scales = grid.quantize(weight())
    with np.errstate(over="ignore"):
        blocks = gguf.quants.quantize(grid.dequantize(integers, scales).numpy(), kind)
    theirs, their_scales = unpack_ggml(blocks, bits)
    assert torch.equal(theirs, integers)
    assert torch.equal(their_scales.abs(), scales.abs())
    assert torch.equal(their_scales[3:], scales[3:])


def test_the_stock_quantizer_of_onnx_runtime_keeps_every_integer():
    from onnxruntime.capi._pybind_state import quantize_matmul_4bits

    grid = GroupGrid(4, 32)
    integers, scales = grid.quantize(weight())
    values = grid.dequantize(integers, scales).numpy()
    outputs, inputs = values.shape
    packed = np.zeros((outputs, inputs // 32, 16), np.uint8)
    theirs = np.zeros(outputs * inputs // 32, np.float32)
    zeros = np.zeros(outputs * (inputs // 32 + 1) // 2, np.uint8)
    quantize_matmul_4bits(packed, np.ascontiguousarray(values.T), theirs, zeros, 32, outputs, inputs, True)
    assert torch.equal(unpack_matmul_nbits(packed, outputs, inputs), integers)
    assert np.array_equal(theirs.reshape(outputs, -1), scales.float().numpy())


def test_a_rule_without_the_extreme_integer_is_not_kept_by_gguf():
    """The usual rule ``max|w| / 7.5`` loses integers in a stock quantizer: why this grid is used."""
    gguf = pytest.importorskip("gguf", reason="the extra `lm` is not installed")
    values = weight()[3:]
    groups = values.reshape(len(values), -1, 32)
    scale = (groups.abs().amax(-1, keepdim=True) / 7.5).half().float()
    integers = (groups / scale).round().clamp(-8, 7)
    fake = (integers * scale).reshape(values.shape)
    theirs, _ = unpack_ggml(gguf.quants.quantize(fake.numpy(), gguf.GGMLQuantizationType.Q4_0), 4)
    assert 0.3 < (theirs == integers.reshape(values.shape)).float().mean() < 0.7


def test_the_gradient_is_one_everywhere():
    values = weight().requires_grad_()
    result = GroupGrid(4, 32)(values)
    assert torch.equal(result, GroupGrid(4, 32)(values.detach()))
    (result * torch.arange(256.0)).sum().backward()
    assert torch.equal(values.grad, torch.arange(256.0).expand(48, 256))


def test_the_error_is_at_most_a_step():
    values = weight()[3:]
    _, scales = GroupGrid(4, 32).quantize(values)
    error = (GroupGrid(4, 32)(values) - values).reshape(len(values), -1, 32).abs().amax(-1)
    assert (error <= scales.float().abs() * 1.01).all()


def test_settings_out_of_range_are_refused():
    with pytest.raises(InvalidArgumentError, match=r"Argument `bits` must be one of \(4, 8\), but got 3"):
        GroupGrid(3, 32)
    for group in (0, 12, True, 32.0):
        with pytest.raises(InvalidArgumentError, match="Argument `group` must be a positive multiple of 8"):
            GroupGrid(4, group)
    with pytest.raises(
        InvalidArgumentError, match="`group` must divide the inputs of each layer, but got 32 for `a` with 100 inputs"
    ):
        check_group("a", 100, 32)
    with pytest.raises(InvalidArgumentError, match=r"must be \(out, in\), but got shape \(3,\)"):
        GroupGrid(4, 32).quantize(torch.zeros(3))
    with pytest.raises(InvalidArgumentError, match="must be finite and below 524032"):
        GroupGrid(4, 32).quantize(torch.full((1, 32), 1e6))
