"""Quantization in the user's own ``forward``: whatever Python it reads is read in each step."""

import random
from types import MethodType

import lightning as L
import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from lightning_accel.calls.shapes import describe_inputs
from lightning_accel.errors import CaptureError, InvalidArgumentError
from lightning_accel.quantization.arithmetic.targets import target_of
from lightning_accel.quantization.graph.convert import convert
from lightning_accel.quantization.graph.prepare import QuantizedForward, quantized_forwards

TARGETS = ("onnxruntime", "openvino", "tensorrt", "portable")


def quantized(module, *args, target="portable", active=True, **options):
    """Quantize in place, with ranges of one batch."""
    forward = QuantizedForward(module, describe_inputs(args, {}), target_of(target), **options)
    forward.take_over()
    module.train()
    forward.bank.learning = True
    module(*args)
    forward.bank.learning = False
    forward.bank.update()
    if active:
        forward.bank.activate()
    return forward


def gradients(module, *args):
    module.zero_grad()
    module(*args).square().sum().backward()
    return [p.grad.clone() for p in module.parameters() if p.grad is not None]


class Block(nn.Module):
    def __init__(self, inplace):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.relu, self.inplace = nn.ReLU(inplace=inplace), inplace

    def forward(self, x):
        y = self.norm2(self.conv2(self.relu(self.norm(self.conv(x)))))
        if self.inplace:
            y += x
        else:
            y = y + x
        return self.relu(y)


class Residual(nn.Module):
    def __init__(self, inplace=True):
        super().__init__()
        self.stem, self.body = nn.Conv2d(3, 8, 3), nn.Sequential(Block(inplace), Block(inplace))
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(functional.adaptive_avg_pool2d(self.body(self.stem(x)), 1).flatten(1))


@pytest.mark.parametrize("target", TARGETS)
def test_evaluation_equals_the_exported_graph_bit_for_bit(target):
    torch.manual_seed(0)
    module, x = Residual(), torch.randn(6, 3, 10, 10)
    forward = quantized(module, x, target=target)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), convert(forward)[0](x))


class Moved(nn.Module):
    """Tensors that dropout, a view, a slice and a concatenation move, each read in float as well."""

    def __init__(self):
        super().__init__()
        self.norm, self.a, self.b, self.c = nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(16, 4)
        self.conv, self.drop = nn.Conv1d(4, 4, 1), nn.Dropout(0.1)

    def forward(self, x):  # (N, 4, 8)
        y = self.drop(self.norm(x))
        y = y + self.a(y)
        z = torch.sigmoid(y)
        first, second = z.chunk(2, dim=1)
        joined = torch.cat([first, second], 1)
        w = self.conv(joined) + joined
        v = torch.cat([torch.tanh(w), y], -1)
        return self.c(v) + v.mean() + self.b(y.view(-1, 8)).view_as(y)[..., :4]


@pytest.mark.parametrize("target", TARGETS)
def test_what_is_moved_is_quantized_for_all_that_read_it_afterwards(target):
    torch.manual_seed(0)
    module, x = Moved(), torch.randn(6, 4, 8)
    forward = quantized(module, x, target=target)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), convert(forward)[0](x))


@pytest.mark.parametrize("target", TARGETS)
def test_in_place_operators_train_as_the_others(target):
    torch.manual_seed(0)
    one, x = Residual(inplace=True), torch.randn(6, 3, 10, 10)
    other = Residual(inplace=False)
    other.load_state_dict(one.state_dict())
    quantized(one, x, target=target)
    quantized(other, x, target=target)
    assert torch.equal(one(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(gradients(one, x), gradients(other, x), strict=True))


@pytest.mark.parametrize("target", TARGETS)
def test_a_tensor_that_is_read_by_what_overwrites_another(target):
    """As in GhostNet: a rectifier's result is added in place to a later one."""

    class Ghost(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.a, self.b = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = functional.relu_(self.stem(x))
            y = self.a(x)
            y += x
            return self.b(y).mean((2, 3))

    torch.manual_seed(0)
    module, x = Ghost(), torch.randn(4, 3, 8, 8)
    forward = quantized(module, x, target=target)
    gradients(module, x)
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), convert(forward)[0](x))


def test_a_result_that_nobody_takes_is_seen_in_the_tensor_that_was_overwritten():
    class Dropped(nn.Module):
        def __init__(self, dropped):
            super().__init__()
            self.a, self.b, self.dropped = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3), dropped

        def forward(self, x):
            y = self.a(x)
            if self.dropped:
                functional.relu(input=y, inplace=True)
                return self.b(y) + y.mean()
            y = functional.relu(y)
            return self.b(y) + y.mean()

    torch.manual_seed(0)
    one, other, x = Dropped(True), Dropped(False), torch.randn(4, 3, 8, 8)
    other.load_state_dict(one.state_dict())
    quantized(one, x)
    quantized(other, x)
    assert torch.equal(one(x), other(x))
    assert all(torch.equal(a, b) for a, b in zip(gradients(one, x), gradients(other, x), strict=True))


def test_before_fake_quant_is_active_the_network_is_the_users_bit_for_bit():
    torch.manual_seed(0)
    one, x = Residual(), torch.randn(6, 3, 10, 10)
    other = Residual()
    other.load_state_dict(one.state_dict())
    other.train()(x)  # as often as ranges were learned
    quantized(one, x, active=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(one, x), gradients(other, x), strict=True))
    assert torch.equal(one.body[0].norm.running_var, other.body[0].norm.running_var)


class Reads(nn.Module):
    """A forward that reads Python: numbers, flags, coins and buffers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.drop = nn.Linear(6, 6), nn.Linear(6, 3), nn.Dropout(0.0)
        self.temperature, self.frozen, self.layer_drop, self.calls = 1.0, False, 0.0, 0
        self.register_buffer("offset", torch.zeros(6))

    def forward(self, x):
        self.calls += 1
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            y = x if self.training and random.random() < self.layer_drop else self.a(x)
        return self.b(self.drop(y + self.offset)) / self.temperature


@pytest.fixture
def reads():
    torch.manual_seed(0)
    module = Reads()
    return module, quantized(module, torch.randn(16, 6)), torch.randn(16, 6)


def test_what_forward_reads_is_read_in_each_step(reads):
    module, _, x = reads
    before = module(x)
    module.temperature = 4.0
    assert torch.equal(module(x), before / 4)
    module.temperature = 1.0
    module.drop.p = 1.0
    assert torch.equal(module(x), module.b.bias.expand(16, 3))
    module.drop.p = 0.0
    module.frozen = True
    gradients(module, x)
    assert module.a.weight.grad is None
    module.frozen = False
    gradients(module, x)
    assert module.a.weight.grad is not None
    module.offset = torch.ones(6)  # another tensor
    assert not torch.equal(module(x), before)


def test_planning_leaves_no_trace_in_the_module(reads):
    module, forward, x = reads
    calls = module.calls
    forward.graph()
    forward.follow()
    assert module.calls == calls
    module(x)
    assert module.calls == calls + 1


def test_a_layer_that_a_coin_leaves_out_is_quantized_whenever_it_runs():
    torch.manual_seed(0)
    module, x = Reads(), torch.randn(16, 6)
    module.layer_drop = 0.5
    forward = quantized(module, x)
    assert forward.quantized == ["a", "b"]
    random.seed(1)
    found = {float(module(x).sum().detach()) for _ in range(20)}
    assert len(found) == 2  # with and without the layer


def test_the_exported_file_holds_what_python_says_at_the_end(reads, tmp_path):
    module, forward, x = reads
    module.temperature = 2.0
    module.eval()
    with torch.no_grad():
        assert torch.equal(convert(forward)[0](x), module(x))


def test_operators_that_change_after_the_start_are_an_error_that_names_the_attribute():
    class Switched(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.extra, self.warm = nn.Linear(6, 6), nn.Linear(6, 3), nn.Linear(6, 6), False

        def forward(self, x):
            y = self.a(x)
            return self.b(self.extra(y) if self.warm else y)

    module, x = Switched(), torch.randn(16, 6)
    forward = QuantizedForward(module, describe_inputs((x,), {}), target_of("portable"))
    assert forward.quantized == ["a", "b"]
    module.warm = True
    forward.follow()  # no range is learned yet: planned anew
    assert forward.quantized == ["a", "extra", "b"]
    module.__dict__.pop("forward", None)
    forward.take_over()
    module.train()
    forward.bank.learning = True
    module(x)
    forward.bank.update()
    module.warm = False
    with pytest.raises(InvalidArgumentError, match=r"now runs others: \['extra'\].*`warm` was True and is False"):
        forward.follow()


def test_evaluation_that_depends_on_a_coin_is_refused():
    class Coin(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.ModuleList(nn.Linear(6, 6) for _ in range(12))

        def forward(self, x):
            x = self.a(x)
            for layer in self.b:
                x = layer(x) if np.random.rand() < 0.5 else x
            return x

    with pytest.raises(CaptureError, match=r"`Coin` must run the same operators in each evaluation, but what `b\.\d+`"):
        QuantizedForward(Coin(), describe_inputs((torch.randn(4, 6),), {}), target_of("portable"))


def test_a_function_that_runs_more_often_than_planned_is_an_error():
    class Loops(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.times = nn.Linear(6, 6), 2

        def forward(self, x):
            for _ in range(self.times):
                x = torch.relu(self.a(x))
            return x

    module, x = Loops(), torch.randn(16, 6)
    quantized(module, x)
    module.times = 3
    with pytest.raises(InvalidArgumentError, match=r"Module `Loops\.a` must call `linear` 2 times.*but got 3"):
        module(x)


@pytest.mark.parametrize("patch", ["method", "attribute", "child"])
def test_a_forward_that_the_user_has_set_on_an_instance_stays(patch):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 3)

        def features(self, x):
            return self.a(x) * 3

        def forward(self, x):
            return self.b(self.a(x))

    torch.manual_seed(0)
    module, x = Net(), torch.randn(16, 6)
    if patch == "method":
        module.forward = MethodType(lambda self, x: self.b(self.a(x) * 2), module)
    elif patch == "attribute":
        module.forward = module.features
    else:
        inner = module.b.forward
        module.b.forward = lambda x: inner(x) - 5
    with torch.no_grad():
        want = module.eval()(x)
    forward = quantized(module, x)
    module.eval()
    with torch.no_grad():
        got = module(x)
        assert torch.equal(convert(forward)[0](x), got)
    assert (got - want).abs().max() < 0.05 * want.abs().max()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpoints_run_again_at_the_same_call_sites(reentrant):
    class Checkpointed(Residual):
        saves = True

        def forward(self, x):
            x = self.stem(x)
            for block in self.body:
                x = checkpoint(block, x, use_reentrant=reentrant) if self.saves and self.training else block(x)
            return self.head(x.mean((2, 3)))

    torch.manual_seed(0)
    module, x = Checkpointed(), torch.randn(6, 3, 10, 10)
    for norm in (m for m in module.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.momentum = 0.0  # running again doesn't move the statistics
    forward = quantized(module, x)
    saved = gradients(module, x)
    module.saves = False
    assert all(torch.equal(a, b) for a, b in zip(saved, gradients(module, x), strict=True))
    assert forward.bank.active


def test_outputs_that_are_also_read_in_integers_are_returned_in_float():
    class Features(nn.Module):
        def __init__(self, inplace):
            super().__init__()
            self.a, self.b, self.relu = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 2, 3), nn.ReLU(inplace)

        def forward(self, x):
            y = self.relu(self.a(x))
            return {"features": y, "out": self.b(y)}

    for inplace in (False, True):
        torch.manual_seed(0)
        module, x = Features(inplace), torch.randn(4, 3, 8, 8)
        forward = quantized(module, x)
        for training in (True, False):
            module.train(training)
            with torch.no_grad():
                y = module(x)
            grid = y["features"] / forward.bank.scales[1]
            assert (grid - grid.round()).abs().max() > 0.1
        with torch.no_grad():
            assert all(torch.equal(y[key], value) for key, value in convert(forward)[0](x).items())


def test_a_plan_of_plain_values_quantizes_another_instance_without_a_capture(reads, monkeypatch):
    module, forward, x = reads
    record = forward.record()
    other = Reads()
    other.load_state_dict(module.state_dict())
    monkeypatch.setattr("lightning_accel.quantization.graph.prepare.capture", None)
    again = QuantizedForward(other, describe_inputs((x,), {}), target_of("portable"), record=record)
    again.take_over()
    again.bank.load_state_dict(forward.bank.state_dict())
    for training in (True, False):
        assert torch.equal(other.train(training)(x), module.train(training)(x))
    assert again.record() == record
    assert quantized_forwards(other) == {"": again}


def test_trial_runs_log_nothing():
    class Logs(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.a, self.logged = nn.Linear(6, 3), []

        def log(self, name, value):
            self.logged.append(name)

        def forward(self, x):
            y = self.a(x)
            self.log("mean", y.mean())
            return y

    module, x = Logs(), torch.randn(16, 6)
    forward = quantized(module, x)
    assert module.logged == ["mean"]  # by the call in `quantized`
    forward.follow()
    forward.graph()
    assert module.logged == ["mean"]


def test_a_compiled_network_computes_in_integers_too():
    torch.manual_seed(0)
    module, x = Residual(), torch.randn(6, 3, 10, 10)
    quantized(module, x)
    module.eval()
    with torch.no_grad():
        want = module(x)
        assert torch.equal(torch.compile(module, backend="eager")(x), want)


class Shared(nn.Module):
    """One layer under two names: torch captures such a network through proxies of its submodules."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU())
        self.first = self.second = nn.Linear(8, 8, bias=False)

    def forward(self, x):
        h = self.body(x)
        return self.first(h) - self.second(h.flip(-1))


@pytest.mark.parametrize("target", TARGETS)
def test_a_submodule_under_two_names(target):
    module, x = Shared(), torch.randn(16, 8)
    forward = quantized(module, x, target=target)
    assert {"body.0", "body.2", "first"} <= set(forward.quantized)
    assert not forward.kept_float
    module.eval()
    with torch.no_grad():
        assert torch.equal(module(x), convert(forward)[0](x))


class Drops(nn.Module):
    """Leaves out residual blocks by a coin, with the additions in one `forward`."""

    def __init__(self):
        super().__init__()
        self.blocks, self.head = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)]), nn.Linear(8, 2)

    def forward(self, x):
        for block in self.blocks:
            if not self.training or torch.rand(()) > 0.3:
                x = x + block(x)
        return self.head(x)


def test_a_coin_that_changes_how_often_something_is_called_is_told_before_the_first_step():
    with pytest.raises(
        InvalidArgumentError,
        match=r"Module `Drops` must call `TensorBase\.add` \d times.*Put each way into a submodule",
    ):
        quantized(Drops(), torch.randn(4, 8))


def test_heads_that_share_keys_are_repeated_or_not_by_what_the_mask_holds():
    from transformers import LlamaConfig, LlamaModel

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
            self.net = LlamaModel(LlamaConfig(vocab_size=60, num_hidden_layers=2, max_position_embeddings=16, **sizes))

        def forward(self, ids, mask):
            return self.net(input_ids=ids, attention_mask=mask, use_cache=False)[0]

    torch.manual_seed(0)
    ids, padded = torch.randint(60, (4, 8)), (torch.arange(8) < torch.tensor([[8], [8], [5], [3]])).long()
    module = Encoder()
    quantized(module, ids, padded, target="onnxruntime")
    whole = module(ids[:2], torch.ones_like(ids[:2]))  # without padding, keys are shared inside of the attention
    torch.testing.assert_close(whole, module(ids, padded)[:2], rtol=1e-5, atol=1e-5)
