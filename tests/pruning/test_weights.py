import pytest
import torch
from lightning.pytorch.callbacks import Callback, EMAWeightAveraging

from lightning_accel import WeightPruning
from lightning_accel.pruning.masks import measured_sparsity, prunable_parameters
from lightning_accel.schedules import fraction
from tests.models import Classifier, loader


def zeros(module) -> float:
    return measured_sparsity(prunable_parameters(module).values())


class Watch(Callback):
    """Share of zeros after each optimizer step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *_):
        self.seen.append(zeros(pl_module))


@pytest.mark.parametrize("schedule", ["cubic", "linear", "constant"])
def test_the_share_of_zeros_follows_the_schedule(trainer, schedule):
    watch, module = Watch(), Classifier()
    pruning = WeightPruning(0.8, schedule=schedule, start=1, end=3, every=1)
    trainer(pruning, watch, max_epochs=4).fit(module, loader())  # 8 steps an epoch
    count = sum(p.numel() for p in prunable_parameters(module).values())
    for step, share in enumerate(watch.seen, start=1):
        wanted = 0.8 * fraction(schedule, (step - 8) / 16)
        assert share == pytest.approx(wanted, abs=1 / count), step
    assert pruning.unfinished() == ""


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


def test_manual_optimization_is_refused(trainer):
    module = Classifier()
    module.automatic_optimization = False
    with pytest.raises(ValueError, match="Manual optimization isn't supported"):
        trainer(WeightPruning(0.5)).fit(module, loader())


def test_several_optimizers_are_refused(trainer):
    class Two(Classifier):
        def configure_optimizers(self):
            return [super().configure_optimizers(), torch.optim.SGD(self.net.head.parameters(), 0.1)]

    with pytest.raises((ValueError, RuntimeError), match=r"one optimizer|multiple optimizers"):
        trainer(WeightPruning(0.5)).fit(Two(), loader())
