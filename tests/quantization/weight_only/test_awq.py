"""AWQ: what makes the inputs of a layer is found by trying, the float network stays the same, and rounding costs less."""

from functools import partial

import pytest
import torch
from torch import nn

from lightning_accel.quantization.weight_only.awq import scale_and_clip_
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import select_layers
from lightning_accel.quantization.weight_only.ptq import quantize_weights_


class Gated(nn.Module):
    """A norm in front of a gate, its twin and their product, as in a Llama; the norm is read by more if ``shares``."""

    def __init__(self, shares=False):
        super().__init__()
        self.norm, self.shares = nn.LayerNorm(64), shares
        self.gate, self.up, self.down = (nn.Linear(64, 64, bias=bias) for bias in (False, True, False))

    def forward(self, x):
        y = self.norm(x)
        return self.down(torch.nn.functional.silu(self.gate(y)) * self.up(y)) + (y if self.shares else x)


def outliers(count=512, width=64):
    """Activations of which a few channels are far larger than the others, in groups with many small weights."""
    x = torch.randn(count, width, generator=torch.Generator().manual_seed(0))
    x[:, ::16] *= 30
    return x


def network(kind, **kwargs):
    torch.manual_seed(0)
    return kind(**kwargs).eval()


def scaled(net, x):
    return scale_and_clip_(net, select_layers(net, 32)[0], GroupGrid(), [x], net)


@pytest.fixture
def no_clipping(monkeypatch):
    monkeypatch.setattr("lightning_accel.quantization.weight_only.awq._clip", lambda *_: None)


def test_the_makers_of_each_input_are_found_and_in_float_nothing_changes(no_clipping):
    net, x = network(Gated), outliers()
    net.norm.weight.data[::16] = 30.0  # after a norm as well, some channels are large
    before = net(x)
    weight = net.down.weight.detach().clone()
    makers = scaled(net, x)
    assert makers["gate"] == makers["up"] == "norm"
    assert makers.get("down", "up") == "up"  # not the gate, whose channels pass through an activation
    assert not torch.equal(weight, net.down.weight) or "down" not in makers
    torch.testing.assert_close(net(x), before, rtol=1e-4, atol=1e-4 * float(before.detach().abs().max()))


def test_what_others_read_too_is_not_scaled(no_clipping):
    net, x = network(Gated, shares=True), outliers()
    net.norm.weight.data[::16] = 30.0
    weights = [net.norm.weight.detach().clone(), net.gate.weight.detach().clone()]
    makers = scaled(net, x)
    assert "gate" not in makers
    assert "up" not in makers
    assert torch.equal(net.norm.weight, weights[0])
    assert torch.equal(net.gate.weight, weights[1])


def error_of(method, seed=0):
    torch.manual_seed(seed)
    net, x = Gated().eval(), outliers()
    net.norm.weight.data[::16] = 30.0
    with torch.no_grad():
        before = net(x)
        quantize_weights_(net, method=method, batches=None if method == "rtn" else [x[:256], x[256:]])
        return float((net(x) - before).square().mean())


@pytest.mark.parametrize("seed", range(3))
def test_the_error_of_the_outputs_falls(seed):
    assert error_of("awq", seed) < 0.5 * error_of("rtn", seed)


def called(net, batch):
    return net(**batch)


def test_grouped_queries_and_conv1d(no_clipping):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {
        "vocab_size": 60,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**size, num_key_value_heads=2)).eval()
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=60, n_embd=64, n_layer=2, n_head=4)).eval()
    batch = {"input_ids": torch.randint(0, 60, (8, 16))}
    for net, makers in (
        (llama, {"self_attn.q_proj": "input_layernorm", "self_attn.o_proj": None, "mlp.down_proj": "mlp.up_proj"}),
        (gpt2, {"attn.c_attn": "ln_1", "mlp.c_fc": "ln_2", "mlp.c_proj": None}),
    ):
        with torch.no_grad():
            before = net(**batch).logits
            names, _ = select_layers(net, 32, exclude=("lm_head",) if net is llama else ())
            found = scale_and_clip_(net, names, GroupGrid(), [batch], partial(called, net))
            torch.testing.assert_close(net(**batch).logits, before, rtol=0, atol=1e-5 * float(before.abs().max()))
        assert found
        for name, maker in found.items():
            for end, wanted in makers.items():
                if name.endswith(end):
                    assert wanted is not None, (name, maker)
                    assert maker.endswith(wanted), (name, maker)


def test_methods_with_data_ask_for_them():
    with pytest.raises(ValueError, match='must hold calibration data with `method="gptq"` or "awq"'):
        quantize_weights_(nn.Sequential(nn.Linear(64, 4)), method="awq")
