"""Several losses, their weights and schedules, targets and masks: what reaches each loss, and what is logged."""

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.special import log_softmax, softmax
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import DistillationModule, LossTerm, Scheduled
from lightning_accel.core.schedules import Timeline
from lightning_accel.distillation.losses.base import check_are_logits
from lightning_accel.distillation.losses.registry import named_loss
from lightning_accel.distillation.losses.signature import required, wants
from lightning_accel.distillation.targets import find, fits
from lightning_accel.distillation.terms import make_terms
from lightning_accel.losses import DKDLoss, SoftTargetLoss, StandardizedLoss
from tests.distillation.models import Net, Plain, Student, loader


class Logged(L.Callback):
    """Keeps what was logged in each step."""

    def __init__(self):
        self.steps = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.steps.append({k: float(v) for k, v in trainer.callback_metrics.items()})


def one_step(batch=None, **kwargs):
    torch.manual_seed(0)
    module = DistillationModule(Plain(), Net(), **kwargs)
    module.log = lambda name, value: logged.__setitem__(name, float(value))
    logged: dict = {}
    batch = batch or next(iter(loader()))
    loss = module.training_step(batch, 0)
    return loss, logged, module, batch


def test_the_weighted_sum_equals_the_formula():
    loss, logged, module, (x, y) = one_step(losses={"kd": 0.7, "mse": 0.2, "hard": 2.0}, alpha=0.6, temperature=3.0)
    student, teacher = module(x).detach().double().numpy(), module.teacher(x).double().numpy()
    p, q = softmax(teacher / 3, axis=1), softmax(student / 3, axis=1)
    kd = 9 * (p * np.log(p / q)).sum(axis=1).mean()
    mse = ((student - teacher) ** 2).mean()
    hard = -log_softmax(student, axis=1)[np.arange(4), teacher.argmax(1)].mean()
    task = -log_softmax(student, axis=1)[np.arange(4), y.numpy()].mean()
    total = 0.7 * kd + 0.2 * mse + 2.0 * hard
    np.testing.assert_allclose(loss.item(), 0.6 * total + 0.4 * task, rtol=1e-5)
    expected = {"distillation_loss": total, "task_loss": task}
    expected |= {f"distillation_loss/{k}": v for k, v in (("kd", kd), ("mse", mse), ("hard", hard))}
    assert logged.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(logged[name], value, rtol=1e-5)


def test_objects_lists_and_mappings_say_the_same():
    forms = [
        {"kd": 0.5, "mse": LossTerm("mse", weight=2.0)},
        [LossTerm("kd", weight=0.5), LossTerm("mse", weight=2.0)],
        [LossTerm(SoftTargetLoss(), 0.5), LossTerm(F.mse_loss, 2.0, name="mse")],
    ]
    losses = [one_step(losses=form)[0] for form in forms]
    assert torch.equal(losses[0], losses[1])
    torch.testing.assert_close(losses[0], losses[2])


def test_the_same_loss_twice_gets_numbers():
    assert [term.name for term in make_terms(["kd", "kd", "mse"])] == ["kd_1", "kd_2", "mse"]
    assert [term.name for term in make_terms([SoftTargetLoss(), lambda s, t: s.sum()])] == ["kd", "loss"]


def test_dkd_finds_the_target_in_the_batch():
    loss, _, module, (x, y) = one_step(losses="dkd", alpha=1.0)
    torch.testing.assert_close(loss, DKDLoss()(module(x), module.teacher(x), y))
    other = (x, y, (y + 1) % 3)

    for where, label in ((None, other[2]), (1, y), (lambda batch: batch[1], y)):
        loss, _, module, _ = one_step(batch=other, losses="dkd", alpha=1.0, target=where)
        torch.testing.assert_close(loss, DKDLoss()(module(x), module.teacher(x), label))


def test_a_user_s_loss_gets_what_it_names():
    seen = {}

    def mine(student, teacher, *, target, batch, mask=None):
        seen.update(target=target, batch=batch, mask=mask)
        return (student - teacher).square().mean()

    _, _, _, batch = one_step(losses=mine)
    assert seen["batch"] is batch
    assert seen["target"] is batch[1]
    assert seen["mask"] is None

    class Wants(nn.Module):
        def forward(self, student, teacher, target):
            return student.sum() * 0 + target.sum()

    loss, *_ = one_step(losses=Wants(), alpha=1.0)
    assert loss == batch[1].sum()
    assert wants(F.cross_entropy) == wants(nn.MSELoss()) == wants(max) == frozenset()
    assert wants(named_loss("standardized_kd")) == {"mask"}
    assert wants(named_loss("dkd")) == {"mask", "target"}
    assert required(named_loss("dkd")) == required(StandardizedLoss(DKDLoss())) == {"target"}


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(7, 5), nn.Linear(5, 3)

    def forward(self, input_ids, attention_mask=None):
        return {"logits": self.head(self.embed(input_ids))}


class Tagger(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = Tokens()

    def forward(self, input_ids, attention_mask=None):
        return self.net(input_ids, attention_mask)

    def training_step(self, batch, batch_idx):
        logits = self(batch["input_ids"], batch["attention_mask"])["logits"]
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def tokens():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 7, (4, 6), generator=generator)
    labels = torch.randint(0, 3, (4, 6), generator=generator)
    mask = torch.ones(4, 6, dtype=torch.long)
    mask[:, 4:] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": labels.masked_fill(mask == 0, -100)}


@pytest.mark.parametrize("losses", [SoftTargetLoss(dim=-1), DKDLoss(dim=-1)])
def test_padding_does_not_count(losses):
    batch = tokens()
    module = DistillationModule(Tagger(), Tokens(), losses=losses, alpha=1.0)
    module.log = lambda *args: None
    loss = module.training_step(batch, 0)
    changed = {**batch, "input_ids": batch["input_ids"].clone()}
    changed["input_ids"][:, 4:] = 0
    assert torch.equal(module.training_step(changed, 0), loss)
    module = DistillationModule(module.student, module.teacher, losses=losses, alpha=1.0, mask="other")
    module.log = lambda *args: None
    shorter = torch.zeros(4, 6)
    shorter[:, :2] = 1
    assert not torch.equal(module.training_step({**batch, "other": shorter}, 0), loss)


def test_where_targets_and_masks_are_found():
    batch = tokens()
    assert find(batch, None, "target") is batch["labels"]
    assert find(batch, None, "mask") is batch["attention_mask"]
    assert find((batch["labels"],), None, "target") is None
    assert find({"mask": batch["labels"]}, None, "mask") is None  # may be a segmentation's target
    assert find((1, torch.zeros(2)), None, "target") is None
    assert find(batch, "labels", "target") is batch["labels"]
    mask = torch.ones(2, 5)
    assert fits(mask, torch.zeros(2, 5, 3))
    assert fits(mask, torch.zeros(2, 4, 5, 5))
    assert fits(torch.ones(2, 4, 4), torch.zeros(2, 3, 4, 4))
    assert not fits(mask, torch.zeros(2, 3))


# --- schedules


def test_scheduled_numbers_follow_the_formula(trainer):
    logged = Logged()
    module = DistillationModule(
        Student(),
        Net(),
        losses={"kd": Scheduled(1.0, 3.0, "linear", end=1), "mse": 1.0},
        alpha=Scheduled(0.9, 0.1, "cosine"),
        temperature=Scheduled(8.0, 2.0, "cubic", start=0.5, end=1.0),
    )
    trainer(logged, max_epochs=2).fit(module, loader())  # 4 steps an epoch
    assert len(logged.steps) == 8
    for step, values in enumerate(logged.steps):
        t = step / 8
        np.testing.assert_allclose(values["distillation/alpha"], 0.9 - 0.8 * (1 - np.cos(np.pi * t)) / 2, rtol=1e-6)
        np.testing.assert_allclose(values["distillation/kd/weight"], 1 + 2 * min(1, step / 4), rtol=1e-6)
        late = max(0.0, (t - 0.5) / 0.5)
        np.testing.assert_allclose(values["distillation/kd/temperature"], 8 - 6 * (1 - (1 - late) ** 3), rtol=1e-6)
        total = values["distillation/kd/weight"] * values["distillation_loss/kd"] + values["distillation_loss/mse"]
        np.testing.assert_allclose(values["distillation_loss"], total, rtol=1e-5)


def test_a_resumed_run_goes_on_with_the_schedule(trainer, tmp_path):
    def module():
        torch.manual_seed(0)
        return DistillationModule(Student(), Net(), alpha=Scheduled(0.9, 0.1), temperature=Scheduled(8.0, 1.0))

    whole = module()
    trainer(max_epochs=2).fit(whole, loader())

    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, pl_module):
            trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")

    trainer(Save(), max_epochs=2).fit(module(), loader())
    resumed = module()
    trainer(max_epochs=2).fit(resumed, loader(), ckpt_path=tmp_path / "0.ckpt")
    assert torch.equal(resumed.net[0].weight, whole.net[0].weight)


def test_outside_of_a_run_a_scheduled_number_is_its_first():
    number = Scheduled(0.9, 0.1)
    assert float(number) == 0.9
    number.move(5, Timeline(10, 10))
    assert float(number) == pytest.approx(0.5)


# --- errors


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": []}, r"Argument `losses` must hold a loss, but got none"),
        ({"losses": 3}, r"Argument `loss` must be a name or a callable, but got 3"),
        ({"losses": {"kd": "much"}}, r"Argument `losses` must give a weight or a LossTerm for 'kd', but got 'much'"),
        ({"losses": {"kd": -1.0}}, r"Argument `weight` must be 0 or above, but got -1.0"),
        ({"losses": {"kdd": 1.0}}, r"but got 'kdd'\. Did you mean 'kd'"),
        ({"losses": "mse", "temperature": 2.0}, r"Argument `temperature` must be left out unless .* but got 2.0"),
        ({"losses": "hint"}, r"Argument `student_layer` must name a layer for the loss 'hint', but got None"),
        ({"losses": {"kd": 1.0, "hint": 1.0}}, r"Argument `student_layer` must name a layer for the loss 'hint'"),
        ({"losses": "kd", "student_layer": "net.0"}, r"Argument `student_layer` must go with a named loss of features"),
        ({"teacher_layer": "linear"}, r"Argument `student_layer` must go with a named loss .*, but got None"),
        ({"alpha": Scheduled(0.5, 1.5)}, r"Argument `alpha` must be in \[0, 1\], but got Scheduled\(0.5, 1.5"),
        ({"temperature": Scheduled(2.0, 0.0)}, r"Argument `temperature` must be above 0, but got Scheduled"),
        ({"teacher_outputs": "[0"}, r"Argument `teacher_outputs` must be a layer path such as"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        DistillationModule(Student(), Net(), **arguments)


def test_bad_terms_and_schedules():
    with pytest.raises(ValueError, match=r"Argument `student_layer` must be given with `teacher_layer`"):
        LossTerm("hint", teacher_layer="linear")
    with pytest.raises(ValueError, match=r"Argument `temperature` must be left out for the loss 'mse'"):
        named_loss("mse", 2.0)
    with pytest.raises(ValueError, match=r"Argument `schedule` must be one of"):
        Scheduled(1.0, 0.0, "sudden")
    with pytest.raises(ValueError, match=r"Argument `end` must be at or after `start` \(2\), but got 1"):
        Scheduled(1.0, 0.0, start=2, end=1)
    with pytest.raises(ValueError, match=r"Argument `end` must be at or after `start` \(0.9\), but got 1"):
        Scheduled(1.0, 0.0, start=0.9, end=1).move(0, Timeline(1, 10))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"losses": "dkd", "target": 5}, r"Argument `target` must lead to a Tensor in a batch, but got 5"),
        ({"losses": "dkd", "target": "label"}, r"Argument `target` must lead to a Tensor in a batch, but got 'label'"),
        (
            {"mask": lambda b: torch.ones(7)},
            r"Argument `mask` must fit what a loss compares, but got a mask \(7,\) that none of kd takes",
        ),
        ({"losses": lambda s, t: s}, r"Argument `losses` must return a scalar Tensor, but the loss 'loss' returned"),
    ],
)
def test_what_a_step_refuses(arguments, message):
    with pytest.raises(ValueError, match=message):
        one_step(**arguments)


def test_a_target_that_is_nowhere(trainer):
    class Floats(Student):
        def training_step(self, batch, batch_idx):
            return self(batch).sum()

    module = DistillationModule(Floats(), Net(), losses="dkd")
    with pytest.raises(ValueError, match=r"Argument `target` must say where .* for the loss 'dkd', but got None"):
        trainer(max_epochs=1).fit(module, DataLoader(torch.zeros(4, 4)))


def test_a_selection_names_what_is_there():
    class Pair(Net):
        def forward(self, x):
            return {"first": self.linear(x), "second": x}

    torch.manual_seed(0)
    batch = next(iter(loader()))
    for outputs, message in (
        (None, r"got a dict with \[first\], \[second\]\. Give a callable or select one: `teacher_outputs='\[first\]'`"),
        ("[third]", r"`\[third\]` isn't in a dict with \[first\], \[second\]"),
        ("", r"must lead to a Tensor, but 'the output' is a dict with \[first\], \[second\]"),
    ):
        module = DistillationModule(Plain(), Pair(), teacher_outputs=outputs)
        module.log = lambda *args: None
        with pytest.raises(ValueError, match=message):
            module.training_step(batch, 0)
    module = DistillationModule(
        Net(), Pair(), teacher_outputs="[first]", task_loss=F.cross_entropy, optimizer=torch.optim.Adam
    )
    module.log = lambda *args, **kwargs: None
    assert module.training_step(batch, 0).requires_grad
    module = DistillationModule(Pair(), Net(), outputs="[first]", task_loss=F.cross_entropy, optimizer=torch.optim.Adam)
    module.log = lambda *args, **kwargs: None
    assert module.training_step(batch, 0).requires_grad


class Fits(L.LightningModule):
    """A linear student with any head, loss and targets."""

    def __init__(self, loss, outputs: int = 3, head: nn.Module | None = None):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, outputs), *([head] if head else []))
        self.loss = loss

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.loss(self(batch[0]), batch[1])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def batches(target: torch.Tensor) -> DataLoader:
    torch.manual_seed(1)
    return DataLoader(TensorDataset(torch.randn(16, 4), target), 8)


BINARY, NUMBERS = (torch.arange(16) % 2).float()[:, None], torch.linspace(-2, 2, 16)[:, None]
CLASSES, LABELS = torch.arange(16) % 3, (torch.arange(48).reshape(16, 3) % 5 > 2).float()


def nll(probabilities, target):
    return F.nll_loss(probabilities.clamp_min(1e-6).log(), target)


@pytest.mark.parametrize("losses", ["kd", "hard", "dkd", "dist", "standardized_kd"])
@pytest.mark.parametrize(
    ("loss", "target"),
    [(F.binary_cross_entropy_with_logits, BINARY), (F.mse_loss, NUMBERS)],
    ids=["binary", "regression"],
)
def test_one_logit_is_refused_before_the_first_step(trainer, losses, loss, target):
    module = DistillationModule(Fits(loss, 1), Net(1), losses=losses)
    before = [p.clone() for p in module.parameters()]
    with pytest.raises(
        ValueError, match=r'must have at least \d classes for \w+Loss, but got shape \(\d, 1\).*"multilabel"'
    ):
        trainer(max_epochs=1).fit(module, batches(target))
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize(
    ("losses", "loss", "target"),
    [("multilabel", F.binary_cross_entropy_with_logits, BINARY), ("regression", F.mse_loss, NUMBERS)],
)
def test_what_is_named_instead_teaches(trainer, losses, loss, target):
    """Alone: the student becomes its teacher."""
    torch.manual_seed(0)
    module = DistillationModule(Fits(loss, 1), Net(1), losses=losses, alpha=1.0)
    data = batches(target)

    def away():
        x = data.dataset.tensors[0]
        return float((module(x) - module.teacher(x)).detach().abs().mean())

    before = away()
    trainer(max_epochs=150).fit(module, data)
    assert away() < 0.1 * before


@pytest.mark.parametrize("losses", ["kd", "hard", "dkd", "dist", "standardized_kd", "multilabel"])
@pytest.mark.parametrize("who", ["student", "teacher"])
def test_probabilities_in_the_place_of_logits_are_refused(trainer, losses, who):
    probabilities = nn.Softmax(1)
    student = Fits(nll, 3, probabilities) if who == "student" else Fits(F.cross_entropy)
    teacher = Net() if who == "student" else nn.Sequential(Net(), probabilities)
    argument = {"student": "outputs", "teacher": "teacher_outputs"}[who]
    with pytest.raises(
        ValueError, match=rf"Argument `{argument}` must lead to logits of the {who} .* got probabilities.*log\(\)"
    ):
        trainer(max_epochs=1).fit(DistillationModule(student, teacher, losses=losses), batches(CLASSES))


def test_the_mend_for_probabilities_is_the_loss_of_the_logits():
    """``log`` of a softmax: the logits up to a constant, at any temperature."""
    student, teacher = torch.randn(6, 3), torch.randn(6, 3)
    logs = [x.softmax(1).clamp_min(1e-6).log() for x in (student, teacher)]
    torch.testing.assert_close(SoftTargetLoss(3.0)(*logs), SoftTargetLoss(3.0)(student, teacher))


def test_probabilities_of_segmentation_in_half_precision():
    values = torch.randn(2, 5, 4, 4).softmax(1).bfloat16()
    with pytest.raises(ValueError, match="got probabilities"):
        check_are_logits(values, 1, "teacher", "kd")
    for logits in (torch.randn(2, 5, 4, 4), torch.eye(3), torch.zeros(4, 3), values.float().log()):
        check_are_logits(logits, 1, "teacher", "kd")


def test_a_sigmoid_before_the_sigmoid_of_the_loss_is_warned_of(trainer):
    module = DistillationModule(Fits(F.binary_cross_entropy, 3, nn.Sigmoid()), Net(), losses="multilabel")
    with pytest.warns(
        UserWarning, match="'multilabel' applies a sigmoid to the student's outputs, and all of them are in"
    ):
        trainer(max_epochs=1).fit(module, batches(LABELS))


@pytest.mark.parametrize(
    ("loss", "target", "use"),
    [(F.binary_cross_entropy_with_logits, LABELS, "multilabel"), (F.mse_loss, LABELS * 3 - 1, "regression")],
)
def test_targets_that_are_no_classes_are_noticed(trainer, loss, target, use):
    with pytest.warns(UserWarning, match=f"'kd' compares probabilities of classes of which one is right.*{use}"):
        trainer(max_epochs=1).fit(DistillationModule(Fits(loss), Net()), batches(target))


@pytest.mark.parametrize("target", [CLASSES, F.one_hot(CLASSES).float(), torch.full((16, 3), 1 / 3)])
def test_classes_and_soft_labels_are_not_warned_of(trainer, target):
    trainer(max_epochs=1).fit(DistillationModule(Fits(F.cross_entropy), Net()), batches(target))
