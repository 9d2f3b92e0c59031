import copy
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.functional import scaled_dot_product_attention

from lightning_accel.calls.batches import canonical_call
from lightning_accel.calls.contexts import own_signature
from lightning_accel.calls.shapes import describe_inputs
from lightning_accel.errors import CaptureError
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantized_forwards
from tests.support.models import Residual

PORTABLE = target_of("portable")


class DropPath(nn.Module):
    """Stochastic depth, as it is usually written."""

    def forward(self, x):
        if not self.training:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) < 0.7
        return x * keep / 0.7


class Everything(nn.Module):
    """Whatever is known to behave differently in train and eval mode."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8, eps=1e-3, momentum=0.03)
        self.path, self.drop = DropPath(), nn.Dropout(0.2)
        self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.conv(x)))
        x = x + self.path(torch.relu(x))
        tokens = self.drop(x.flatten(2).transpose(1, 2))
        q, k, v = self.qkv(tokens).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)  # (N, heads, T, D) each
        y = scaled_dot_product_attention(q, k, v, dropout_p=0.3 if self.training else 0.0)
        return self.out(y.transpose(1, 2).flatten(2).mean(1))


def quantized(module, *args, target=PORTABLE, learn=2, **kwargs):
    """Take over a module's forward, learn ranges in train mode, and switch fake-quant on."""
    call = canonical_call(own_signature(module), args, kwargs)
    forward = QuantizedForward(module, describe_inputs(*call), target)
    module.__dict__["forward"] = forward
    module.train()
    for _ in range(learn):
        forward.bank.learning = True
        module(*args, **kwargs)
        forward.bank.learning = False
        forward.bank.update()
    forward.bank.active = True
    return forward


def make(name):
    torch.manual_seed(1)
    if name == "transformer":
        layer = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.3, batch_first=True)
        return nn.Sequential(
            nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(16, 3)
        ), torch.randn(5, 7, 16)
    return {"residual": Residual, "everything": Everything}[name](), torch.randn(6, 3, 8, 8)


@pytest.mark.parametrize("name", ["residual", "everything", "transformer"])
def test_eval_without_fake_quant_is_eager_eval(name):
    module, x = make(name)
    module.train()
    for _ in range(3):
        module(x)  # batch norm statistics
    want = copy.deepcopy(module).eval()(x)
    forward = quantized(module, x, learn=0)
    forward.bank.active = False
    module.eval()
    assert (module(x) - want).abs().max() <= 1e-6 * want.abs().max()


@pytest.mark.parametrize("name", ["residual", "everything", "transformer"])
def test_eval_is_deterministic_and_does_not_depend_on_the_batch(name):
    module, x = make(name)
    quantized(module, x)
    module.eval()
    first, second = module(x), module(x)
    assert torch.equal(first, second)
    alone = torch.cat([module(x[i : i + 1]) for i in range(len(x))])
    assert ((alone - first).abs().max() / first.abs().max()) < 0.05  # flips of single roundings at most


@pytest.mark.parametrize("name", ["residual", "everything"])
def test_training_trains_what_eager_training_trains(name):
    module, x = make(name)
    twin = copy.deepcopy(module)
    forward = quantized(module, x, learn=0)
    forward.bank.active = False
    module.train(), twin.train()
    torch.manual_seed(5)
    module(x).square().sum().backward()
    torch.manual_seed(5)
    twin(x).square().sum().backward()
    for (key, a), b in zip(module.named_parameters(), twin.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6), key
    for a, b in zip(module.buffers(), twin.buffers(), strict=True):
        assert torch.allclose(a, b)


class InPlace(nn.Module):
    """As torchvision writes it: rectified in place, summed in place, read again afterwards."""

    def __init__(self):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.conv3, self.act = nn.Conv2d(6, 6, 3, padding=1), nn.Conv2d(6, 6, 1), nn.ReLU(inplace=True)

    def forward(self, x):
        h = self.norm1(self.conv1(x))
        self.act(h)
        y = self.conv2(h)
        y += h
        y.mul_(2.0)
        z = self.conv3(self.act(y))
        return (z + y).mean((2, 3))


def test_operators_in_place():
    torch.manual_seed(2)
    module, x = InPlace(), torch.randn(5, 3, 8, 8)
    twin = copy.deepcopy(module)
    forward = quantized(module, x, learn=0)
    forward.bank.active = False
    module.train(), twin.train()
    ours, eager = module(x), twin(x)
    assert torch.allclose(ours, eager, atol=1e-6)
    ours.square().sum().backward(), eager.square().sum().backward()
    assert all(
        torch.allclose(a.grad, b.grad, rtol=1e-4, atol=1e-6)
        for a, b in zip(module.parameters(), twin.parameters(), strict=True)
    )
    forward.bank.learning = True
    module(x)
    forward.bank.update()
    forward.bank.active = True
    module(x).sum().backward()  # the gradient's saved tensors were not overwritten
    ranges = dict(zip(forward.bank.keys, forward.bank.low.tolist(), strict=True))
    assert ranges["conv2:input"] == ranges["conv3:input"] == 0.0  # seen after the rectifier, not before it
    module.eval()
    with torch.no_grad():
        assert torch.equal(convert(forward)[0].forward(x), module(x))


def test_the_module_stays_the_users():
    class Net(Residual):
        def __init__(self):
            super().__init__()
            self.unused, self.tied = nn.Linear(2, 2), self.head

        def describe(self):
            return "mine"

    module = Net()
    keys, objects = set(module.state_dict()), {n: id(p) for n, p in module.named_parameters()}
    quantized(module, torch.randn(4, 3, 8, 8))
    assert set(module.state_dict()) == keys
    assert {n: id(p) for n, p in module.named_parameters()} == objects
    assert (module.describe(), module.tied is module.head) == ("mine", True)
    assert list(module.children())[:2] == [module.conv1, module.norm1]


def test_a_loaded_state_and_a_replaced_buffer_are_seen():
    module, x = make("residual")
    quantized(module, x)
    module.eval()
    before = module(x)
    module._apply(lambda t: t.clone())  # what a device move does to buffers
    assert torch.equal(module(x), before)
    state = {k: v * 1.5 if v.is_floating_point() else v for k, v in module.state_dict().items()}
    module.load_state_dict(state)
    assert not torch.equal(module(x), before)


@pytest.mark.parametrize("target", ["tensorrt", "onnxruntime", "portable"])
@pytest.mark.parametrize("name", ["residual", "everything", "transformer"])
def test_convert_computes_what_evaluation_computes_bit_for_bit(name, target):
    module, x = make(name)
    forward = quantized(module, x, target=target_of(target))
    module.eval()
    with torch.no_grad():
        want = module(x)
        converted, _ = convert(forward)
        assert torch.equal(converted.forward(x), want)


@pytest.mark.parametrize("gamma", [1.0, -0.7, 0.0])
def test_integers_are_those_of_the_raw_weights_whatever_batch_norm_does(gamma):
    """Reference in NumPy, from the module's own tensors."""
    module, x = make("residual")
    forward = quantized(module, x)
    with torch.no_grad():
        module.norm1.weight[::2] = gamma
        module.conv1.weight[0, 0] = 0
    module.eval()
    want = module(x)
    converted, trained = convert(forward)
    assert torch.equal(converted.forward(x), want)
    integers, scale, axis = trained.weights["conv1_weight_int8"]
    w, norm = module.conv1.weight.detach().numpy(), module.norm1
    s = np.abs(w).max((1, 2, 3)) / np.float32(63)
    deviation = torch.sqrt(norm.running_var + norm.eps).numpy()  # torch's root isn't always the nearest: not NumPy's
    factor = norm.weight.detach().numpy() / deviation
    q = np.clip(np.rint(w / s[:, None, None, None]), -63, 63)
    assert axis == 0
    assert np.array_equal(integers.numpy(), q * np.sign(factor)[:, None, None, None])
    assert np.array_equal(scale.numpy()[factor != 0], (s * np.abs(factor))[factor != 0])
    assert (scale > 0).all()
    assert (integers[0, 0] == 0).all()


def test_the_same_tensor_is_quantized_once():
    module, x = make("residual")
    forward = quantized(module, x)
    # conv1's and conv2's inputs, the head's input; the sum reads conv2's input again, and conv2's accumulator as it is
    assert forward.bank.keys == ["conv1:input", "conv2:input", "head:input"]
    assert len(quantized_forwards(module)) == 1


def test_what_stays_float_is_named_with_its_reason():
    forward = quantized(*make("everything"))
    assert forward.kept_float == {
        "scaled_dot_product_attention1": "attention stays fused, in float: it isn't among the operators of portable, "
        "or can't be taken apart"
    }


def test_include_and_exclude():
    module, x = make("residual")
    forward = QuantizedForward(module, describe_inputs((x,), {}), PORTABLE, exclude=("head", "add*"))
    assert forward.bank.keys == ["conv1:input", "conv2:input"]
    assert forward.kept_float == {"add1": "excluded", "head": "excluded"}
    with pytest.raises(
        ValueError, match=r"Argument `include` must match the name of a quantizable operator, but got 'neck'"
    ):
        QuantizedForward(module, describe_inputs((x,), {}), PORTABLE, include=("neck",))
    with pytest.raises(ValueError, match="must leave an operator to quantize"):
        QuantizedForward(module, describe_inputs((x,), {}), PORTABLE, exclude=("*",))


class Call(nn.Module):
    """Every way to pass an input."""

    def __init__(self):
        super().__init__()
        self.embed, self.linear = nn.Embedding(11, 6), nn.Linear(6, 2)

    def forward(self, ids, batch, *rest, mask=None, scale: float = 1.0, **more):
        x = self.embed(ids) + batch["x"] + batch["nested"][0]
        x = x + sum(rest) + more["bias"]
        if mask is not None:
            x = x * mask.unsqueeze(-1)
        return {"y": self.linear(x) * scale, "pair": (x, ids)}


def test_any_signature():
    module = Call()
    ids, x = torch.randint(0, 11, (4,)), torch.randn(4, 6)
    args = (ids, {"x": x, "nested": [x]}, x, x)
    kwargs = {"mask": torch.tensor([True, False, True, True]), "bias": x}
    want = module.eval()(*args, **kwargs)
    forward = quantized(module, *args, learn=1, **kwargs)
    forward.bank.active = False
    module.eval()
    got = module(*args, **kwargs)
    assert torch.equal(got["y"], want["y"])
    assert torch.equal(got["pair"][1], ids)
    fewer = (ids[:3], {"x": x[:3], "nested": [x[:3]]}, x[:3], x[:3])
    assert module(*fewer, mask=kwargs["mask"][:3], bias=x[:3])["y"].shape == (3, 2)


def test_a_call_that_the_file_will_not_take_is_computed_with_a_warning():
    module, x = make("residual")
    quantized(module, x)
    module.train()(torch.randn(6, 3, 9, 9))  # of training alone: the user's own business
    module.eval()
    with pytest.warns(
        UserWarning, match=r"must have shape \(N, 3, 8, 8\), as captured, but got \(6, 3, 9, 9\).*won't take it"
    ):
        larger = module(torch.randn(6, 3, 9, 9))
    assert larger.shape == module(x).shape
    module(torch.randn(6, 3, 10, 10))  # told once


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder, self.head = nn.Sequential(nn.Linear(4, 64), nn.ReLU()), nn.Linear(64, 2)

    def forward(self, x):
        y = self.encoder(x)
        if y.sum() > 0:  # the line that can't be captured
            y = y * 2
        return self.head(y)


def test_a_module_that_cannot_be_captured_names_the_line_and_a_submodule_that_can():
    with pytest.raises(
        CaptureError, match=r"(?s)`Branches.forward`.*test_prepare.py:\d+\).*submodule `encoder` can be captured"
    ) as error:
        QuantizedForward(Branches(), describe_inputs((torch.randn(3, 4),), {}), PORTABLE)
    assert "\n" not in str(error.value)


def test_a_copy_computes_the_same_with_its_own_weights():
    module, x = make("residual")
    quantized(module, x)
    module.eval()
    want = module(x)
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x), want)
        with torch.no_grad():
            twin.head.weight.zero_()
        assert not torch.equal(twin(x), want)
        assert torch.equal(module(x), want)


class Named(nn.Module):
    """Tensors with the names under which the integers of `head` and `body.0` are stored."""

    def __init__(self):
        super().__init__()
        self.body, self.head, self.embed = nn.Sequential(nn.Linear(4, 6)), nn.Linear(6, 2), nn.Embedding(5, 4)
        self.head_bias, self.body_0_weight_scale = nn.Parameter(torch.randn(2)), nn.Parameter(torch.rand(6))
        self.register_buffer("embed_weight_int8", torch.randn(4))

    def forward(self, ids):
        return (
            self.head(self.body(self.embed(ids) + self.embed_weight_int8) * self.body_0_weight_scale) + self.head_bias
        )


def test_tensors_of_the_users_may_have_the_names_that_convert_gives():
    module, ids = Named(), torch.randint(0, 5, (7,))
    forward = quantized(module, ids, target=target_of("onnxruntime"))
    module.eval()
    with torch.no_grad():
        converted, trained = convert(forward)
        assert torch.equal(converted.forward(ids), module(ids))
    assert set(trained.weights) == {"embed__weight_int8", "body_0__weight_int8", "head__weight_int8"}


def test_convert_without_ranges_is_refused():
    module, x = make("residual")
    with pytest.raises(ValueError, match="Ranges must have seen data"):
        convert(quantized(module, x, learn=0))


def test_capture_moves_no_random_generator():
    module, x = make("everything")
    state = torch.get_rng_state()
    QuantizedForward(module, describe_inputs((x,), {}), PORTABLE)
    assert torch.equal(torch.get_rng_state(), state)
