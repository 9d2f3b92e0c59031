import numpy as np
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper

from lightning_accel.quantization.arithmetic.fake_quant import (
    activation_qparams,
    fake_quantize,
    fake_quantize_weight,
    quantize_weight,
)
from lightning_accel.quantization.arithmetic.observers import RangeBank
from lightning_accel.quantization.arithmetic.targets import Target

SIGNED = Target("signed", "int8", 127, ("onnxruntime",), "")
UNSIGNED = Target("unsigned", "uint8", 63, ("onnxruntime",), "")


def onnx_quantize_dequantize(x: np.ndarray, scale: float, zero_point: int, signed: bool) -> np.ndarray:
    integer = TensorProto.INT8 if signed else TensorProto.UINT8
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]
    constants = [
        helper.make_tensor("s", TensorProto.FLOAT, [], [scale]),
        helper.make_tensor("z", integer, [], [zero_point]),
    ]
    value = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["n"]) for n in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return ort.InferenceSession(model.SerializeToString(), options).run(None, {"x": x})[0]


@pytest.mark.parametrize(("target", "zero_point"), [(SIGNED, 0), (UNSIGNED, 0), (UNSIGNED, 77), (UNSIGNED, 255)])
@pytest.mark.parametrize("scale", [0.1, 1 / 3, 0.0123, 7.0, 1e-6])
def test_forward_equals_the_onnx_operators_bit_for_bit(target, zero_point, scale):
    scale = float(np.float32(scale))
    rng = np.random.default_rng(0)
    ties = (np.arange(-300, 300) + 0.5).astype(np.float32) * np.float32(scale)
    x = np.concatenate([rng.normal(0, 100 * scale, 10_000).astype(np.float32), ties, np.nextafter(ties, np.float32(0))])
    ours = fake_quantize(torch.from_numpy(x), torch.tensor(scale), zero_point, *target.limits)
    assert np.array_equal(ours.numpy(), onnx_quantize_dequantize(x, scale, zero_point, target.signed_activations))


def test_the_gradient_passes_inside_the_range_only():
    x = torch.tensor([-9.0, -4.2, -4.0, 0.0, 0.3, 3.0, 3.4, 3.6, 9.0], requires_grad=True)
    fake_quantize(x, torch.tensor(1.0), 0, -4, 3).sum().backward()
    assert x.grad.tolist() == [0, 1, 1, 1, 1, 1, 1, 0, 0]


def test_symmetric_ranges():
    scale, zero = activation_qparams(torch.tensor([-2.0, 0.0, 0.0]), torch.tensor([1.0, 6.35, 0.0]), SIGNED)
    assert torch.equal(scale, torch.tensor([2.0, 6.35, 127.0]) / 127)
    assert zero.tolist() == [0, 0, 0]


def test_affine_ranges_hold_zero_exactly():
    low, high = torch.tensor([-1.0, 0.5, -3.0, 0.0]), torch.tensor([3.0, 2.0, -1.0, 0.0])
    scale, zero = activation_qparams(low, high, UNSIGNED)
    assert torch.equal(scale, torch.tensor([4.0 / 255, 2.0 / 255, 3.0 / 255, 1.0]))
    assert zero.tolist() == [64, 0, 255, 0]


@pytest.mark.parametrize("axis", [0, 1])
def test_weights_against_numpy(axis):
    weight = torch.randn(4, 5, 3)
    weight[2] = 0 if axis == 0 else weight[2]
    integers, scale = quantize_weight(weight, axis, UNSIGNED)
    w = weight.numpy()
    other = tuple(i for i in range(3) if i != axis)
    s = np.abs(w).max(axis=other, keepdims=True) / np.float32(63)
    s[s == 0] = 1
    assert np.array_equal(integers.numpy(), np.clip(np.rint(w / s), -63, 63))
    assert np.array_equal(scale.numpy(), s.ravel())
    assert integers.abs().max() == 63


def test_zeros_of_a_weight_stay_zeros_and_its_gradient_passes():
    bank = RangeBank(["x"], SIGNED)
    bank.active = True
    weight = torch.randn(6, 8, requires_grad=True)
    with torch.no_grad():
        weight[:, ::2] = 0
    rounded = fake_quantize_weight(weight, 0, bank.target)
    assert torch.equal(rounded == 0, (weight == 0) | (rounded == 0))
    assert (rounded[:, ::2] == 0).all()
    rounded.sum().backward()
    assert torch.equal(weight.grad, torch.ones_like(weight))


def test_ranges_are_a_moving_average_of_training_batches():
    bank = RangeBank(["a", "b"], SIGNED, momentum=0.25)
    bank.learning = True
    bank.quantize(0, torch.tensor([-1.0, 2.0]), training=True)
    bank.quantize(0, torch.tensor([-3.0, 1.0]), training=True)  # a second call in the same step widens
    bank.update()
    assert (bank.low.tolist(), bank.high.tolist()) == ([-3.0, 0.0], [2.0, 0.0])
    bank.quantize(0, torch.tensor([-1.0, 6.0]), training=True)
    bank.update()
    assert (bank.low[0], bank.high[0]) == (-2.5, 3.0)
    bank.quantize(0, torch.tensor([-100.0]), training=False)
    bank.learning = False
    bank.quantize(0, torch.tensor([-100.0]), training=True)
    bank.update()
    assert (bank.low[0], bank.high[0], bank.batches) == (-2.5, 3.0, 2)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_range_that_is_not_finite_names_the_tensor(bad):
    bank = RangeBank(["stem:input", "body.conv:input"], SIGNED)
    bank.learning = True
    bank.quantize(0, torch.ones(3), training=True)
    bank.quantize(1, torch.tensor([1.0, bad]), training=True)
    with pytest.raises(ValueError, match=r"NaN or Inf first at body\.conv:input"):
        bank.update()


def test_ranges_of_another_network_are_refused():
    bank, other = RangeBank(["a"], SIGNED), RangeBank(["a", "b"], SIGNED)
    with pytest.raises(ValueError, match="must hold ranges of this network's tensors"):
        bank.load_state_dict(other.state_dict())


def test_scales_are_float16_where_the_rest_of_the_file_is():
    """So that casting them for a strongly typed engine changes nothing."""
    half = Target("half", "int8", 127, ("tensorrt",), "", rest="float16")
    ranges = torch.logspace(-6, 3, 200)
    scale, _ = activation_qparams(-ranges, ranges, half)
    plain, _ = activation_qparams(-ranges, ranges, SIGNED)
    exact = torch.from_numpy(plain.numpy().astype(np.float16).astype(np.float32))
    small = plain < 2.0**-14
    assert torch.equal(scale, torch.where(small, plain, exact))
    assert small.any()
    _, weights = quantize_weight(torch.randn(64, 32), 0, half)
    assert torch.equal(weights, weights.half().float())
