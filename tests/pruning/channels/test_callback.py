"""ChannelPruning in a fit: what leaves when, and that everything beside the module follows."""

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, StochasticWeightAveraging
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import lightning_accel as la
from lightning_accel.core import structure
from lightning_accel.pruning.channels.plan import ChannelTarget
from lightning_accel.pruning.functional import plan_channels, prune_channels_
from tests.pruning import networks as nets
from tests.support.models import Classifier, images, loader


class Net(L.LightningModule):
    """A residual network with a block to thin out, and an optimizer of choice."""

    def __init__(self, optimizer: str = "SGD", settings: dict | None = None):
        super().__init__()
        self.save_hyperparameters()
        self.net = nets.Residual()

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.cross_entropy(self(x), y)

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self):
        settings = {"lr": 0.05, **(self.hparams.settings or {})}
        optimizer = getattr(torch.optim, self.hparams.optimizer)(self.parameters(), **settings)
        return {"optimizer": optimizer, "lr_scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.9)}


def channels(module):
    return module.net.stem.out_channels, module.net.inner.out_channels


def macs(module):
    """Counted by hand: 8x8 positions, 3x3 kernels."""
    a, b = channels(module)
    return 64 * 9 * (3 * a + a * b + b * a) + 4 * a


class Watch(Callback):
    """Channels and MACs during each epoch, and the learning rate."""

    def __init__(self):
        self.channels, self.macs, self.rates = [], [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 0:
            self.channels.append(channels(pl_module))
            self.macs.append(macs(pl_module))
            self.rates.append(trainer.optimizers[0].param_groups[0]["lr"])


def test_the_target_is_reached_by_the_first_step_of_the_end_epoch(trainer):
    watch, module = Watch(), Net()
    pruning = la.ChannelPruning(macs_reduction=3.0, start=1, end=3)
    dense = macs(module)
    trainer(pruning, watch, max_epochs=5).fit(module, loader())
    assert watch.macs[0] == dense
    assert dense > watch.macs[1] > watch.macs[2] > watch.macs[3] == watch.macs[4]
    for k, share in ((1, 1 / 3), (2, 2 / 3), (3, 1.0)):  # three removals, each not larger than needed
        assert watch.macs[k] <= dense * (1 - share * 2 / 3)
    a, b = channels(module)
    one_more = [64 * 9 * (3 * a + 2 * a * b) + 4 * a for a, b in ((a + 1, b), (a, b + 1))]
    assert max(one_more) > dense / 3  # without the last one that left it would not be reached
    assert pruning.unfinished() == ""
    assert watch.rates == pytest.approx([0.05 * 0.9**k for k in range(5)])  # the scheduler goes on
    assert module.net.norm.num_features == module.net.head.in_features == a


@pytest.mark.parametrize("scope", ["global", "layer"])
def test_the_pruning_ratio_is_absolute(trainer, scope):
    module = Net()
    trainer(la.ChannelPruning(0.5, scope=scope, end=1)).fit(module, loader())
    a, b = channels(module)
    assert a + b == 10  # of 8 + 12
    if scope == "layer":
        assert (a, b) == (4, 6)


@pytest.mark.parametrize(
    ("settings", "removals"),
    [
        ({"start": 1, "end": 1}, [1]),
        ({"schedule": "constant", "start": 2}, [2]),
        ({"start": 0.25, "end": 0.75}, [1, 2, 3]),
        ({"start": 0.2, "end": 0.55}, [1, 2, 3]),  # boundaries after steps 6.4 and 17.6 of 32
        ({}, [0, 1, 2]),
    ],
)
def test_when_channels_leave(trainer, settings, removals):
    watch = Watch()
    trainer(la.ChannelPruning(0.5, scope="layer", **settings), watch, max_epochs=4).fit(Net(), loader())
    totals = [20, *(sum(c) for c in watch.channels)]
    assert [k for k in range(4) if totals[k + 1] < totals[k]] == removals
    assert totals[-1] == 10


def test_max_steps_and_accumulation(trainer):
    watch = Watch()
    t = trainer(la.ChannelPruning(0.5, end=0.5), watch, max_epochs=-1, max_steps=8, accumulate_grad_batches=4)
    t.fit(Net(), loader())  # 2 steps an epoch
    assert [sum(c) for c in watch.channels] == [16, 13, 10, 10]


class Follow(Callback):
    """Optimizer state before and after each epoch boundary, to be compared entry by entry."""

    def __init__(self):
        self.checked = 0

    def on_train_epoch_end(self, trainer, pl_module):
        optimizer = trainer.optimizers[0]
        self.names = dict(pl_module.named_parameters())
        self.weights = {name: p.detach().clone() for name, p in self.names.items()}
        self.state = {
            name: {k: v.clone() for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
            for name, p in self.names.items()
        }

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        changes = structure.record_of(pl_module)
        if batch_idx or trainer.current_epoch == 0 or len(changes) == self.checked:
            return
        cuts = changes[-1].args["parameters"]
        optimizer = trainer.optimizers[0]
        for name, parameter in pl_module.named_parameters():
            assert self.names[name] is parameter
            for key, old in {**self.state[name], "": self.weights[name]}.items():
                new = optimizer.state[parameter][key] if key else parameter.detach()
                wanted = old
                if old.numel() > 1:
                    for dim, _, kept in cuts.get(name, []):
                        wanted = wanted[(slice(None),) * dim + (kept,)]
                assert torch.equal(new, wanted), (name, key)
        self.checked = len(changes)


@pytest.mark.parametrize(
    ("optimizer", "settings", "kept"),
    [
        ("SGD", {"momentum": 0.9}, {"momentum_buffer"}),
        ("AdamW", {"amsgrad": True}, {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"}),
        ("RMSprop", {}, {"step", "square_avg"}),
    ],
)
def test_the_optimizer_keeps_the_surviving_entries(trainer, optimizer, settings, kept):
    follow, module = Follow(), Net(optimizer, settings=settings)
    t = trainer(la.ChannelPruning(0.5, start=1, end=2), follow, max_epochs=4)
    t.fit(module, loader())
    assert follow.checked == 2
    assert {key for state in t.optimizers[0].state.values() for key in state} == kept
    assert {id(p) for g in t.optimizers[0].param_groups for p in g["params"]} == {id(p) for p in module.parameters()}


def test_an_optimizer_whose_state_cannot_follow_is_refused(trainer):
    with pytest.raises(
        ValueError, match="The optimizer must keep its state by parameter with ChannelPruning, but got LBFGS"
    ):
        trainer(la.ChannelPruning(0.5, end=1)).fit(Net("LBFGS"), loader())


def test_factored_state_follows(trainer):
    module = Net("Adafactor")
    t = trainer(la.ChannelPruning(0.5, start=1, end=1))
    t.fit(module, loader())
    weight = module.net.inner.weight
    state = t.optimizers[0].state[weight]
    assert state["row_var"].shape[0] == weight.shape[0]


@pytest.mark.parametrize("first", [True, False])
def test_the_average_follows(trainer, first):
    module, ema = Net(), EMAWeightAveraging(decay=0.5)
    pruning = la.ChannelPruning(0.5, start=1, end=1)
    averages = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            averages.append([p.detach().clone() for p in ema._average_model.module.parameters()])
            current = [p.detach() for p in pl_module.parameters()]
            if len(averages) == 9:  # after the removal: the old average, cut, and the new weights
                cuts = structure.record_of(pl_module)[0].args["parameters"]
                for (name, _), old, new, now in zip(
                    pl_module.named_parameters(), averages[-2], averages[-1], current, strict=True
                ):
                    for dim, _, kept in cuts.get(name, []):
                        old = old.index_select(dim, torch.tensor(kept))
                    assert torch.allclose(new, 0.5 * old + 0.5 * now, atol=1e-7), name

    callbacks = [pruning, ema] if first else [ema, pruning]
    trainer(*callbacks, Look()).fit(module, loader(), loader(16))
    assert len(averages) == 16
    assert sum(channels(module)) == 10
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), averages[-1], strict=True))


def test_stochastic_weight_averaging_follows(trainer):
    class NoNorm(Net):
        def __init__(self):
            super().__init__()
            self.net.norm, self.net.norm2 = nn.Identity(), nn.Identity()

    module = NoNorm()
    swa = StochasticWeightAveraging(0.01, swa_epoch_start=2, annealing_epochs=1)
    trainer(la.ChannelPruning(0.5, end=1), swa, max_epochs=4).fit(module, loader())
    assert sum(channels(module)) == 10
    assert [p.shape for p in swa._average_model.parameters()] == [p.shape for p in module.parameters()]


@pytest.mark.parametrize("target", ["pruning_ratio", "macs_reduction"])
def test_resumed_with_another_target_goes_on_to_that(trainer, tmp_path, target):
    """Targets are absolute in a resumed run too; what has left can't come back."""
    low, middle, high = (0.2, 0.5, 0.7) if target == "pruning_ratio" else (1.2, 2.0, 4.0)
    first = trainer(la.ChannelPruning(**{target: middle}, end=1), max_epochs=2)
    first.fit(Net(), loader())
    first.save_checkpoint(tmp_path / "x.ckpt")
    module, pruning = Net(), la.ChannelPruning(**{target: high}, start=2, end=3)
    trainer(pruning, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "x.ckpt")
    if target == "pruning_ratio":
        assert sum(channels(module)) == 6  # of 20
    else:
        assert macs(module) <= macs(Net()) / 4
    assert pruning.unfinished() == ""
    with pytest.raises(ValueError, match=rf"Argument `{target}` must be at least the .* already, .*, but got {low}"):
        trainer(la.ChannelPruning(**{target: low}, end=3), max_epochs=4).fit(
            Net(), loader(), ckpt_path=tmp_path / "x.ckpt"
        )


@pytest.mark.parametrize("precision", ["64-true", "bf16-true"])
def test_a_module_that_the_trainer_casts(trainer, precision):
    module = Net()
    t = trainer(la.ChannelPruning(0.5, end=1), precision=precision)
    t.fit(module, loader())
    assert sum(channels(module)) == 10
    assert float(t.logged_metrics["macs"]) == macs(module)


def test_bf16_and_clipping(trainer):
    module = Net()
    trainer(la.ChannelPruning(0.5, end=1), precision="bf16-mixed", gradient_clip_val=0.1).fit(module, loader())
    assert sum(channels(module)) == 10


def test_channels_last_stays(trainer):
    module = Net().to(memory_format=torch.channels_last)
    trainer(la.ChannelPruning(0.5, end=1)).fit(module, loader())
    assert module.net.inner.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.net.inner.weight.is_contiguous()


def test_what_is_logged_is_counted(trainer, tmp_path):
    module, logger = Net(), CSVLogger(tmp_path)
    more = la.ChannelPruning(0.1, include="net.inner", name="more", start=1, end=1)
    t = trainer(la.ChannelPruning(macs_reduction=2.0, end=1), more, logger=logger)
    t.fit(module, loader())
    assert float(t.logged_metrics["macs"]) == macs(module)
    assert float(t.logged_metrics["macs/more"]) == macs(module)
    assert float(t.logged_metrics["parameters"]) == sum(p.numel() for p in module.parameters())
    x = torch.zeros(1, 3, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        module(x)
    assert counter.get_total_flops() == 2 * macs(module)


def test_masks_are_cut_and_the_share_of_zeros_stays_absolute(trainer):
    module = Net()
    sparsity = la.WeightPruning(0.5, end=1)
    pruning = la.ChannelPruning(0.5, start=1, end=2)
    trainer(sparsity, pruning, max_epochs=4).fit(module, loader())
    shapes = {name: mask.shape for name, mask in sparsity.masks.items()}
    weights = dict(module.named_parameters())
    assert shapes == {name: weights[name].shape for name in shapes}
    zeros = sum(int((weights[name] == 0).sum()) for name in shapes)
    total = sum(weights[name].numel() for name in shapes)
    assert zeros == pytest.approx(0.5 * total, abs=1)
    assert sparsity.unfinished() == pruning.unfinished() == ""


def test_taylor_counts_the_gradients_of_an_epoch(trainer):
    """Against the formula, on gradients recorded beside."""
    seen = {}

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            if trainer.current_epoch == 1:
                p = dict(pl_module.named_parameters())
                product = {n: (w * w.grad).detach().double() for n, w in p.items() if n.startswith("net.inner")}
                unit = product["net.inner.weight"].sum((1, 2, 3)) + product["net.inner.bias"]
                seen["sum"] = seen.get("sum", 0) + unit.square()

    module = Net()
    pruning = la.ChannelPruning(0.25, criterion="taylor", include="net.inner", start=2, end=2)
    trainer(Record(), pruning, max_epochs=3).fit(module, loader())
    kept = structure.record_of(module)[0].args["parameters"]["net.inner.weight"][0][2]
    assert kept == sorted(seen["sum"].topk(9).indices.tolist())


def test_distillation_prunes_the_student(trainer):
    module = la.DistillationModule(Net(), nets.Residual(), alpha=0.5)
    trainer(la.ChannelPruning(0.5, end=1)).fit(module, loader())
    assert sum(channels(module)) == 10
    assert module.teacher.inner.out_channels == 12
    assert module.teacher.inner.weight.shape[0] == 12


def test_a_submodule_that_training_calls(trainer):
    class Calls(Net):
        forward = L.LightningModule.forward

        def training_step(self, batch, batch_idx):
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    for named in (None, "net"):
        module = Calls()
        trainer(la.ChannelPruning(0.5, end=1, module=named)).fit(module, loader())
        assert sum(channels(module)) == 10


def test_a_layer_that_only_training_runs_is_named_when_it_breaks(trainer):
    class Auxiliary(Net):
        def __init__(self):
            super().__init__()
            self.net = nets.Reused()

        def training_step(self, batch, batch_idx):
            if self.current_epoch == 0:  # the trial before training runs this
                return self(batch[0]).square().mean()
            return self.net.auxiliary(self.net.features(batch[0])).square().mean()

    with pytest.raises(RuntimeError, match="cannot be multiplied") as error:
        trainer(la.ChannelPruning(0.5, end=1)).fit(Auxiliary(), loader())
    assert "`forward` doesn't run `net.auxiliary`" in error.value.__notes__[0]
    trainer(la.ChannelPruning(0.5, end=1, exclude="net.last")).fit(Auxiliary(), loader())


def test_layers_built_late_are_found(trainer):
    class Late(Net):
        def __init__(self):
            super().__init__()
            del self.net

        def configure_model(self):
            if not hasattr(self, "net"):
                self.net = nets.Residual()

    module = Late()
    trainer(la.ChannelPruning(0.5, end=1)).fit(module, loader())
    assert sum(channels(module)) == 10


def test_a_second_fit_and_another_module(trainer):
    pruning, module = la.ChannelPruning(0.5, end=1), Net()
    trainer(pruning).fit(module, loader())
    trainer(pruning).fit(module, loader())
    assert sum(channels(module)) == 10  # absolute: reached already
    trainer(la.ChannelPruning(0.7, end=1)).fit(module, loader())
    assert sum(channels(module)) == 6  # of the 20 there once were
    other = Net()
    trainer(pruning).fit(other, loader())
    assert sum(channels(other)) == 10


def test_fast_dev_run_tries_it(trainer):
    for criterion in ("group_norm", "taylor"):
        module = Net()
        trainer(la.ChannelPruning(0.5, start=3, end=7, criterion=criterion), fast_dev_run=True).fit(module, loader())
        assert sum(channels(module)) == 10


def test_an_unreached_target_is_told(trainer):
    pruning = la.ChannelPruning(macs_reduction=2.0, end=2)
    assert pruning.unfinished() == "ChannelPruning('channels') has gone 0% of the way to 2.0x fewer MACs"
    t = trainer(pruning, max_epochs=4)
    pruning.on_train_epoch_end = lambda *_: setattr(t, "should_stop", True)
    t.fit(Net(), loader())
    assert pruning.unfinished() == "ChannelPruning('channels') has gone 33% of the way to 2.0x fewer MACs"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "Exactly one of `pruning_ratio`, `macs_reduction` and `latency_reduction` must be given, but got none"),
        ({"pruning_ratio": 0.5, "macs_reduction": 2.0}, "but got pruning_ratio=0.5 and macs_reduction=2.0"),
        ({"pruning_ratio": 1.0}, r"Argument `pruning_ratio` must be a share of channels in \(0, 1\), but got 1.0"),
        ({"pruning_ratio": 50}, "Write 0.5 for half of them"),
        ({"macs_reduction": 1.0}, "Argument `macs_reduction` must be a factor above 1, but got 1.0"),
        ({"macs_reduction": float("nan")}, "Argument `macs_reduction` must be a factor above 1"),
        ({"pruning_ratio": 0.5, "criterion": "l1"}, "Argument `criterion` must be one of"),
        ({"pruning_ratio": 0.5, "scope": "all"}, "Argument `scope` must be one of"),
        ({"pruning_ratio": 0.5, "schedule": "late"}, "Argument `schedule` must be one of"),
        ({"pruning_ratio": 0.5, "round_to": 0}, "Argument `round_to` must be a number of channels >= 1, but got 0"),
        (
            {"pruning_ratio": 0.5, "limits": {"net.*": 2}},
            r"Argument `limits` must map globs to shares in \[0, 1\], but got 2",
        ),
        ({"pruning_ratio": 0.5, "start": 3, "end": 2}, "Argument `end` must be at or after `start`"),
        (
            {"pruning_ratio": 0.5, "exclude": [3]},
            r"Argument `exclude` must be a string, a list of strings or None, but got \[3\]",
        ),
    ],
)
def test_arguments_are_checked(arguments, message):
    with pytest.raises((ValueError, TypeError), match=message) as error:
        la.ChannelPruning(**arguments)
    assert isinstance(error.value, la.LightningAccelError)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"pruning_ratio": 0.5, "include": "stem"}, "Argument `include` must match the name of a layer with channels"),
        (
            {"pruning_ratio": 0.5, "limits": {"stem": 0.1}},
            "Argument `limits` must match the name of a layer with channels",
        ),
        (
            {"pruning_ratio": 0.5, "limits": {"net.stem": 0.1, "*.outer": 0.2}},
            "Argument `limits` must give one share to channels that leave together, but got .* for those of `net.stem`, `net.outer`",
        ),
        ({"pruning_ratio": 0.5, "exclude": "*"}, "Channel pruning must find channels that may leave, but got none"),
        ({"pruning_ratio": 0.95}, r"Argument `pruning_ratio` must be reachable .* at most 0.900, but got 0.95"),
        ({"macs_reduction": 100.0}, r"Argument `macs_reduction` must be reachable .* at most 43.15, but got 100"),
        ({"pruning_ratio": 0.5, "round_to": 16}, r"Argument `pruning_ratio` must be reachable .* at most 0.000"),
        ({"pruning_ratio": 0.5, "limits": {"net.*": 0.25}}, r"at most 0.250, but got 0.5"),
        (
            {"pruning_ratio": 0.5, "criterion": "taylor"},
            'Argument `start` must be at least 1 with criterion "taylor"',
        ),
        (
            {"pruning_ratio": 0.5, "end": 2},
            "Argument `end` must lie before the end of the run, but got 2, which is epoch 2 of 2",
        ),
        ({"pruning_ratio": 0.5, "end": 1.0}, "Argument `end` must lie before the end of the run"),
    ],
)
def test_what_can_be_known_before_training_is_told_then(trainer, arguments, message):
    class Fail(Callback):
        def on_train_batch_start(self, *_):
            raise AssertionError("training began")

    with pytest.raises(ValueError, match=message):
        trainer(la.ChannelPruning(**{"end": 1, **arguments}), Fail()).fit(Net(), loader())


def test_shapes_must_be_final_when_they_are_captured(trainer):
    for start in (1, 0.5):
        with pytest.raises(
            ValueError, match=r"Argument `end` must be at or before the start of QuantizationAwareTraining .*but got 3"
        ):
            trainer(
                la.ChannelPruning(0.5, end=3), la.QuantizationAwareTraining("portable", start=start), max_epochs=4
            ).fit(Net(), loader())


def test_bn_scale_needs_batch_norm_everywhere(trainer):
    module = Net()
    trainer(la.ChannelPruning(0.5, criterion="bn_scale", end=1)).fit(module, loader())
    assert sum(channels(module)) == 10
    module.net = nets.Squeezed()
    with pytest.raises(ValueError, match=r'got "bn_scale" for `net\.conv`, which has no batch norm'):
        trainer(la.ChannelPruning(0.5, criterion="bn_scale", end=1)).fit(module, loader())


def test_a_compiled_module_is_refused(trainer):
    module = Net()
    module._compiler_ctx = {}
    pruning = la.ChannelPruning(0.5)
    t = trainer(pruning)
    with pytest.raises(ValueError, match=r"Argument `model` must not be a `torch\.compile`d module"):
        pruning.setup(t, module, "fit")


# --- without a Trainer


def test_the_functional_form_records_and_replays():
    x = images(4).tensors[0]
    module, twin = nets.Residual(), nets.Residual()
    change = prune_channels_(module, x, macs_reduction=2.0, round_to=2)
    assert structure.record_of(module) == [change]
    assert module.stem.out_channels % 2 == module.inner.out_channels % 2 == 0
    assert structure.replay(twin, [change]) == [change]
    assert [p.shape for p in twin.parameters()] == [p.shape for p in module.parameters()]
    twin.load_state_dict(module.state_dict())
    assert torch.equal(twin.eval()(x), module.eval()(x))
    assert structure.replay(twin, [change]) == []  # it is there already
    again = prune_channels_(module, x, macs_reduction=3.0)  # relative to the module there once was
    assert structure.replay(twin, [change, again]) == [again]
    assert [p.shape for p in twin.parameters()] == [p.shape for p in module.parameters()]
    with pytest.raises(
        ValueError, match="Argument `module` must be freshly built to get the structure of a checkpoint"
    ):
        structure.replay(twin, [change])
    with pytest.raises(
        ValueError, match=r"freshly built, but got `\w+.weight` with shape .*, where the record expects"
    ):
        structure.replay(nets.Residual(), [again])
    with pytest.raises(ValueError, match=r"freshly built, but got `\w+.\w+` not at all"):
        structure.replay(Classifier(), [change])


def test_the_plan_says_what_would_leave_and_changes_nothing():
    module, x = nets.Residual(), images(4).tensors[0]
    before = {name: value.clone() for name, value in module.state_dict().items()}
    rows = plan_channels(module, x, ChannelTarget(pruning_ratio=0.5, scope="layer"))
    assert rows == [
        {"layers": ["stem", "outer"], "before": 8, "after": 4, "kept": ""},
        {"layers": ["inner"], "before": 12, "after": 6, "kept": ""},
        {"layers": ["head"], "before": 4, "after": 4, "kept": "it reaches the output"},
    ]
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())
    assert plan_channels(module, x, ChannelTarget(pruning_ratio=0.5, scope="layer", criterion="taylor")) == rows


def test_limits_and_rounding():
    x = images(4).tensors[0]
    module = nets.Residual()
    prune_channels_(module, x, pruning_ratio=0.4, limits={"stem": 0.25})
    assert module.stem.out_channels >= 6
    assert module.stem.out_channels + module.inner.out_channels == 12
    module = nets.Residual()
    prune_channels_(module, x, pruning_ratio=0.5, round_to=4)
    assert (module.stem.out_channels % 4, module.inner.out_channels % 4) == (0, 0)
    assert module.stem.out_channels + module.inner.out_channels == 8


def test_the_functional_taylor_reads_the_gradients_that_are_there():
    module, x = nets.Residual(), images(4).tensors[0]
    with pytest.raises(ValueError, match='Criterion "taylor" needs gradients, but got none'):
        prune_channels_(module, x, pruning_ratio=0.5, criterion="taylor")
    module(x).square().sum().backward()
    prune_channels_(module, x, pruning_ratio=0.5, criterion="taylor")
    assert module.stem.out_channels + module.inner.out_channels == 10


def test_a_module_that_configure_model_compiles_is_named(trainer):
    class Compiles(Classifier):
        def configure_model(self):
            self.net = torch.compile(self.net, backend="eager")

    with pytest.raises(
        ValueError, match=r"must not hold `torch.compile`d modules, whose graphs have fixed widths, but got `net`"
    ):
        trainer(la.ChannelPruning(pruning_ratio=0.3)).fit(Compiles(), loader())
