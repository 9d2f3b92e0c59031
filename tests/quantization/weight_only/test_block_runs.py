"""Calibration runs only the blocks that it needs, and finds what running the whole network each time finds."""

import copy
from itertools import groupby

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from lightning_accel.quantization.weight_only.awq import _clip, _scale, _watch
from lightning_accel.quantization.weight_only.block_runs import BlockRuns
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import block_of, inputs_of, rows_of, select_layers
from lightning_accel.quantization.weight_only.ptq import quantize_weights_

GRID = GroupGrid(4, 32)


def gptq_by_columns(weight, hessian):
    """GPTQ of one weight, as its paper writes it, with the element of largest magnitude pinned."""
    left, h = weight.clone(), hessian.double()
    h += torch.eye(len(h)) * 0.01 * h.diagonal().mean()
    upper = torch.linalg.cholesky(torch.cholesky_inverse(torch.linalg.cholesky(h)), upper=True).float()
    result = torch.empty_like(left)
    for first in range(0, left.shape[1], 32):
        block, inner = left[:, first : first + 32].clone(), upper[first : first + 32, first : first + 32]
        integers, scale = GRID.quantize(block)
        scale, extreme, errors = scale.float()[:, 0], block.abs().argmax(1), torch.empty_like(block)
        for j in range(32):
            nearest = (block[:, j] / scale).round().clamp(-8, 7)
            nearest = torch.where(extreme == j, integers[:, j].float(), nearest)
            result[:, first + j] = nearest * scale
            errors[:, j] = (block[:, j] - result[:, first + j]) / inner[j, j]
            block[:, j + 1 :] -= errors[:, j, None] * inner[j, j + 1 :]
        left[:, first + 32 :] -= errors @ upper[first : first + 32, first + 32 :]
    return result


def called(net, batch):
    return net(**batch) if isinstance(batch, dict) else net(batch)


@torch.no_grad()
def gptq_of_whole_runs(net, names, batches):
    """GPTQ with a run of the whole network for each block and batch."""
    for _, group in groupby(names, block_of):
        layers = [net.get_submodule(name) for name in group]
        sums = {layer: torch.zeros(inputs_of(layer), inputs_of(layer)) for layer in layers}

        def add(layer, args, sums=sums):
            x = args[0].reshape(-1, args[0].shape[-1])
            sums[layer].addmm_(x.t(), x)

        hooks = [layer.register_forward_pre_hook(add) for layer in layers]
        for batch in batches:
            called(net, batch)
        for hook in hooks:
            hook.remove()
        for layer in layers:
            rows_of(layer).copy_(gptq_by_columns(rows_of(layer), sums[layer]))


class WholeRuns:
    """In place of `BlockRuns` for AWQ: the network's results."""

    def __init__(self, net, batches):
        self.net, self.batches = net, batches

    def results(self, parts, index):
        return [leaf for leaf in tree_leaves(called(self.net, self.batches[index])) if isinstance(leaf, torch.Tensor)]


@torch.no_grad()
def awq_of_whole_runs(net, names, batches):
    """AWQ with runs of the whole network for each module that may make an input."""
    layers = {name: net.get_submodule(name) for name in names}
    seen = _watch(net, layers, batches, lambda batch: called(net, batch))
    for shared in seen.together:
        if shared.readers:
            _scale(net, shared, layers, seen, GRID, WholeRuns(net, batches))
    for name in names:
        _clip(layers[name], seen.vectors[name], GRID)
    for layer in layers.values():
        rows_of(layer).copy_(GRID(rows_of(layer)))


class Counted(nn.TransformerEncoderLayer):
    """A transformer block that counts its runs."""

    def __init__(self):
        super().__init__(64, 4, 96, batch_first=True, norm_first=True)
        self.runs = 0

    def forward(self, *args, **kwargs):
        self.runs += 1
        return super().forward(*args, **kwargs)


class Skipping(nn.Module):
    """Blocks with connections over other blocks, as in a U-Net; changes results in place if `inplace`."""

    def __init__(self, count=4, inplace=False):
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(count))
        self.head, self.inplace = nn.Linear(64, 32), inplace

    def forward(self, x):
        kept, half = [], len(self.blocks) // 2
        for block in self.blocks[:half]:
            x = block(x)
            kept.append(x)
        for block in self.blocks[half:]:
            x = block(x.add_(kept.pop()) if self.inplace else x + kept.pop())
        return self.head(x)


class Looped(nn.Module):
    """Blocks of which one runs as often as the data says."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(3))

    def forward(self, x):
        x = self.blocks[0](x)
        for _ in range(1 + int(x.shape[0] > 3)):
            x = self.blocks[1](x)
        return self.blocks[2](x)


class Remembering(nn.Module):
    """Blocks that use what the first one has put aside, as shared keys and values are."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleList([nn.Linear(64, 64), nn.Linear(64, 64)]) for _ in range(3))
        self.shared = nn.ModuleList(Aside() for _ in range(2))

    def forward(self, x):
        aside = []
        for one, two in self.blocks:  # lists of layers, which are called one by one
            x = x + two(one(x).relu())
        for block in self.shared:
            x = block(x, aside)
        return x


class Aside(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(64, 64)

    def forward(self, x, aside):
        y = self.inner(x)
        aside.append(y)
        return x + aside[0] * y.sigmoid()


class Outside(nn.Module):
    """A layer of a block that is called outside of it, too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.blocks[0].linear1(x)


class Sometimes(nn.Module):
    """Two layers that read the same tensor in some batches only."""

    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.one(x) + self.two(x if len(x) > 2 else x.sin())


def llama(count=3, **kwargs):
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 60, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**size, num_hidden_layers=count, num_key_value_heads=2, **kwargs)
    return transformers.LlamaForCausalLM(config)


def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=60, n_embd=64, n_layer=3, n_head=4, bos_token_id=None, eos_token_id=None
    )
    return transformers.GPT2LMHeadModel(config)


def t5():
    transformers = pytest.importorskip("transformers")
    size = {"vocab_size": 60, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
    return transformers.T5ForConditionalGeneration(transformers.T5Config(**size, decoder_start_token_id=0))


class Shares(nn.Module):
    """Later blocks read what the first has left on an object that isn't a module."""

    def __init__(self):
        super().__init__()
        store = {}
        self.blocks = nn.ModuleList(Reads(index, store) for index in range(4))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


class Reads(nn.Module):
    def __init__(self, index, store):
        super().__init__()
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.index, self.store = index, store

    def forward(self, x):
        if self.index == 0:
            self.store["value"] = self.a(x)
        return x + self.b(torch.relu(self.a(x + self.store["value"]) if self.index > 1 else self.a(x)))


class Features(nn.Module):
    """Returns what each block computed, too."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Counted() for _ in range(3))

    def forward(self, x):
        found = []
        for block in self.blocks:
            x = block(x)
            found.append(x)
        return (x, *found)


class ChangesItsInput(nn.Module):
    """Two layers read one tensor, which is changed in place in between."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)}) for _ in range(2))

    def forward(self, x):
        for block in self.blocks:
            x = x.clone()
            first = block["a"](x)
            x.relu_()
            x = first + block["b"](x)
        return x


def encoder():
    return nn.Sequential(*[nn.TransformerEncoderLayer(64, 4, 96, batch_first=True) for _ in range(3)])


def sometimes():
    return nn.Sequential(nn.Sequential(Sometimes(), nn.ReLU()), nn.Linear(64, 32))  # both layers are in one block


NETWORKS = {
    "llama": llama,
    "gpt2": gpt2,
    "t5": t5,
    "encoder": encoder,
    "skipping": Skipping,
    "in place": lambda: Skipping(inplace=True),
    "looped": Looped,
    "remembering": Remembering,
    "outside": Outside,
    "sometimes": sometimes,
    "shares": Shares,
    "features": Features,
    "changes": ChangesItsInput,
}


def made(make):
    torch.manual_seed(0)
    return make().eval()


def batches_of(net, count=3):
    generator = torch.Generator().manual_seed(1)
    if not hasattr(net, "config"):
        return [torch.randn(2 + i, 40, 64, generator=generator) for i in range(count)]
    ids = [torch.randint(0, 60, (2 + i, 40), generator=generator) for i in range(count)]
    return [{"input_ids": i, "labels": i} if net.config.model_type == "t5" else {"input_ids": i} for i in ids]


@pytest.mark.parametrize("make", NETWORKS.values(), ids=NETWORKS)
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_the_weights_equal_those_of_whole_runs(make, method):
    net = made(make)
    expected, batches = copy.deepcopy(net), batches_of(net)
    names = quantize_weights_(net, method=method, batches=batches)
    (gptq_of_whole_runs if method == "gptq" else awq_of_whole_runs)(expected, names, batches)
    weights = expected.state_dict()
    found = {name: layer.effective_weight() for name, layer in net.named_modules() if name in names}
    for name in names:
        assert torch.equal(found[name], rows_of(expected.get_submodule(name))), name
    for name, value in net.state_dict().items():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(value, weights[name]), name


@pytest.mark.parametrize("method", ["gptq", "awq"])
@pytest.mark.parametrize("make", [Shares, ChangesItsInput])
def test_one_batch_and_inference_mode_change_nothing(make, method):
    net = made(make)
    other, batches = copy.deepcopy(net), batches_of(net, 1)
    names = quantize_weights_(net, method=method, batches=batches)
    whole = copy.deepcopy(other)
    (gptq_of_whole_runs if method == "gptq" else awq_of_whole_runs)(whole, names, batches)

    def call(batch):
        with torch.inference_mode():
            return other(batch)

    quantize_weights_(other, method=method, batches=batches, call=call)
    for name in names:
        want = rows_of(whole.get_submodule(name))
        assert torch.equal(net.get_submodule(name).effective_weight(), want), name
        assert torch.equal(other.get_submodule(name).effective_weight(), want), name


@pytest.mark.parametrize("kind", ["chain", "skipping"])
@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_a_block_runs_as_often_in_a_deep_network(kind, method):
    most = {}
    for count in (4, 16):
        make = (lambda n=count: nn.Sequential(*[Counted() for _ in range(n)])) if kind == "chain" else None
        net = made(make or (lambda n=count: Skipping(n)))
        quantize_weights_(net, method=method, batches=batches_of(net))
        most[count] = max(part.runs for part in net.modules() if isinstance(part, Counted))
    assert most[16] == most[4]


def test_gptq_runs_a_block_three_times_for_a_batch():
    net = made(llama)
    net.requires_grad_(False)
    runs = []
    net.model.layers[1].mlp.register_forward_hook(lambda *_: runs.append(1))
    quantize_weights_(net, method="gptq", batches=batches_of(net, 5), exclude="lm_head")
    tried, ordered = (
        3,
        4,
    )  # the first batch with another in between, and the others to see in which order they call the blocks
    assert len(runs) == tried + ordered + 2 * 5


def test_a_block_that_is_left_out_does_not_run_again():
    net = made(lambda: Skipping(6))
    quantize_weights_(net, method="gptq", batches=batches_of(net, 1), include=["head", "blocks.4*", "blocks.5*"])
    tried = 4  # recorded, run with other values before each of two tries, and run in one of them
    assert max(block.runs for block in net.blocks[:4]) == tried + 1


def test_only_the_last_results_of_a_chain_are_kept():
    kept = {}
    for name, net in (("chain", made(lambda: llama(6))), ("skipping", made(lambda: Skipping(6)))):
        names, batches = select_layers(net, 32)[0], batches_of(net)
        with torch.no_grad():
            runs = BlockRuns(net, names, batches, lambda batch, net=net: called(net, batch))
            for _, group in groupby(names, block_of):
                block = list(group)
                runs.through(block)
                runs.finish(block)
        kept[name] = [sum(result.untyped_storage().nbytes() > 4 for result in one) for one in runs._kept]
    assert kept == {"chain": [1, 1, 1], "skipping": [6, 6, 6]}


def test_forwards_are_restored_when_a_run_fails():
    net = made(Skipping)
    with pytest.raises(RuntimeError, match="normalized_shape"):
        quantize_weights_(net, method="gptq", batches=[torch.randn(2, 8, 64), torch.randn(2, 8, 63)])
    assert not any("forward" in vars(part) for part in net.modules())


class Experts(nn.Module):
    """A mixture of experts: the sign of an input chooses the first or the second expert; the third one is never chosen."""

    def __init__(self):
        super().__init__()
        self.experts = nn.ModuleList(
            nn.ModuleDict({"up": nn.Linear(64, 64), "gate": nn.Linear(64, 64), "down": nn.Linear(64, 64)})
            for _ in range(3)
        )
        self.norm = nn.LayerNorm(64)

    def forward(self, x):
        y, result = self.norm(x), x.clone()
        for i, expert in enumerate(self.experts):
            chosen = [x[..., 0] >= 0, x[..., 0] < 0, x[..., 0] > 1e9][i]
            if chosen.any():
                part = y[chosen]
                hidden = expert["up"](part) * torch.nn.functional.silu(expert["gate"](part))
                result[chosen] += expert["down"](hidden)
        return result


def with_experts(blocks=2):
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Sequential(Experts(), nn.Identity()) for _ in range(blocks)])
    return nn.ModuleDict({"layers": net}).eval()


def signed_batches():
    """Batches of which the first one chooses one expert only, with some channels that are far larger."""
    x = torch.randn(2, 300, 64, generator=torch.Generator().manual_seed(0))
    x[..., ::16] *= 30
    x[0, :, 0], x[1, :, 0] = x[0, :, 0].abs() + 500, x[1, :, 0].abs() - 500
    return list(x)


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_an_expert_without_tokens_is_rounded_to_the_nearest(method):
    net, batches = with_experts(), signed_batches()
    before = {
        name: layer.weight.detach().clone() for name, layer in net.named_modules() if isinstance(layer, nn.Linear)
    }
    quantize_weights_(net, method=method, batches=batches, call=net["layers"])
    unseen = [name for name in before if ".experts.2." in name]
    assert len(unseen) == 6
    for name in unseen:
        assert torch.equal(net.get_submodule(name).effective_weight(), GRID(before[name])), name
    changed = [not torch.equal(net.get_submodule(n).weight, w) for n, w in before.items() if n not in unseen]
    assert all(changed)


def test_awq_leaves_a_float_network_with_experts_what_it_was(monkeypatch):
    from lightning_accel.quantization.weight_only.awq import scale_and_clip_

    monkeypatch.setattr("lightning_accel.quantization.weight_only.awq._clip", lambda *_: None)
    net, batches = with_experts(), signed_batches()
    for expert in (part for block in net["layers"] for part in block[0].experts):
        expert["up"].weight.data[::16] *= 30  # inputs of `down` that are far larger
    with torch.no_grad():
        before = [net["layers"](x) for x in batches]
        scale_and_clip_(net, select_layers(net, 32)[0], GRID, batches, net["layers"])
        for x, expected in zip(batches, before, strict=True):
            torch.testing.assert_close(net["layers"](x), expected, rtol=1e-4, atol=1e-4)
