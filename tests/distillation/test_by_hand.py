"""`self.distill(batch, outputs)`: losses that a training_step asks for itself."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import lightning_accel as la
from lightning_accel.distillation.losses.logits import soft_target_loss
from tests.support.models import Classifier, Residual, loader
from tests.support.several_optimizers import GAN, Alternating, SimCLR, loaders_of


class ByHand(Classifier):
    """Manual optimization of one network by two optimizers; keeps the losses."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.losses = []

    def training_step(self, batch, batch_idx):
        x, y = batch
        logits = self(x)
        loss = self.distill(batch, logits, cross_entropy(logits, y))
        self.losses.append(loss.item())
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()

    def configure_optimizers(self):
        head, body = self.net.head, [p for n, p in self.net.named_parameters() if "head" not in n]
        return [torch.optim.SGD(body, 0.05, 0.9), torch.optim.SGD(head.parameters(), 0.05, 0.9)]


def test_it_trains_as_automatic_optimization_does(trainer):
    """One optimizer over all of it, stepped by Lightning, makes the same steps."""
    torch.manual_seed(1)
    student, teacher = ByHand(), Residual(12)
    twin, other = Classifier(), copy.deepcopy(teacher)
    twin.load_state_dict(student.state_dict())
    by_hand, automatic = (
        la.DistillationModule(s, t, {"kd": 0.7, "mse": 0.3}, alpha=0.6) for s, t in ((student, teacher), (twin, other))
    )
    first = trainer(max_epochs=2)
    first.fit(by_hand, loader(32))
    second = trainer(max_epochs=2)
    second.fit(automatic, loader(32))
    for name, value in by_hand.state_dict().items():
        torch.testing.assert_close(value, automatic.state_dict()[name], rtol=0, atol=0, msg=name)
    for key in ("distillation_loss", "task_loss", "distillation_loss/mse"):
        assert first.callback_metrics[key] == second.callback_metrics[key]


def test_each_call_of_a_step_is_compared_with_the_teachers_answer_to_it(trainer):
    """The loss is the formula's, for the views that the step made."""

    class Compared(SimCLR):
        def training_step(self, batch, batch_idx):
            one, two = self.views(batch[0])
            first, second = self(one), self(two)
            asked = self.distill(batch, first), self.distill(batch, second)
            with torch.no_grad():
                wanted = [soft_target_loss(s, self.teacher(v), 3.0) for s, v in ((first, one), (second, two))]
            torch.testing.assert_close(torch.stack(asked), torch.stack(wanted), rtol=1e-6, atol=1e-6)
            assert asked[0] != asked[1]
            return sum(asked)

    teacher = Residual(12)
    module = la.DistillationModule(Compared(manual=False), teacher, temperature=3.0)
    trainer(max_epochs=1).fit(module, *loaders_of("simclr"))


@pytest.mark.parametrize("manual", [True, False])
def test_simclr_with_a_teacher(manual, trainer):
    module = la.DistillationModule(SimCLR(manual=manual), Residual(12), "mse")
    t = trainer(la.WeightPruning(0.5, end=1), max_epochs=2)
    t.fit(module, *loaders_of("simclr"))
    assert {"distillation_loss", "ssl_loss"} <= t.callback_metrics.keys()
    assert "task_loss" not in t.callback_metrics


def test_optimizers_that_take_turns_with_a_teacher_and_features(trainer):
    """The adapter is trained by the optimizer of the student's layer."""
    teacher = nn.Sequential()
    teacher.body, teacher.head = copy.deepcopy(Alternating(12).body), nn.Linear(12, 4)
    teacher.forward = lambda x: teacher.head(teacher.body(x).mean((2, 3)))
    module = la.DistillationModule(
        Alternating(), teacher, ["kd", "hint"], student_layer="body.2", teacher_layer="body.2"
    )
    t = trainer(max_epochs=1)
    t.fit(module, *loaders_of("alternating"))
    (adapter,) = module.adapters.values()
    groups = [group["params"] for optimizer in t.optimizers for group in optimizer.param_groups]
    assert [any(p is adapter.weight for p in group) for group in groups] == [True, False]
    assert adapter.weight in t.optimizers[0].state


def test_an_averaged_teacher_follows_the_owners_steps(trainer):
    """decay 0.5, without warm-up: half of the way after each of the generator's 8 steps."""
    weights = []

    class Distilled(GAN):
        def training_step(self, batch, batch_idx):
            g, d = self.optimizers()
            out = self(self.noise(batch[0]))
            loss = out.square().mean() + self.distill(batch, out)
            g.zero_grad()
            self.manual_backward(loss)
            g.step()
            d.step()
            weights.append(self.generator[3].weight.detach().clone())

    net = Distilled()
    start = net.generator[3].weight.detach().clone()
    module = la.DistillationModule(net, la.teachers.EMATeacher(0.5, warmup=False), "mse")
    trainer(max_epochs=1).fit(module, *loaders_of("gan"))
    wanted = start
    for weight in weights:
        wanted = torch.lerp(wanted, weight, 0.5)
    torch.testing.assert_close(module.teacher.network.generator[3].weight, wanted, rtol=0, atol=1e-7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda logits: logits * 1,
            r"must be what 'forward' returned in this step.* got a Tensor \(8, 4\) that none of its 1 calls",
        ),
        (lambda logits: {"a": logits}, "but got a dict that none"),
    ],
)
def test_what_no_call_returned_is_refused(change, message, trainer):
    class Changed(ByHand):
        def training_step(self, batch, batch_idx):
            self.distill(batch, change(self(batch[0])))

    with pytest.raises(RuntimeError, match=message):
        trainer().fit(la.DistillationModule(Changed(), Residual()), loader())


def test_outside_of_a_step_and_never(trainer):
    class Never(ByHand):
        def training_step(self, batch, batch_idx):
            self(batch[0])

    module = la.DistillationModule(Never(), Residual())
    with pytest.raises(RuntimeError, match=r"`distill` must be called in `training_step`"):
        module.distill(None, torch.zeros(2, 4))
    with pytest.raises(
        RuntimeError, match=r"`training_step` must call `self.distill\(batch, outputs\)` with manual optimization"
    ):
        trainer().fit(module, loader())

    class Own(Classifier):
        def distill(self):
            return 0

    with pytest.raises(ValueError, match="must not have an attribute named `distill`"):
        la.DistillationModule(Own(), Residual())


def test_a_cache_holds_one_answer_a_sample(trainer, tmp_path):
    module = la.DistillationModule(SimCLR(), Residual(12), "mse", cache=la.TeacherCache(tmp_path))
    with pytest.raises(RuntimeError, match="`cache` must be None where a step calls 'forward' several times"):
        trainer().fit(module, *loaders_of("simclr"))
