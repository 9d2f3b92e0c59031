import math

import pytest
import torch
from lightning import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, Callback, ModelCheckpoint
from torch import nn
from torch.nn.functional import cross_entropy, gelu, linear

from lightning_accel import ExactResume, WeightPruning
from lightning_accel.pruning import prune_weights_
from lightning_accel.pruning.weights.layers import weight_kinds
from tests.support.models import Classifier, Residual, loader


class Attention(nn.Module):
    """What a vision transformer and a ConvNeXt have beside their layers' weights: (N, 3, 8, 8) to (N, 4)."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, 4)
        self.token, self.position = nn.Parameter(torch.randn(1, 1, 16) / 50), nn.Parameter(torch.randn(1, 5, 16) / 50)
        self.names = nn.Embedding(3, 16)
        self.block = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
        self.layer_scale, self.norm = nn.Parameter(torch.full((16, 1), 1e-2)), nn.LayerNorm((5, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) + self.position + self.names.weight[0]
        x = self.norm(x + self.layer_scale[:, 0] * gelu(self.block(x)))
        return self.head(x[:, 0])


class Own(nn.Module):
    """A linear layer that is no subclass of ``nn.Linear``."""

    def __init__(self, into: int, out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out, into) / into**0.5)

    def forward(self, x):
        return linear(x, self.weight)


class Lit(LightningModule):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.05, momentum=0.9)


def share(tensor: torch.Tensor) -> float:
    return float((tensor == 0).double().mean())


def chosen(module: nn.Module) -> set[str]:
    return {name for name, kind in weight_kinds(module).items() if not kind.reason}


def conv1d(into: int, out: int) -> nn.Module:
    """A class of the name, the place and the layout of ``transformers.pytorch_utils.Conv1D``."""

    def init(self):
        nn.Module.__init__(self)
        self.nf = out
        self.weight, self.bias = nn.Parameter(torch.randn(into, out)), nn.Parameter(torch.zeros(out))

    def forward(self, x):
        return x @ self.weight + self.bias

    return type(
        "Conv1D", (nn.Module,), {"__init__": init, "forward": forward, "__module__": "transformers.pytorch_utils"}
    )()


class StandardizedConv(nn.Conv2d):
    """As timm's ``ScaledStdConv2d``, with a gain of four dimensions."""

    def __init__(self, *args):
        super().__init__(*args)
        self.gain = nn.Parameter(torch.full((self.out_channels, 1, 1, 1), 1e-3))


class Deformable(nn.Module):
    """As torchvision's ``DeformConv2d``: no subclass, but it has the sizes and the weight of a convolution."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels, self.groups = 6, 4, 2
        self.weight = nn.Parameter(torch.randn(4, 3, 3, 3))


@pytest.mark.parametrize(
    ("layer", "names"),
    [
        (nn.Linear(4, 4), {"weight"}),
        (nn.Conv1d(4, 4, 3), {"weight"}),
        (nn.Conv3d(4, 4, 3, groups=2), {"weight"}),
        (nn.ConvTranspose2d(4, 2, 3), {"weight"}),
        (nn.Bilinear(4, 3, 2), {"weight"}),
        (nn.LSTM(4, 6, proj_size=2), {"weight_ih_l0", "weight_hh_l0", "weight_hr_l0"}),
        (nn.GRU(4, 2, 2), {"weight_ih_l0", "weight_hh_l0", "weight_ih_l1", "weight_hh_l1"}),
        (nn.LSTMCell(4, 2), {"weight_ih", "weight_hh"}),
        (nn.MultiheadAttention(4, 2, add_bias_kv=True), {"in_proj_weight", "out_proj.weight"}),
        (
            nn.MultiheadAttention(4, 2, kdim=6),
            {"q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj.weight"},
        ),
        (conv1d(4, 6), {"weight"}),
        (StandardizedConv(3, 4, 3), {"weight"}),
        (Deformable(), {"weight"}),
        (nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)), {"parametrizations.weight.original1"}),
        (nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)), {"parametrizations.weight.original"}),
        (nn.utils.spectral_norm(nn.Linear(4, 3)), {"weight_orig"}),
        (nn.Embedding(4, 3), set()),
        (nn.EmbeddingBag(4, 3), set()),
        (nn.LayerNorm((4, 3)), set()),
        (Own(4, 3), set()),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_the_weights_of_layers(layer, names):
    assert chosen(layer) == names


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_the_old_weight_norm():
    assert chosen(nn.utils.weight_norm(nn.Linear(4, 3))) == {"weight_v"}
    assert chosen(nn.utils.weight_norm(nn.GRU(4, 3), "weight_hh_l0")) == {"weight_ih_l0", "weight_hh_l0_v"}


def test_by_default_only_weights_of_layers_become_zero(trainer):
    torch.manual_seed(0)
    module, pruning = Lit(Attention()), WeightPruning(0.5, end=1)
    trainer(pruning).fit(module, loader())
    net = module.net
    layers = [
        net.patches.weight,
        net.block.self_attn.in_proj_weight,
        net.block.self_attn.out_proj.weight,
        net.block.linear1.weight,
        net.block.linear2.weight,
        net.head.weight,
    ]
    assert share(torch.cat([w.detach().flatten() for w in layers])) == pytest.approx(0.5, abs=1e-3)
    for untouched in (net.token, net.position, net.names.weight, net.layer_scale, net.norm.weight):
        assert share(untouched) == 0.0
    found = pruning.sparsity_of(module)
    zeros = sum(int((p == 0).sum()) for p in module.parameters())
    assert found["total"] == zeros / sum(p.numel() for p in module.parameters())
    assert found["total"] < found["all"] == pytest.approx(0.5, abs=1e-3)


def test_the_share_of_zeros_of_all_parameters_is_logged(trainer):
    module, t = Lit(Attention()), trainer(WeightPruning(0.5, end=1))
    t.fit(module, loader())
    zeros = sum(int((p == 0).sum()) for p in module.parameters())
    total = sum(p.numel() for p in module.parameters())
    assert float(t.logged_metrics["sparsity/total"]) == pytest.approx(zeros / total, abs=1e-7)


@pytest.mark.parametrize(
    ("include", "pruned"),
    [
        ("net.position", {"net.position"}),
        ("*token", {"net.token"}),
        ("net.names.*", {"net.names.weight"}),
        (["net.head.*", "*layer_scale"], {"net.head.weight", "net.layer_scale"}),
        ("net.*", {f"net.{name}" for name in chosen(Attention())}),  # a broad glob names no table
    ],
)
def test_other_parameters_are_pruned_if_named(include, pruned):
    assert prune_weights_(Lit(Attention()), 0.5, include=include).keys() == pruned


def test_a_users_own_layer_is_pruned_if_named(trainer):
    module = Lit(nn.Sequential(nn.Flatten(), Own(192, 8), nn.ReLU(), nn.Linear(8, 4)))
    trainer(WeightPruning(0.5, end=1, include="net.1.weight")).fit(module, loader())
    assert share(module.net[1].weight) == 0.5
    assert share(module.net[3].weight) == 0.0


def test_a_module_without_layers_says_what_can_be_named():
    with pytest.raises(
        ValueError, match=r"must leave a parameter to prune, but got none: `weight`: it isn't the weight"
    ):
        prune_weights_(Own(4, 4), 0.5)
    tied = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 8, bias=False))
    tied[1].weight = tied[0].weight
    with pytest.raises(ValueError, match=r"`0\.weight`: it is an embedding"):
        prune_weights_(tied, 0.5)


@pytest.mark.parametrize("layer", [conv1d(8, 6), nn.ConvTranspose1d(8, 6, 3)])
def test_patterns_follow_the_input_channels_of_transposed_layouts(layer):
    """(I, O, ...): of four input channels two are kept, at each output and each position of the kernel."""
    masks = prune_weights_(layer, granularity="2:4")
    groups = masks["weight"].movedim(0, -1).reshape(-1, 4)
    assert (groups.sum(1) == 2).all()
    weights = layer.weight.detach().movedim(0, -1).reshape(-1, 4)
    assert (weights != 0).sum(1).eq(2).all()


def test_output_channels_of_transposed_layouts():
    layer = conv1d(8, 6)
    before = layer.weight.detach().clone()
    masks = prune_weights_(layer, 0.5, granularity="channel")
    weakest = before.abs().sum(0).argsort()[:3]
    assert set((~masks["weight"]).all(0).nonzero()[:, 0].tolist()) == set(weakest.tolist())
    with pytest.raises(ValueError, match="grouped transposed convolution"):
        prune_weights_(nn.ConvTranspose1d(8, 8, 3, groups=2), granularity="2:4")


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*has zeroed nearly all")
@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.weight_norm])
def test_weight_norm_keeps_a_weight_in_each_channel(trainer, norm):
    """Its channels are divided by their norm: one of zeros would make the network's output NaN."""
    net = Residual()
    with torch.no_grad():
        net.conv2.weight[3] *= 1e-6
    net.conv2 = norm(net.conv2)
    module = Lit(net)
    trainer(WeightPruning(0.9, end=1, include="net.conv*")).fit(module, loader())
    weight = module.net.conv2.weight
    behind = getattr(module.net.conv2, "weight_v", None)
    behind = module.net.conv2.parametrizations.weight.original1 if behind is None else behind
    assert weight.isfinite().all()
    assert torch.equal(weight == 0, behind == 0)
    assert (behind != 0).flatten(1).any(1).all()
    total = behind.numel() + module.net.conv1.weight.numel()
    zeros = int((behind == 0).sum() + (module.net.conv1.weight == 0).sum())
    assert zeros == round(0.9 * total)


def test_weight_norm_bounds_the_share():
    layer = nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=8))
    with pytest.raises(ValueError, match=r"must leave a weight in each output channel .*: at most 0.889, but got 0.95"):
        prune_weights_(layer, 0.95)
    with pytest.raises(ValueError, match="divides by the norm of each output channel, which must not be 0"):
        prune_weights_(layer, 0.5, granularity="channel")


def test_a_parametrization_that_fills_zeros_is_refused_by_name():
    net = nn.Sequential(nn.utils.parametrizations.orthogonal(nn.Linear(4, 4)), nn.Linear(4, 4))
    assert prune_weights_(net, 0.5).keys() == {"1.weight"}
    with pytest.raises(
        ValueError, match=r"`0.parametrizations.weight.original`: zeros don't survive its parametrization"
    ):
        prune_weights_(net, 0.5, include="0.*")


def test_looking_at_a_parametrization_leaves_it_alone():
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(4, 4))
    before, state = {k: v.clone() for k, v in layer.state_dict().items()}, torch.get_rng_state()
    weight_kinds(layer)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_tensor_that_becomes_nearly_empty_is_warned_of_once(trainer):
    module = Classifier()
    module.net.conv2.weight.data *= 1e-4
    with pytest.warns(UserWarning, match=r"nearly all of `net.conv2.weight` \(\d+\.\d%\), at a target of 75%") as seen:
        trainer(WeightPruning(0.75, schedule="constant")).fit(module, loader())
    assert len([w for w in seen if "nearly all" in str(w.message)]) == 1


class Adapted(nn.Module):
    """A linear layer as low-rank adapters wrap it."""

    def __init__(self, layer: nn.Linear, rank: int = 2):
        super().__init__()
        self.base_layer = layer.requires_grad_(False)
        self.lora_A, self.lora_B = nn.Linear(layer.in_features, rank, False), nn.Linear(rank, layer.out_features, False)

    def forward(self, x):
        return self.base_layer(x) + self.lora_B(self.lora_A(x))


class Peft(Adapted):
    """Adapters of another name, which the layer says as peft's layers do."""

    adapter_layer_names = ("down", "up")

    def __init__(self, layer: nn.Linear):
        super().__init__(layer)
        self.down, self.up = self.lora_A, self.lora_B
        del self.lora_A, self.lora_B

    def forward(self, x):
        return self.base_layer(x) + self.up(self.down(x))


@pytest.mark.parametrize(("kind", "first"), [(Adapted, "lora_A"), (Peft, "down")])
@pytest.mark.parametrize("share", [{"sparsity": 0.5}, {"sparsity": {"*": 0.5}}])
def test_adapters_over_frozen_weights_are_refused(trainer, kind, first, share):
    module = Lit(nn.Sequential(nn.Flatten(), kind(nn.Linear(192, 16)), nn.ReLU(), nn.Linear(16, 4)))
    with pytest.raises(ValueError, match=rf"beside adapters, but got .*: `net.1.{first}.weight`.* frozen.*Merge"):
        trainer(WeightPruning(end=1, **share)).fit(module, loader())


def test_adapters_are_pruned_only_if_named_and_it_is_said(trainer):
    module = Lit(nn.Sequential(nn.Flatten(), Adapted(nn.Linear(192, 16)), nn.ReLU(), nn.Linear(16, 4)))
    with pytest.warns(UserWarning, match=r"prunes low-rank adapters \(`net.1.lora_A.weight`\): their zeros are lost"):
        trainer(WeightPruning(0.5, end=1, include="*lora_A*")).fit(module, loader())
    assert share(module.net[1].lora_A.weight) == 0.5
    trainer(WeightPruning(0.5, end=1, include="net.3.*")).fit(module, loader())
    assert share(module.net[3].weight) == 0.5
    assert share(module.net[1].base_layer.weight) == 0.0


class WithBackbone(Lit):
    def __init__(self):
        super().__init__(None)
        self.backbone = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU())
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.backbone(x).mean((2, 3)))


class Shares(Callback):
    """Share of zeros of the backbone and of the head after each step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        kernels = torch.cat([pl_module.backbone[i].weight.detach().flatten() for i in (0, 2)])
        self.seen.append((share(kernels), share(pl_module.head.weight)))


@pytest.mark.parametrize("criterion", ["l1", "taylor"])
@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("thaws", [1, 3])
def test_weights_that_thaw_are_pruned_from_their_first_step_on(trainer, caplog, criterion, order, thaws):
    """The backbone is frozen for an epoch, or until the target is reached; 8 steps an epoch."""
    pruning = WeightPruning(0.5, criterion, scope="layer", schedule="linear", start=1, end=3, every=1)
    thawing, watch = BackboneFinetuning(unfreeze_backbone_at_epoch=thaws, backbone_initial_lr=0.01), Shares()
    callbacks = [thawing, pruning] if order == "before" else [pruning, thawing]
    with caplog.at_level("INFO"):
        trainer(*callbacks, watch, max_epochs=4).fit(WithBackbone(), loader())
    assert "`backbone.0.weight`, `backbone.2.weight` stay dense: it is frozen" in caplog.text
    assert "are trained from now on, and pruned" in caplog.text
    for step, (backbone, head) in enumerate(watch.seen, start=1):
        due = 0.5 * min(max(0.0, (step - 8) / 16), 1.0)
        assert head == pytest.approx(due, abs=1 / 32), step
        assert backbone == pytest.approx(due if step > 8 * thaws else 0.0, abs=1 / 200), step
    assert pruning.unfinished() == ""


class Thawing(WithBackbone):
    """Thaws by itself. ``BackboneFinetuning`` doesn't resume exactly from within an epoch, with or without pruning."""

    def __init__(self):
        super().__init__()
        self.backbone.requires_grad_(False)

    def on_train_start(self):
        self.backbone.requires_grad_(self.current_epoch >= 1)

    def on_train_epoch_start(self):
        self.backbone.requires_grad_(self.current_epoch >= 1)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


def test_weights_that_thaw_resume_bit_identically(trainer, tmp_path):
    def run(ckpt_path=None):
        torch.manual_seed(0)
        module, pruning = Thawing(), WeightPruning(0.5, schedule="linear", end=3, every=2)
        keep = [] if ckpt_path else [ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)]
        fit = trainer(ExactResume(), pruning, *keep, max_epochs=4, enable_checkpointing=not ckpt_path)
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return module.state_dict()

    want = run()
    for step in (4, 8, 9, 13, 16):
        got = run(tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(want[name], got[name]) for name in want), step
    kernels = torch.cat([want[f"backbone.{i}.weight"].flatten() for i in (0, 2)] + [want["head.weight"].flatten()])
    assert share(kernels) == pytest.approx(0.5, abs=1e-3)


def test_weights_that_stay_frozen_are_reported_and_left_unfinished(trainer):
    module, pruning = WithBackbone(), WeightPruning(0.5, end=1, include="backbone.*")
    module.backbone.requires_grad_(False)
    with pytest.warns(
        UserWarning, match=r"prunes nothing as long as `backbone.0.weight`, `backbone.2.weight` are frozen"
    ):
        trainer(pruning).fit(module, loader())
    assert pruning.unfinished() == (
        "WeightPruning('weights') pruned nothing: `backbone.0.weight`, `backbone.2.weight` are still frozen"
    )
    assert math.isclose(pruning.sparsity_of(module)["all"], 0.0)


def test_lazy_layers(trainer):
    """They are initialized by the first batch of validation, before training; without validation they would never be."""
    lazy = lambda: Lit(nn.Sequential(nn.Flatten(), nn.LazyLinear(8), nn.ReLU(), nn.LazyLinear(4)))  # noqa: E731
    module = lazy()
    with pytest.raises(
        ValueError, match=r"must have initialized layers .* `net.1.weight`, .* Run the module on a batch"
    ):
        trainer(WeightPruning(0.5, end=1)).fit(module, loader())
    module = lazy()
    module(next(iter(loader()))[0])
    trainer(WeightPruning(0.5, end=1)).fit(module, loader())
    assert share(torch.cat([module.net[i].weight.detach().flatten() for i in (1, 3)])) == pytest.approx(0.5, abs=1e-3)
