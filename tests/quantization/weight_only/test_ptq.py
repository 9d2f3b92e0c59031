import pytest
import torch
from torch import nn

import lightning_accel as la
from lightning_accel.core.effective_weight import EffectiveLinear
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.quantization.weight_only.gptq import gptq_weight
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import integers_of
from lightning_accel.quantization.weight_only.ptq import quantize_weights_


def correlated(count=512, width=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 8, generator=generator) @ torch.randn(8, width, generator=generator) + 0.1 * torch.randn(
        count, width, generator=generator
    )


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))


def test_round_to_nearest_computes_with_the_rounded_weights():
    net, x = network(), correlated()
    expected = [GroupGrid(4, 32)(layer.weight.detach()) for layer in (net[0], net[2])]
    keys = list(net.state_dict())
    assert quantize_weights_(net) == ["0", "2"]
    assert list(net.state_dict()) == keys
    hidden = torch.relu(nn.functional.linear(x, expected[0], net[0].bias))
    assert torch.equal(net(x), nn.functional.linear(hidden, expected[1], net[2].bias))
    found = integers_of(net)
    assert torch.equal(found["2"][2].dequantize(*found["2"][:2]), expected[1])


def test_gptq_stays_on_the_grid_and_lowers_the_error_of_the_outputs():
    x, grid = correlated(), GroupGrid(4, 32)
    weight = torch.randn(32, 64, generator=torch.Generator().manual_seed(1))
    rounded = gptq_weight(weight, x.t() @ x, grid)
    assert torch.equal(grid(rounded), rounded)
    error, nearest = ((x @ (weight - w).t()).square().mean() for w in (rounded, grid(weight)))
    assert error < 0.3 * nearest


def test_gptq_of_a_network_lowers_the_error():
    x = correlated()
    with torch.no_grad():
        expected = network()(x)
    errors = {}
    for method in ("rtn", "gptq"):
        net = network()
        quantize_weights_(net, method=method, batches=[x[:256], x[256:]] if method == "gptq" else None, exclude="2")
        assert type(net[2]) is nn.Linear
        with torch.no_grad():
            errors[method] = (net(x) - expected).square().mean()
    assert errors["gptq"] < 0.5 * errors["rtn"]


def test_inputs_that_are_always_zero_cost_nothing():
    x = correlated()
    x[:, 3] = 0
    rounded = gptq_weight(torch.ones(4, 64), x.t() @ x, GroupGrid(8, 32))
    assert torch.equal(rounded[:, 3], torch.zeros(4))


def test_without_inputs_a_weight_is_rounded_to_the_nearest():
    weight, grid = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)), GroupGrid(4, 32)
    assert torch.equal(gptq_weight(weight, torch.zeros(64, 64), grid), grid(weight))


def test_wrong_arguments_are_refused():
    with pytest.raises(InvalidArgumentError, match="`method` must be one of"):
        quantize_weights_(network(), method="hqq")
    with pytest.raises(InvalidArgumentError, match="`batches` must hold calibration data"):
        quantize_weights_(network(), method="gptq")
    with pytest.raises(InvalidArgumentError, match="`batches` must hold calibration data"):
        quantize_weights_(network(), batches=[correlated()])
    with pytest.raises(
        InvalidArgumentError, match="`group` must divide the inputs of each layer, but got 128 for `0` with 64"
    ):
        quantize_weights_(network(), group=128)
    with pytest.raises(InvalidArgumentError, match="must match the name of a linear layer, but got 'head'"):
        quantize_weights_(network(), exclude="head")
    with pytest.raises(InvalidArgumentError, match="must leave a linear layer to quantize"):
        quantize_weights_(network(), exclude="*")
    with pytest.raises(InvalidArgumentError, match="`target` must be one of"):
        quantize_weights_(network(), "portable")
    net = network()
    quantize_weights_(net)
    assert type(net[0]) is EffectiveLinear
    with pytest.raises(InvalidArgumentError, match="got `0`, which is quantized or adapted already"):
        quantize_weights_(net)
    with pytest.raises(InvalidArgumentError, match=r"`hessian` must be \(in, in\)"):
        gptq_weight(torch.ones(4, 64), torch.ones(3, 3), GroupGrid())
    with pytest.raises(InvalidArgumentError, match="`hessian` must be finite"):
        gptq_weight(torch.ones(4, 32), torch.full((32, 32), torch.nan), GroupGrid())


def test_a_weight_that_is_also_an_embedding_stays_float():
    net = nn.Sequential(nn.Embedding(64, 64), nn.Linear(64, 64), nn.Linear(64, 64, bias=False))
    net[2].weight = net[0].weight
    with pytest.raises(InvalidArgumentError, match="got `2`, whose weight is also the embedding `0`"):
        quantize_weights_(net, include="2")
    assert quantize_weights_(net) == ["1"]


@pytest.mark.parametrize("target", ["int4", "int8-weights"])
def test_where_activations_are_quantized_too_the_error_names_the_function(target):
    with pytest.raises(ValueError, match=r"without training by `quantization\.quantize_weights_`"):
        la.quantize(torch.nn.Linear(32, 4), [torch.randn(4, 32)], target=target)
