"""Which channels leave, which are kept and why; what leaves computes what zeroing it computed."""

from copy import deepcopy

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification

from lightning_accel.pruning.channels.equivalence import find_groups
from lightning_accel.pruning.functional import prune_channels_
from tests.pruning import networks as nets

X, TOKENS = torch.randn(nets.IMAGES), torch.randint(0, 11, nets.TOKENS)


def bert():
    config = BertConfig(
        vocab_size=50,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=48,
        max_position_embeddings=16,
    )
    return BertForSequenceClassification(config)


WORDS = {
    "input_ids": torch.randint(0, 50, (3, 7)),
    "attention_mask": torch.tensor([[1] * 7, [1] * 5 + [0] * 2, [1] * 7]),
}

# network, input, {first layer: (units, channels in one)} of what may leave, {first layer: reason} of what is kept
CASES = [
    (nets.Residual, X, {"stem": (8, 1), "inner": (12, 1)}, {"head": "it reaches the output"}),
    (nets.Concatenated, X, {"a": (6, 1), "b": (4, 1), "c": (5, 1)}, {"head": "output"}),
    (
        lambda: nets.Concatenated(with_input=True),
        X,
        {"c": (5, 1)},
        {"a": "the channels of `b` can't be followed through the operations around it", "head": "output"},
    ),
    (nets.Grouped, X, {"a": (4, 4), "grouped": (3, 4), "b": (6, 1)}, {"head": "output"}),
    (
        nets.Auxiliary,
        X,
        {"stem": (8, 1), "deep": (12, 1)},
        {"auxiliary": "it reaches the output", "head": "output"},
    ),
    (nets.Flattened, X, {"conv": (6, 1), "linear": (10, 1)}, {"head": "output"}),
    (nets.GroupNormed, X, {"conv": (4, 3), "conv2": (5, 1)}, {"head": "output"}),
    (nets.Gated, X, {"up": (8, 2), "down": (6, 1)}, {"head": "output"}),
    (nets.Squeezed, X, {"conv": (8, 1), "squeeze": (4, 1)}, {"head": "output"}),
    (
        lambda: nets.Transformer(nets.FusedAttention("unbind")),
        X,
        {"attention.qkv": (4, 12), "fc1": (24, 1)},
        {"patches": "LayerNorm `norm1` normalises over its channels", "head": "output"},
    ),
    (
        lambda: nets.Transformer(nets.FusedAttention("index")),
        X,
        {"attention.qkv": (4, 12), "fc1": (24, 1)},
        {"patches": "LayerNorm", "head": "output"},
    ),
    (
        lambda: nets.Transformer(nets.FusedAttention("fixed")),
        X,
        {"fc1": (24, 1)},
        {
            "attention.qkv": "forward needs all of its channels: shape '[2, 4, 16]' is invalid",
            "patches": "LayerNorm `norm1` normalises over its channels",
            "head": "output",
        },
    ),
    (
        lambda: nets.Transformer(nets.SeparateAttention()),
        X,
        {"attention.q": (2, 8), "fc1": (24, 1)},
        {"patches": "LayerNorm", "head": "output"},
    ),
    (
        nets.Encoder,
        TOKENS,
        {"encoder.layers.0.linear1": (24, 1), "encoder.layers.1.linear1": (24, 1)},
        {
            "encoder.layers.0.linear2": "nn.MultiheadAttention has heads as wide as its embedding asks for",
            **{f"encoder.layers.{i}.self_attn.out_proj": "nn.MultiheadAttention has heads" for i in (0, 1)},
            "head": "output",
        },
    ),
    (
        bert,
        WORDS,
        {
            **{f"bert.encoder.layer.{i}.attention.self.query": (4, 8) for i in (0, 1)},
            **{f"bert.encoder.layer.{i}.intermediate.dense": (48, 1) for i in (0, 1)},
            "bert.pooler.dense": (32, 1),
        },
        {"bert.encoder.layer.0.attention.output.dense": "LayerNorm", "classifier": "output"},
    ),
    (
        nets.Tied,
        X,
        {},
        {
            "first": "it shares `middle.weight` with `other`",
            "middle": "it shares `middle.weight`",
            "last": "output",
            "other": "the operations around it can't be followed",
        },
    ),
    (
        nets.Fixed,
        X,
        {"free": (6, 1)},
        {"conv": "forward needs all of its channels: shape '[-1, 8, 36, 1]' is invalid", "head": "output"},
    ),
    (
        nets.Softmaxed,
        X,
        {"b": (6, 1)},
        {"a": "without some of its channels the others compute something else", "head": "output"},
    ),
    (
        nets.Reused,
        X,
        {"conv": (8, 1), "last": (6, 1)},
        {"head": "output", "auxiliary": "forward doesn't run it"},
    ),
    (nets.Recurrent, X, {"linear": (7, 1)}, {"embed": "the channels of `embed` can't be followed", "head": "output"}),
    (nets.Single, X, {"conv": (8, 1)}, {"head": "output"}),
    (nets.Skipping, X, {"stem": (8, 1), "down": (12, 1), "up": (8, 1), "out": (6, 1)}, {"head": "output"}),
    (nets.Growing, X, {"stem": (6, 1), "a": (4, 1), "b": (5, 1)}, {"head": "output"}),
    (
        nets.Shuffled,
        X,
        {"a": (4, 3), "b": (6, 1)},
        {"grouped": "without some of its channels the others compute something else", "head": "output"},
    ),
    (
        lambda: nets.Halves(2),
        X,
        {
            "first.0.0": (6, 1),
            "first.1.0": (6, 1),
            "stem": (6, 1),
            "others.0.0": (8, 1),
            "others.1.0": (8, 1),
            "last": (10, 1),
        },
        {
            "first.0.4": "can't be followed through the operations around it",
            "others.1.4": "its channels all depend on each other",
            "head": "output",
        },
    ),
    (
        nets.Dropping,
        X,
        {"stem": (64, 1), "middle": (24, 1), "deep": (16, 1)},
        {"head": "output"},
    ),
    (nets.Scaled, X, {"up": (32, 1)}, {"stem": "LayerNorm `norm` normalises over its channels", "head": "output"}),
    (
        nets.Parametrized,
        X,
        {"free": (6, 1)},
        {
            "conv": "forward needs all of its channels: the weight of `conv` is computed (WeightNorm); remove that",
            "head": "output",
        },
    ),
    (nets.Glu, X, {"a": (8, 2), "b": (6, 2)}, {"head": "output"}),
    (nets.Sliced, X, {"down": (6, 1)}, {"up": "forward needs all of its channels: ", "head": "output"}),
    (
        nets.Gpt,
        TOKENS,
        {"value": (8, 1), "fc": (20, 1)},
        {"proj": "LayerNorm `norm` normalises over its channels", "head": "output"},
    ),
]
NAMES = [
    *(
        "residual",
        "concatenation",
        "input between",
        "grouped",
        "head of train mode",
        "flatten",
        "group norm",
        "chunk",
        "squeeze",
        "qkv unbind",
        "qkv index",
    ),
    *(
        "fixed reshape",
        "q, k, v",
        "torch encoder",
        "bert",
        "tied",
        "fixed channels",
        "softmax",
        "reused",
        "recurrent",
        "float32",
        "skip connection",
        "dense",
        "shuffle",
        "halves",
        "dropout as a function",
        "layer scale",
        "weight norm",
        "glu",
        "slices",
        "Hugging Face's Conv1D",
    ),
]


def call_of(x):
    return ((), x) if isinstance(x, dict) else ((x,), {})


@pytest.mark.parametrize(("make", "x", "leave", "kept"), CASES, ids=NAMES)
def test_what_may_leave_and_what_is_kept(make, x, leave, kept):
    module = make()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    groups = find_groups(module, call_of(x))
    assert {g.layers[0]: (g.units, g.width) for g in groups if not g.kept} == leave
    reasons = {g.layers[0]: g.kept for g in groups if g.kept}
    assert reasons.keys() == kept.keys()
    for layer, reason in kept.items():
        assert reason in reasons[layer]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def output(module, x):
    args, kwargs = call_of(x)
    with torch.no_grad():
        result = module.eval()(*args, **kwargs)
    return result["logits"] if isinstance(result, dict) else result


def zeroed(module, args):
    """A copy in which what the record removes is zero; the test's own reading of the record."""
    copy = deepcopy(module)
    tensors = {**dict(copy.named_parameters()), **dict(copy.named_buffers())}
    for name, cuts in {**args["parameters"], **args["buffers"]}.items():
        for dim, size, kept in cuts:
            assert tensors[name].shape[dim] == size
            for gone in sorted(set(range(size)) - set(kept)):
                tensors[name].data.select(dim, gone).zero_()
    return copy


@pytest.mark.parametrize(
    ("make", "x", "leave", "kept"), [c for c in CASES if c[2]], ids=[n for n in NAMES if n != "tied"]
)
@pytest.mark.parametrize("criterion", ["group_norm", "magnitude"])
def test_outputs_are_those_with_zeros_in_place_of_what_left(make, x, leave, kept, criterion):
    module = make()
    for part in module.modules():
        if hasattr(part, "running_mean") and part.running_mean is not None:
            part.running_mean.normal_()
            part.running_var.uniform_(0.5, 2.0)
    original = deepcopy(module)
    parameters = dict(module.named_parameters())
    change = prune_channels_(module, x, pruning_ratio=0.4, criterion=criterion)
    assert all(parameters[name] is p for name, p in module.named_parameters())  # the same objects, smaller
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in original.parameters())
    wanted, got = output(zeroed(original, change.args), x), output(module, x)
    assert (wanted - got).abs().max() <= 1e-6 * (wanted.max() - wanted.min())
    assert not torch.allclose(wanted, output(original, x), rtol=1e-3)  # what left was not zero before
    # what is left can be trained
    args, kwargs = call_of(x)
    result = module.train()(*args, **kwargs)
    heads = result if isinstance(result, tuple) else [result["logits"] if isinstance(result, dict) else result]
    torch.stack([head.sum() for head in heads]).sum().backward()
    assert all(p.grad is None or p.grad.shape == p.shape for p in module.parameters())


def test_numbers_that_describe_a_layer_follow():
    module = nets.Grouped()
    prune_channels_(module, X, pruning_ratio=0.4, scope="layer")
    assert (module.a.out_channels, module.grouped.in_channels, module.grouped.groups) == (8, 8, 4)
    assert (module.grouped.out_channels, module.depthwise.groups, module.depthwise.in_channels) == (8, 8, 8)
    assert tuple(module.grouped.weight.shape) == (8, 2, 3, 3)
    module = nets.GroupNormed()
    prune_channels_(module, X, pruning_ratio=0.3, scope="layer")
    assert (module.norm.num_groups, module.norm.num_channels, module.conv.out_channels) == (2, 6, 6)
    module = nets.Transformer(nets.FusedAttention("unbind"))
    prune_channels_(module, X, pruning_ratio=0.5, scope="layer")
    assert (module.attention.num_heads, module.attention.head_dim) == (2, 4)
    assert (module.attention.qkv.out_features, module.attention.proj.in_features, module.fc1.out_features) == (
        24,
        8,
        12,
    )
    module = bert()
    prune_channels_(module, WORDS, pruning_ratio=0.5, scope="layer")
    attention = module.bert.encoder.layer[1].attention.self
    assert (attention.num_attention_heads, attention.all_head_size, attention.query.out_features) == (2, 16, 16)


def test_weights_that_are_all_zero_prove_nothing_and_are_not_relied_on():
    """A softmax over channels is caught although, with the weights as they are, nothing reaches the output."""
    module = nets.Softmaxed()
    for parameter in module.parameters():
        torch.nn.init.zeros_(parameter)
    assert "something else" in find_groups(module, call_of(X))[0].kept


def test_excluded_layers_are_kept_with_all_that_depends_on_them():
    groups = find_groups(nets.Residual(), call_of(X), exclude=["outer"])
    assert {g.layers[0]: g.kept for g in groups}["stem"] == "`outer`, which shares them, is excluded"
    groups = find_groups(nets.Residual(), call_of(X), include=["stem", "inner"])
    assert [g.layers[0] for g in groups if not g.kept] == ["inner"]
    assert groups[0].kept == "`outer`, which shares them, is excluded"
    with pytest.raises(
        ValueError, match=r"Argument `exclude` must match the name of a layer with channels, but got 'hed'"
    ):
        find_groups(nets.Residual(), call_of(X), exclude=["hed"])


def test_a_forward_of_a_submodule_is_looked_into_under_the_names_of_the_whole():
    module = torch.nn.ModuleDict({"net": nets.Residual(), "aux": torch.nn.Linear(8, 2)})
    groups = find_groups(module, call_of(X), "net")
    assert [g.name for g in groups] == ["net.stem", "net.inner", "net.head"]


def test_frozen_parameters_and_no_grad_change_nothing():
    module = nets.Residual().requires_grad_(False)
    with torch.no_grad():
        groups = find_groups(module, call_of(X))
    assert [g.units for g in groups if not g.kept] == [8, 12]
    assert not any(p.requires_grad for p in module.parameters())


def test_finding_groups_moves_no_random_state():
    module, state = nets.Encoder(), torch.get_rng_state()
    find_groups(module, call_of(TOKENS))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.get_default_dtype() == torch.float32


def test_a_forward_without_tensors_is_told():
    class Nothing(torch.nn.Linear):
        def forward(self, x):
            return None

    with pytest.raises(
        ValueError, match="Method `forward` must return tensors for channels to be removed, but got a None"
    ):
        find_groups(Nothing(3, 3), call_of(torch.randn(2, 3)))


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.parametrize(
    ("wrap", "names"),
    [
        (torch.nn.utils.weight_norm, r"`stem.weight` \(WeightNorm\)"),
        (lambda layer: torch.nn.utils.prune.l1_unstructured(layer, "weight", 0.5), r"`stem.weight` \(L1Unstructured\)"),
    ],
    ids=["weight norm", "prune"],
)
def test_weights_that_old_hooks_compute_are_refused_by_name(wrap, names):
    module = nets.Residual()
    module.stem = wrap(module.stem)
    with pytest.raises(ValueError, match=rf"must have weights that are parameters .* {names}.*remove_weight_norm"):
        find_groups(module, call_of(X))


def test_old_spectral_norm_keeps_its_layer():
    module = nets.Residual()
    module.inner = torch.nn.utils.spectral_norm(module.inner)
    groups = {g.layers[0]: g.kept for g in find_groups(module, call_of(X))}
    assert groups["inner"] == (
        "forward needs all of its channels: the weight of `inner` is computed (SpectralNorm); remove that to prune them"
    )


def test_hugging_face_layers_shrink_with_their_attributes():
    module = nets.Gpt()
    layer, weight = module.fc, module.fc.weight
    prune_channels_(module, (TOKENS,), pruning_ratio=0.5, scope="layer")
    assert module.fc is layer
    assert module.fc.weight is weight
    assert (layer.nf, layer.weight.shape, module.out.nx, module.out.weight.shape) == (10, (12, 10), 10, (10, 12))
