from itertools import pairwise

import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging, ModelCheckpoint

import lightning_accel as la
from lightning_accel import ChannelPruning, ExactResume, WeightPruning
from lightning_accel.core.schedules import fraction
from lightning_accel.pruning.functional import prune_weights_
from lightning_accel.pruning.weights.masks import measured_sparsity
from lightning_accel.pruning.weights.targets import prunable_parameters
from tests.support.models import Classifier, loader


def zeros(module) -> float:
    return measured_sparsity(prunable_parameters(module).values())


class Watch(Callback):
    """Share of zeros after each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(zeros(pl_module))


@pytest.mark.parametrize("schedule", ["cubic", "linear", "cosine", "exponential", "constant"])
def test_the_share_of_zeros_follows_the_schedule(trainer, schedule):
    watch, module = Watch(), Classifier()
    pruning = WeightPruning(0.8, schedule=schedule, start=1, end=3, every=1)
    trainer(pruning, watch, max_epochs=4).fit(module, loader())  # 8 steps an epoch
    count = sum(p.numel() for p in prunable_parameters(module).values())
    for step, share in enumerate(watch.seen, start=1):
        wanted = 0.8 * fraction(schedule, (step - 8) / 16)
        assert share == pytest.approx(wanted, abs=1 / count), step
    assert pruning.unfinished() == ""


def test_masks_move_every_few_steps_and_at_the_end(trainer):
    watch, module = Watch(), Classifier()
    trainer(WeightPruning(0.6, schedule="linear", end=2, every=5), watch).fit(module, loader())  # 16 steps
    moved = [step for step, (a, b) in enumerate(pairwise([0.0, *watch.seen]), start=1) if b > a]
    assert moved == [5, 10, 15, 16]
    count = sum(p.numel() for p in prunable_parameters(module).values())
    assert watch.seen[4::5] == [pytest.approx(0.6 * step / 16, abs=1 / count) for step in (5, 10, 15)]


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_the_target_is_reached_by_the_first_step_of_the_end_epoch(trainer, scope):
    watch, module = Watch(), Classifier()
    trainer(WeightPruning(0.5, scope=scope, end=1), watch, max_epochs=2).fit(module, loader())
    assert watch.seen[7] == pytest.approx(0.5, abs=0.003)
    assert watch.seen[7:] == [watch.seen[7]] * 9
    if scope == "layer":
        for weight in prunable_parameters(module).values():
            assert int((weight == 0).sum()) == round(0.5 * weight.numel())


def test_shares_of_the_run_and_max_steps(trainer):
    watch = Watch()
    trainer(WeightPruning(0.5, start=0.25, end=0.5), watch, max_epochs=-1, max_steps=20).fit(Classifier(), loader())
    assert watch.seen[3] == 0.0
    assert watch.seen[9] == pytest.approx(0.5, abs=0.003)


def test_nothing_is_left_on_the_module_or_the_optimizer(trainer):
    module = Classifier()
    keys = set(module.state_dict())
    t = trainer(WeightPruning(0.5, end=1))
    t.fit(module, loader())
    assert set(module.state_dict()) == keys
    assert all(not m._forward_hooks and not m._forward_pre_hooks for m in module.modules())
    assert not t.optimizers[0]._optimizer_step_post_hooks
    assert "parametrizations" not in dict(module.named_modules())


def test_globs_choose(trainer):
    module = Classifier()
    trainer(WeightPruning(0.5, end=1, include="net.conv*", exclude="net.conv1.*")).fit(module, loader())
    assert measured_sparsity([module.net.conv2.weight]) == 0.5
    assert measured_sparsity([module.net.conv1.weight, module.net.head.weight]) == 0.0


def test_accumulation_and_clipping(trainer):
    watch, module = Watch(), Classifier()
    t = trainer(WeightPruning(0.5, end=1), watch, accumulate_grad_batches=4, gradient_clip_val=0.1)
    t.fit(module, loader())
    assert watch.seen[7] == pytest.approx(0.5, abs=0.003)
    assert zeros(module) == pytest.approx(0.5, abs=0.003)


def test_the_averaged_weights_are_as_sparse(trainer):
    module = Classifier()
    trainer(EMAWeightAveraging(decay=0.9), WeightPruning(0.5, end=1)).fit(module, loader())
    assert zeros(module) == pytest.approx(0.5, abs=0.003)


def test_what_is_logged_is_counted(trainer):
    module, t = Classifier(), trainer(WeightPruning(0.5, end=1))
    t.fit(module, loader())
    assert float(t.logged_metrics["sparsity"]) == pytest.approx(zeros(module), abs=1e-7)
    head = float(t.logged_metrics["sparsity/net.head.weight"])
    assert head == pytest.approx(measured_sparsity([module.net.head.weight]), abs=1e-7)


def test_an_idle_callback_changes_no_bit(trainer):
    plain, with_callback = Classifier(), Classifier()
    with_callback.load_state_dict(plain.state_dict())
    trainer().fit(plain, loader())
    trainer(WeightPruning(0.5, start=2, end=2)).fit(with_callback, loader(), ckpt_path=None)
    steps = [p.clone() for p in plain.parameters()]
    idle = list(with_callback.parameters())
    masked = [torch.where(q == 0, q, p) for p, q in zip(steps, idle, strict=True)]
    assert all(torch.equal(a, b) for a, b in zip(masked, idle, strict=True))


def test_an_unreached_target_is_told(trainer):
    pruning = WeightPruning(0.5, start=0, end=1.0)
    t = trainer(pruning, max_epochs=2)
    pruning.on_train_epoch_end = lambda *_: setattr(t, "should_stop", True)
    t.fit(Classifier(), loader())
    assert pruning.unfinished().startswith("WeightPruning('weights') reached sparsity 0.4")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sparsity": 1.5}, "Argument `sparsity` must be a share of zeros"),
        ({"sparsity": 0.5, "schedule": "cubical"}, "Argument `schedule` must be one of"),
        ({"sparsity": 0.5, "scope": "network"}, "Argument `scope` must be one of"),
        ({"sparsity": 0.5, "start": 3, "end": 1}, r"Argument `end` must be at or after `start` \(3\), but got 1"),
        ({"sparsity": 0.5, "every": 0}, "Argument `every` must be"),
        ({"sparsity": 0.5, "name": ""}, "Argument `name` must be"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        WeightPruning(**arguments)


@pytest.mark.parametrize(
    ("callbacks", "message"),
    [
        ([{"include": "neck.*"}], "Argument `include` must match"),
        ([{"start": 5}], "Argument `start` must lie within the run's 2 epochs, but got 5"),
        ([{"start": 1, "end": 0.1}], "Argument `end` must be at or after `start`"),
    ],
)
def test_bad_plans_fail_before_the_first_step(trainer, callbacks, message):
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        trainer(*(WeightPruning(0.5, **c) for c in callbacks), watch).fit(Classifier(), loader())
    assert watch.seen == []


def test_two_of_a_kind_under_two_names(trainer):
    module = Classifier()
    body = WeightPruning(0.6, end=1, include="net.conv*", name="body")
    head = WeightPruning(0.25, end=1, include="net.head*", name="head")
    trainer(body, head).fit(module, loader())
    assert measured_sparsity([module.net.conv1.weight, module.net.conv2.weight]) == pytest.approx(0.6, abs=0.001)
    assert measured_sparsity([module.net.head.weight]) == 0.25
    assert {body.state_key, head.state_key} == {
        "lightning_accel.WeightPruning.body",
        "lightning_accel.WeightPruning.head",
    }


def test_two_of_a_kind_on_one_weight(trainer):
    one, two = WeightPruning(0.6, include="net.conv*"), WeightPruning(0.5, include="net.*", name="two")
    with pytest.raises(
        ValueError, match=r"no other WeightPruning does, but got \['net.conv1.weight', 'net.conv2.weight'\] twice"
    ):
        trainer(one, two).fit(Classifier(), loader())


def test_a_target_below_the_zeros_there_are(trainer):
    module, watch = Classifier(), Watch()
    prune_weights_(module, 0.7)
    with pytest.raises(ValueError, match=r"must be at least the present share of zeros, 0.7\d*, but got 0.5"):
        trainer(WeightPruning(0.5), watch).fit(module, loader())
    assert watch.seen == []


def test_a_target_below_the_zeros_of_one_layer(trainer):
    """Each layer has the target of its own: the mean over layers hides nothing."""
    module, watch = Classifier(), Watch()
    module.net.conv1.weight.data[:, :2] = 0  # 2 / 3 of it, a sixth of all
    with pytest.raises(
        ValueError, match=r"at least the present share of zeros in `net.conv1.weight`, 0.6667, but got 0.5"
    ):
        trainer(WeightPruning(0.5, scope="layer"), watch).fit(module, loader())
    assert watch.seen == []
    trainer(WeightPruning(0.5, end=1), watch).fit(module, loader())
    assert watch.seen[-1] == pytest.approx(0.5, abs=0.001)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, r"must leave a channel in each tensor: at most 0.870 with granularity 'channel', but got 0.9"),
        ({"scope": "layer"}, r"must leave a channel in `net.head.weight`: at most 0.750 .*, but got 0.9"),
    ],
)
def test_whole_channels_that_can_not_make_up_the_share(trainer, arguments, message):
    """(8, 3, 3, 3), (8, 8, 3, 3) and (4, 8): with a channel left in each, 717 of 824 weights."""
    watch = Watch()
    with pytest.raises(ValueError, match=message):
        trainer(WeightPruning(0.9, granularity="channel", end=1, **arguments), watch).fit(Classifier(), loader())
    assert watch.seen == []
    with pytest.raises(ValueError, match=message):
        prune_weights_(Classifier(), 0.9, granularity="channel", **arguments)


def test_what_is_sparser_than_its_target_once_channels_have_left_resumes(trainer, tmp_path):
    """Masks that fall where the norm is large leave what channel removal keeps sparser than all was."""

    def dense_first(name, parameter, grad):
        """The largest weights are zeroed."""
        return -parameter.detach().abs()

    def run(ckpt_path=None):
        pruning = WeightPruning(0.5, dense_first, end=1, every=1)
        keep = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        extra = [] if ckpt_path else [keep]
        fit = trainer(
            pruning, ChannelPruning(0.5, start=2, end=2), *extra, max_epochs=4, enable_checkpointing=not ckpt_path
        )
        module = Classifier()
        fit.fit(module, loader(), ckpt_path=ckpt_path)
        return pruning, module

    pruning, module = run()
    assert pruning.sparsity_of(module)["all"] > 0.51
    resumed, again = run(tmp_path / "step=24.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert all(torch.equal(mask, resumed.masks[name]) for name, mask in pruning.masks.items())


def test_two_of_four_holds_while_training(trainer):
    module = Classifier()
    pruning = WeightPruning(granularity="2:4", start=0, end=1, every=2)
    trainer(pruning).fit(module, loader())
    for weight in (module.net.conv2.weight, module.net.head.weight):
        groups = (weight != 0).transpose(1, -1).reshape(-1, 4)
        assert (groups.sum(1) == 2).all()
    assert (module.net.conv1.weight != 0).all()
    assert pruning.unfinished() == ""
    assert pruning.sparsity_of(module)["all"] == 0.5


def test_taylor_follows_the_schedule_and_averages_gradients(trainer):
    module, pruning = Classifier(), WeightPruning(0.5, criterion="taylor", start=1, end=2, every=4)
    trainer(pruning, max_epochs=3).fit(module, loader())
    assert zeros(module) == pytest.approx(0.5, abs=0.003)
    with pytest.raises(ValueError, match="leave a step before the first pruning with criterion 'taylor', but got 0"):
        trainer(WeightPruning(0.5, criterion="taylor", schedule="constant")).fit(Classifier(), loader())


def test_the_taylor_average_is_the_formula(trainer):
    pruning, seen = WeightPruning(0.5, criterion="taylor", start=1, end=3), []

    class Record(Callback):
        def on_before_optimizer_step(self, trainer, pl_module, optimizer):
            weight = pl_module.net.head.weight
            seen.append((weight * weight.grad).detach().square())

    trainer(Record(), pruning, max_steps=3, max_epochs=-1, limit_train_batches=1).fit(Classifier(), loader())
    wanted = 0.81 * seen[0] + 0.09 * seen[1] + 0.1 * seen[2]
    assert torch.allclose(pruning._importance["net.head.weight"], wanted, rtol=1e-5)


def test_a_function_as_schedule_and_as_criterion(trainer):
    watch, module, grads = Watch(), Classifier(), []

    def criterion(name, parameter, grad):
        grads.append(grad is not None)
        return parameter.detach().abs()

    steps = lambda progress: 0.0 if progress < 0.5 else 1.0  # noqa: E731
    trainer(WeightPruning(0.5, criterion, schedule=steps, end=1, every=1), watch).fit(module, loader())
    assert watch.seen[:3] == [0.0] * 3
    assert watch.seen[3:] == [pytest.approx(0.5, abs=0.003)] * 13
    assert grads
    assert all(grads)
    with pytest.raises(ValueError, match=r"must never fall.*but got a function with 0 at 0, 0.5 at 0.5 and 0.9 at 1"):
        WeightPruning(0.5, schedule=lambda progress: min(progress, 0.9))


@pytest.mark.parametrize("epoch", [0, 1])
def test_rewinding_resets_what_it_says(trainer, epoch):
    module, kept = Classifier(), {}

    class Look(Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            if trainer.current_epoch == epoch:
                kept.update({n: t.detach().clone() for n, t in pl_module.state_dict().items()})

        def on_train_batch_end(self, trainer, pl_module, *_):
            if trainer.global_step in (16, 24):  # right after the second and the third round's update
                for name, tensor in pl_module.state_dict().items():
                    mask = pruning.masks.get(name, torch.ones_like(tensor, dtype=torch.bool))
                    assert torch.equal(tensor, kept[name] * mask), name
                assert not trainer.optimizers[0].state
                rounds.append(zeros(pl_module))

    rounds = []
    pruning = WeightPruning(0.75, schedule="linear", start=epoch, end=3, every=8, rewind=epoch)
    trainer(pruning, Look(), max_epochs=4).fit(module, loader())
    assert len(rounds) == 2
    assert rounds[0] < rounds[1] == pytest.approx(0.75, abs=0.003)
    assert zeros(module) == pytest.approx(0.75, abs=0.003)


def test_rewinding_needs_rounds():
    with pytest.raises(ValueError, match="Argument `every` must be the steps of a round with `rewind`, but got None"):
        WeightPruning(0.5, rewind=0)
    with pytest.raises(ValueError, match="Argument `rewind` must be an epoch >= 0, but got -1"):
        WeightPruning(0.5, rewind=-1)


def test_rewinding_to_later_than_the_start(trainer):
    with pytest.raises(ValueError, match=r"Argument `rewind` must be at or before `start` \(0\), but got 1"):
        trainer(WeightPruning(0.5, rewind=1, every=4)).fit(Classifier(), loader())


@pytest.mark.parametrize(
    ("pruning", "says"),
    [
        (
            {"granularity": "2:4"},
            "`round_to` of ChannelPruning must be a multiple of 4 beside granularity '2:4', but got 2",
        ),
        ({"sparsity": 0.5, "rewind": 0, "every": 4}, "`rewind` must be None beside ChannelPruning, but got 0"),
    ],
)
def test_what_would_not_fit_once_channels_have_left(trainer, pruning, says):
    watch = Watch()
    with pytest.raises(ValueError, match=says):
        trainer(ChannelPruning(0.25, end=1, round_to=2), WeightPruning(**pruning), watch).fit(Classifier(), loader())
    assert watch.seen == []


def test_frozen_weights_stay_dense_and_it_is_said(trainer, caplog):
    module = Classifier()
    module.net.conv2.weight.requires_grad = False
    with caplog.at_level("INFO"):
        trainer(WeightPruning(0.5, end=1)).fit(module, loader())
    assert "WeightPruning: `net.conv2.weight` stays dense: it is frozen." in caplog.text
    assert (module.net.conv2.weight != 0).all()


@pytest.mark.parametrize(
    "arguments",
    [
        {"criterion": "taylor", "start": 1, "end": 3, "every": 2},
        {"schedule": "linear", "end": 3, "every": 8, "rewind": 0},
        {"criterion": "random", "end": 3, "every": 3},
        {"sparsity": None, "granularity": "2:4", "end": 3, "every": 3},
        {"sparsity": {"net.conv*": 0.6, "net.head*": 0.2}, "end": 3, "every": 3},
    ],
)
def test_resumed_is_bit_identical(trainer, tmp_path, arguments):
    def run(ckpt_path=None):
        pruning, module = WeightPruning(**{"sparsity": 0.6, **arguments}), Classifier()
        steps = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        extra = [] if ckpt_path else [steps]
        fit = trainer(ExactResume(), pruning, *extra, max_epochs=4, enable_checkpointing=not ckpt_path)
        torch.manual_seed(1 if ckpt_path is None else 2)
        fit.fit(module, loader(shuffle=True), ckpt_path=ckpt_path)
        return {n: t.clone() for n, t in module.state_dict().items()}

    torch.manual_seed(0)
    want = run()
    for step in (9, 16, 22):
        got = run(tmp_path / f"step={step}.ckpt")
        assert all(torch.equal(want[n], got[n]) for n in want), step


def test_resumed_with_a_higher_target_goes_on(trainer, tmp_path):
    module = Classifier()
    first = trainer(WeightPruning(0.4, end=1))
    first.fit(module, loader())
    first.save_checkpoint(tmp_path / "x.ckpt")
    higher = WeightPruning(0.8, end=3)
    trainer(higher, max_epochs=4).fit(module, loader(), ckpt_path=tmp_path / "x.ckpt")
    assert zeros(module) == pytest.approx(0.8, abs=0.003)


class HeadOnly(Classifier):
    """Its optimizer updates the head; the rest isn't frozen, but nothing updates it."""

    def configure_optimizers(self):
        return torch.optim.SGD(self.net.head.parameters(), 0.1)


def test_weights_that_no_optimizer_updates_stay_dense(trainer, caplog):
    module, pruning = HeadOnly(), WeightPruning(0.5, end=1)
    with caplog.at_level("INFO"):
        trainer(pruning).fit(module, loader())
    assert list(pruning.masks) == ["net.head.weight"]
    assert "`net.conv1.weight` and `net.conv2.weight` stay dense: no optimizer updates it" in caplog.text.replace(
        ", ", " and "
    )
    assert measured_sparsity([module.net.conv1.weight]) == 0
    assert (
        la.plan(trainer(WeightPruning(0.5)), module, loader())
        .phases[0]
        .layers["net.conv2.weight"]
        .endswith("no optimizer updates it")
    )


def test_globs_of_weights_that_no_optimizer_updates_are_refused(trainer):
    with pytest.raises(
        ValueError, match=r"`include` must choose weights that an optimizer updates, but got `net.conv1.weight`"
    ):
        trainer(WeightPruning(0.5, include="*conv1.weight")).fit(HeadOnly(), loader())
