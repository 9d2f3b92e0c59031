"""Where tensors are quantized: held against what the engines fuse."""

import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from lightning_accel.calls.batches import canonical_call
from lightning_accel.calls.contexts import own_signature
from lightning_accel.calls.shapes import describe_inputs
from lightning_accel.quantization.arithmetic.targets import OPERATORS, Target, target_of
from lightning_accel.quantization.graph.attention import attention
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.modules import ActivationFakeQuant
from lightning_accel.quantization.graph.prepare import QuantizedForward
from tests.support.zoo import ZOO, network, samples

EVERYTHING = Target("everything", "uint8", 127, ("onnxruntime",), "", OPERATORS)


def take_over(module, *args, target=EVERYTHING, **options):
    call = canonical_call(own_signature(module), args, {})
    forward = QuantizedForward(module, describe_inputs(*call), target, **options)
    module.__dict__["forward"] = forward
    return forward


def learn(module, forward, *args):
    module.train()
    forward.bank.learning = True
    with torch.no_grad():
        module(*args)
    forward.bank.learning = False
    forward.bank.update()
    forward.bank.activate()


class Block(nn.Module):
    """Two convolutions, a skip, a pooled branch that is concatenated, dropout and a linear head."""

    def __init__(self, projected: bool = False):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)
        self.norm = nn.BatchNorm2d(8)
        self.skip = nn.Conv2d(8, 8, 1) if projected else nn.Identity()
        self.c, self.drop, self.head = nn.Conv2d(16, 4, 1), nn.Dropout(0.1), nn.Linear(4 * 16, 2)

    def forward(self, x):
        a = torch.relu(self.a(x))
        y = torch.relu(self.norm(self.b(a)) + self.skip(a))
        y = torch.cat([nn.functional.max_pool2d(y, 2), nn.functional.max_pool2d(a, 2)], 1)
        return self.head(self.drop(torch.relu(self.c(y)).flatten(1)))


def fakes(graph):
    return {n: graph.get_submodule(n.target) for n in graph.graph.nodes if n.op == "call_module"}


def test_each_tensor_once_where_its_data_comes_from():
    module, x = Block(), torch.randn(4, 3, 8, 8)
    forward = take_over(module, x)
    # the input; `a`, which conv `b` and the sum read and which, pooled, is concatenated with the sum: one scale; the head's input
    assert forward.bank.keys == ["a:input", "b:input", "head:input"]
    # pooling and concatenation move what `a` and the sum have made, on one grid
    assert [site[0] for site, action in forward.live.actions.items() if action.result == 1] == ["", ""]
    assert forward.kept_float == {}
    where = [n.args[0].name for n, m in fakes(forward.graph()).items() if isinstance(m, ActivationFakeQuant)]
    assert where == ["x", "relu", "relu_1", "relu_2"]  # before pooling and concatenation; nothing after the head


def test_a_sum_leaves_the_later_convolution_to_the_engine():
    forward = take_over(Block(projected=True), torch.randn(4, 3, 8, 8))
    # the skip runs last: engines add in its accumulator; the other branch is rounded
    assert [key for key in forward.bank.keys if key.startswith("add")] == ["add1:0"]
    both = take_over(Block(projected=True), torch.randn(4, 3, 8, 8), target=target_of("onnxruntime"))
    summands = {site[0] for site, action in both.live.actions.items() if action.result is not None and site[0]}
    assert summands == {"norm", "skip"}


def test_onnxruntime_gets_results_in_integers_too_except_the_networks():
    class Head(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            return self.b(nn.functional.silu(self.a(x)))

    forward = take_over(Head(), torch.randn(2, 3, 8, 8), target=target_of("onnxruntime"))
    assert forward.bank.keys == ["a:input", "a:output"]
    assert forward.kept_float == {
        "b": "onnxruntime would need its result in integers too, and that is the network's output"
    }


def test_rectifiers_are_part_of_the_fake_quant_in_training_and_the_gradients_are_the_same():
    torch.manual_seed(0)
    module, x = Block(), torch.randn(8, 3, 8, 8)
    module.drop.p = 0.0
    forward = take_over(module, x)
    learn(module, forward, x)
    called = []

    class Seen(TorchFunctionMode):
        """Inside of the quantization: sees the functions that it leaves."""

        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Seen():
        fused = gradients(module, x)
    assert called.count("relu") == 0
    for action in forward.live.actions.values():
        action.clip = None  # the same arithmetic, with the rectifiers before the fake-quants
    with Seen():
        called.clear()
        apart = gradients(module, x)
    assert called.count("relu") == 3
    assert all(torch.equal(a, b) for a, b in zip(fused, apart, strict=True))


def gradients(module, x):
    module.zero_grad()
    module(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


def test_a_rectifier_that_somebody_else_reads_stays():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.a, self.b = nn.LayerNorm(6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            y = torch.relu(self.norm(x))
            return self.b(torch.relu(self.a(y))), y.mean()

    module, x = Two(), torch.randn(4, 6)
    forward = take_over(module, x)
    learn(module, forward, x)
    # not rounded: no engine computes it in integers
    assert torch.equal(module(x)[1], torch.relu(module.norm(x)).mean())


@pytest.mark.parametrize(("causal", "shared"), [(True, False), (False, True), (True, True)])
def test_attention_in_parts_is_causal_and_shares_heads_as_the_fused_kernel_does(causal, shared):
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 5, 8) for heads in (4, *((2, 2) if shared else (4, 4))))
    options = {"is_causal": causal, "enable_gqa": shared}
    want = torch.nn.functional.scaled_dot_product_attention(query, key, value, **options)
    got = attention(lambda part, index, x: x, query, key, value, **options)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("masked", [None, "bool", "float"])
def test_attention_taken_apart_equals_the_fused_kernel(masked):
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv = nn.Linear(8, 24)

        def forward(self, x, mask=None):
            q, k, v = self.qkv(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            return nn.functional.scaled_dot_product_attention(q, k, v, mask)

    module, x = Attends().eval(), torch.randn(3, 5, 8)
    mask = {"bool": torch.rand(3, 1, 5, 5) < 0.7, "float": torch.randn(3, 1, 5, 5)}.get(masked)
    if mask is not None:  # a query that may see nothing
        mask[0, 0, 2] = False if masked == "bool" else -torch.inf
    args = (x,) if mask is None else (x, mask)
    want = module(*args)
    forward = take_over(module, *args)
    names = ["qkv", "attention_scores1", "attention_values1"]
    assert forward.quantized == names
    result = module(*args)
    assert torch.allclose(result, want, atol=1e-6)
    result.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in module.parameters())
    learn(module, forward, *args)
    module.eval()
    assert (module(*args) - want).abs().max() < 0.05 * want.abs().max()
    excluded = take_over(Attends(), *args, exclude=("attention_*",))
    assert excluded.quantized == ["qkv"]


@pytest.mark.parametrize("name", ["unet", "bert", "gated", "inception"])
@pytest.mark.parametrize("target", [EVERYTHING, target_of("onnxruntime"), target_of("tensorrt")], ids=lambda t: t.name)
def test_convert_equals_evaluation_bit_for_bit_for_all_kinds(name, target):
    module, inputs = network(name), samples(name, 8)
    plain = module(*inputs)
    forward = take_over(module, *inputs, target=target)
    module.eval()
    assert torch.allclose(module(*inputs), plain, atol=1e-5)  # fake-quant is off
    learn(module, forward, *inputs)
    module.eval()
    with torch.no_grad():
        converted, trained = convert(forward)
        assert torch.equal(converted.forward(*inputs), module(*inputs))
    assert trained.weights
    kinds = set(forward.kept_float.values())
    assert not any("has no integer kernel in everything" in kind for kind in kinds if "LSTM" not in kind)


def test_what_a_target_cannot_do_is_said():
    unet = take_over(network("unet"), *samples("unet", 2), target=target_of("onnxruntime"))
    assert unet.kept_float["up2"] == "onnxruntime has no integer kernel for a transposed convolution"
    lstm = take_over(network("lstm"), *samples("lstm", 2), target=target_of("onnxruntime"))
    assert lstm.kept_float["cells.lstm1"] == "LSTM has no integer kernel in onnxruntime"


def test_every_network_of_the_zoo_trains_quantized():
    for name in ZOO:
        module, inputs = network(name), samples(name, 4)
        forward = take_over(module, *inputs, target=target_of("openvino"))
        learn(module, forward, *inputs)
        module.train()
        module(*inputs).square().mean().backward()
        gone = [key for key, p in module.named_parameters() if p.grad is None]
        assert gone == [], name


def test_targets_of_ones_own_are_checked():
    with pytest.raises(ValueError, match="Argument `activations` must be one of"):
        Target("x", "int4", 127, ("onnxruntime",), "")
    with pytest.raises(ValueError, match="Argument `weight_max` must be from 1 to 127"):
        Target("x", "int8", 255, ("onnxruntime",), "")
    with pytest.raises(ValueError, match=r"Argument `operators` must hold some of .*, but got \['sort'\]"):
        Target("x", "int8", 127, ("onnxruntime",), "", operators=("sort",))
    with pytest.raises(ValueError, match="Argument `rest` must be"):
        Target("x", "int8", 127, ("onnxruntime",), "", rest="fp8")
    assert target_of(EVERYTHING) is EVERYTHING
