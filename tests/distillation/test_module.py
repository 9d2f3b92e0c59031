import copy
import pickle
from collections import OrderedDict

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightning.pytorch.callbacks import EMAWeightAveraging
from scipy.special import softmax
from torch import nn

from lightning_accel import DistillationModule, LossTerm, plan
from tests.distillation.models import Net, Plain, Student, loader


class Bare(L.LightningModule):
    """A student whose step is given; nothing else."""

    def __init__(self, step):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 3))
        self.aux = nn.Linear(4, 3)
        self.step = step

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        return self.step(self, *batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1.0)


def step_of(step, teacher=None, **kwargs):
    """One training step outside of a Trainer: (what it returned, the module, the batch)."""
    torch.manual_seed(0)
    module = DistillationModule(Bare(step), teacher or Net(), **kwargs)
    module.log = lambda *args, **kwargs: None  # there is no Trainer to log to
    batch = next(iter(loader()))
    return module.training_step(batch, 0), module, batch


def ordinary(self, x, y):
    return F.cross_entropy(self(x), y)


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_loss_equals_the_formula(alpha):
    loss, module, (x, y) = step_of(ordinary, alpha=alpha, temperature=3.0)
    student, teacher = module(x).detach().double().numpy(), module.teacher(x).double().numpy()
    p, q = softmax(teacher / 3, axis=1), softmax(student / 3, axis=1)
    distillation = 9 * (p * np.log(p / q)).sum(axis=1).mean()
    task = -np.log(softmax(student, axis=1)[np.arange(4), y.numpy()]).mean()
    np.testing.assert_allclose(loss.item(), alpha * distillation + (1 - alpha) * task, rtol=1e-5)


def test_a_student_stays_what_it_was(trainer, tmp_path):
    student = Student(width=5)
    module = DistillationModule(student, Net())
    assert isinstance(module, Student)
    assert isinstance(module, DistillationModule)
    assert module.student is student
    runner = trainer(max_epochs=1)
    runner.fit(module, loader(), loader())
    assert set(runner.callback_metrics) == {"train_loss", "val_loss", "distillation_loss", "task_loss"}
    assert runner.callback_metrics["task_loss"] == runner.callback_metrics["train_loss"]
    assert student.events == ["setup fit", "on_fit_start", "extra 0", "extra 1", "extra 2", "extra 3"]
    assert dict(module.hparams) == {"width": 5, "lr": 0.1, "net": None}
    assert "forward" not in vars(student)

    runner.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == {"net.0.weight", "net.0.bias", "net.2.weight", "net.2.bias"}
    assert checkpoint["mine"] == 42
    loaded = Student.load_from_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), student.parameters(), strict=True))


def test_resuming_equals_going_on(trainer, tmp_path):
    """Also: alpha=0 trains exactly as the student alone does, so nothing else is touched."""
    torch.manual_seed(0)
    alone, whole, half = Student(), Student(), Student()
    whole.load_state_dict(alone.state_dict())
    half.load_state_dict(alone.state_dict())
    trainer(max_epochs=2).fit(alone, loader())
    trainer(max_epochs=2).fit(DistillationModule(whole, Net(), alpha=0.0), loader())
    assert torch.equal(alone.net[0].weight, whole.net[0].weight)

    first = trainer(max_epochs=1)
    first.fit(DistillationModule(half, Net(), alpha=0.0), loader())
    first.save_checkpoint(tmp_path / "half.ckpt")
    resumed = Student()
    trainer(max_epochs=2).fit(DistillationModule(resumed, Net(), alpha=0.0), loader(), ckpt_path=tmp_path / "half.ckpt")
    assert torch.equal(resumed.net[0].weight, whole.net[0].weight)


def test_the_student_learns_from_the_teacher_alone(trainer):
    torch.manual_seed(0)
    teacher = Net()
    student = Bare(ordinary)
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    trainer(max_epochs=12).fit(DistillationModule(student, teacher, alpha=1.0, temperature=1.0), loader())
    x = torch.cat([x for x, _ in loader()])
    assert (student(x).softmax(1) - teacher(x).softmax(1)).abs().max() < 0.1
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_the_teacher_is_registered_nowhere(trainer, tmp_path):
    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            assert pl_module.training
            assert not any(m.training for m in teacher.modules())

    teacher = nn.Sequential(Net(), nn.BatchNorm1d(3), nn.Dropout(0.5))
    student = Student()
    expected = {id(m) for m in student.modules()} - {id(student)}
    module = DistillationModule(student, teacher)
    module.train()
    assert {id(m) for m in module.modules()} - {id(module)} == expected
    assert set(module.state_dict()) == set(Student().state_dict())
    assert [id(p) for p in module.parameters()] == [id(p) for p in student.parameters()]
    assert not any(p.requires_grad for p in teacher.parameters())
    assert set(vars(student)) == set(vars(Student()))

    ema = EMAWeightAveraging()
    runner = trainer(ema, Watch(), max_epochs=1)
    runner.fit(module, loader())
    assert [id(p) for group in runner.optimizers[0].param_groups for p in group["params"]] == [
        id(p) for p in student.parameters()
    ]
    average = ema._average_model
    assert set(average.module.state_dict()) == set(student.state_dict())
    assert average.module.teacher is teacher
    runner.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(student.state_dict())
    assert teacher[1].num_batches_tracked == 0


def test_the_teacher_follows_the_student_but_not_its_copies():
    module = DistillationModule(Student(), Net())
    module.double()
    assert {p.dtype for p in module.teacher.parameters()} == {torch.float64}
    module.to("meta")
    assert {p.device.type for p in module.teacher.parameters()} == {"meta"}

    module = DistillationModule(Student(), Net())
    copied = copy.deepcopy(module).to("meta")
    assert {p.device.type for p in copied.parameters()} == {"meta"}
    assert {p.device.type for p in module.teacher.parameters()} == {"cpu"}


def test_pickle_and_deepcopy():
    module = DistillationModule(Student(width=5), Net(), alpha=0.25)
    x = torch.randn(2, 4)
    for other in (pickle.loads(pickle.dumps(module)), copy.deepcopy(module)):
        assert type(other) is type(module)
        assert other.student is not module.student
        assert type(other.student) is Student
        assert other.student.net is other.net
        assert torch.equal(other(x), module(x))
        assert torch.equal(other.teacher(x), module.teacher(x))
        assert other._distillation.alpha == 0.25
    assert copy.deepcopy(module).teacher is module.teacher
    assert pickle.loads(pickle.dumps(module)).teacher is not module.teacher
    restored = pickle.loads(
        pickle.dumps(DistillationModule(Net(), Net(), task_loss=F.cross_entropy, optimizer=torch.optim.Adam))
    )
    assert type(restored.student) is Net
    assert set(restored.state_dict()) == {"linear.weight", "linear.bias"}


def test_a_plain_network_trains_and_keeps_its_keys(trainer, tmp_path):
    network = Net()
    module = DistillationModule(
        network,
        Net(),
        task_loss=nn.CrossEntropyLoss(),
        optimizer=lambda p: {
            "optimizer": (o := torch.optim.SGD(p, 0.1)),
            "lr_scheduler": torch.optim.lr_scheduler.StepLR(o, 1),
        },
    )
    assert isinstance(module, Net)
    start = network.linear.weight.detach().clone()
    runner = trainer(max_epochs=1)
    runner.fit(module, loader(), loader())
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.01)
    assert set(runner.callback_metrics) == {"train_loss", "val_loss", "distillation_loss", "task_loss"}
    assert not torch.equal(network.linear.weight, start)
    assert {name for name, _ in module.named_parameters()} == {"linear.weight", "linear.bias"}
    runner.save_checkpoint(tmp_path / "a.ckpt")
    state = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert set(state) == {"linear.weight", "linear.bias"}
    Net().load_state_dict(state)
    assert network._trainer is None
    assert set(runner.test(module, loader(), verbose=False)[0]) == {"test_loss"}
    DistillationModule(network, Net(), task_loss=nn.CrossEntropyLoss(), optimizer=torch.optim.Adam)  # a second time


class Takes(nn.Module):
    """A forward of two inputs, one by keyword, that returns a mapping."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x, *, scale):
        return OrderedDict(logits=self.linear(x) * scale, hidden=x)


def test_dict_batches_and_outputs_with_logits(trainer):
    teacher = Takes()
    module = DistillationModule(Takes(), teacher, task_loss=F.cross_entropy, optimizer=torch.optim.Adam)
    data = [({"x": torch.randn(2, 4), "scale": torch.tensor(2.0)}, torch.tensor([0, 1]))]
    trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(data, batch_size=None))
    assert module._distillation.verified


def test_hugging_face_output():
    modeling_outputs = pytest.importorskip("transformers.modeling_outputs", reason="transformers is not installed")

    class Classifier(Net):
        def forward(self, x):
            return modeling_outputs.SequenceClassifierOutput(logits=super().forward(x))

    module = DistillationModule(Classifier(), Classifier(), task_loss=F.cross_entropy, optimizer=torch.optim.Adam)
    module.log = lambda *args, **kwargs: None
    assert module.training_step(next(iter(loader())), 0).requires_grad


@pytest.mark.parametrize(
    ("step", "outputs"),
    [
        (lambda self, x, y: F.cross_entropy(self.forward(x), y), None),
        (lambda self, x, y: F.cross_entropy(self.net(x), y), "net"),
        (lambda self, x, y: F.cross_entropy(self.net.forward(x), y), "net"),
        (lambda self, x, y: F.cross_entropy(self.net[0](x), y), "net.0"),
        (lambda self, x, y: F.cross_entropy(self(x), y), lambda logits: logits * 1.0),
    ],
)
def test_logits_are_seen_wherever_they_are_made(step, outputs):
    loss, *_ = step_of(step, outputs=outputs)
    expected, *_ = step_of(ordinary)
    assert torch.equal(loss, expected)


def test_logits_of_a_method():
    class Encoder(Net):
        def encode(self, x):
            return self.linear(x)

    student = Bare(lambda self, x, y: F.cross_entropy(self.aux.encode(x), y))
    student.aux = Encoder()
    module = DistillationModule(student, Net(), outputs="aux.encode")
    module.log = lambda *args, **kwargs: None
    assert module.training_step(next(iter(loader())), 0).requires_grad
    assert "encode" not in vars(student.aux)


def test_a_forward_placed_on_the_instance_is_called_and_stays():
    torch.manual_seed(0)
    module = DistillationModule(Bare(ordinary), Net(), alpha=0.0)
    module.log = lambda *args, **kwargs: None
    calls = []

    def placed(x):
        calls.append(x)
        return module.net(x) * 0

    module.forward = placed
    loss = module.training_step(next(iter(loader())), 0)
    torch.testing.assert_close(loss.item(), float(np.log(3)))
    assert len(calls) == 1
    assert vars(module)["forward"] is placed


def test_steps_that_return_a_dict_or_nothing():
    result, *_ = step_of(lambda self, x, y: {"loss": ordinary(self, x, y), "note": 7})
    loss, *_ = step_of(ordinary)
    assert set(result) == {"loss", "note"}
    assert result["note"] == 7
    assert torch.equal(result["loss"], loss)
    assert step_of(lambda self, x, y: None)[0] is None


def test_evaluation_does_not_run_the_teacher(trainer):
    class Loud(Net):
        def forward(self, x):
            raise AssertionError("the teacher ran")

    module = DistillationModule(Student(), Loud())
    assert set(trainer(max_epochs=1).validate(module, loader(), verbose=False)[0]) == {"val_loss"}
    with pytest.raises(AssertionError, match="the teacher ran") as error:
        trainer(max_epochs=1).fit(module, loader())
    assert "Raised by the teacher" in error.value.__notes__[0]


@pytest.mark.parametrize(
    ("step", "kwargs", "message"),
    [
        (
            lambda self, x, y: F.cross_entropy(self.net(x), y),
            {},
            r"'forward' wasn't called. training_step called net: `outputs='net'`",
        ),
        (lambda self, x, y: F.cross_entropy(x @ self.aux.weight.T, y), {}, r"`outputs` .* 'forward' wasn't called\.$"),
        (lambda self, x, y: F.cross_entropy(self(x) + self(x), y), {}, r"`outputs` .* 'forward' was called 2 times"),
        (lambda self, x, y: F.cross_entropy(self(x), y), {"outputs": "aux"}, r"'aux' wasn't called"),
    ],
)
def test_logits_not_seen_exactly_once(step, kwargs, message):
    with pytest.raises(RuntimeError, match=message):
        step_of(step, **kwargs)


def test_logits_without_gradient():
    def step(self, x, y):
        with torch.no_grad():
            self(x)
        return F.cross_entropy(self.net(x), y)

    with pytest.raises(RuntimeError, match=r"`outputs` must name a call made with gradients, but 'forward'"):
        step_of(step)


def test_logits_that_do_not_fit():
    with pytest.raises(ValueError, match=r"same shape, but got \(4, 3\) and \(4, 5\)\. Select them with `outputs`"):
        step_of(ordinary, teacher=Net(5))
    assert step_of(ordinary, teacher=Net(5), teacher_outputs=lambda logits: logits[:, :3])[0].requires_grad

    class Pair(Net):
        def forward(self, x):
            return self.linear(x), x

    with pytest.raises(ValueError, match=r"Argument `teacher_outputs` must say where .* but got a tuple"):
        step_of(ordinary, teacher=Pair())
    module = DistillationModule(Pair(), Net(), task_loss=F.cross_entropy, optimizer=torch.optim.Adam)
    module.log = lambda *args, **kwargs: None
    with pytest.raises(ValueError, match=r"Argument `outputs` must say where .* but got a tuple"):
        module.training_step(next(iter(loader())), 0)
    module = DistillationModule(
        Pair(), Net(), outputs=lambda out: out[0], task_loss=F.cross_entropy, optimizer=torch.optim.Adam
    )
    module.log = lambda *args, **kwargs: None
    assert module.training_step(next(iter(loader())), 0).requires_grad


class NamedTeacher(Student):
    def __init__(self):
        super().__init__()
        self.teacher = nn.Linear(1, 1)


class Logs(Net):
    def log(self, x):
        return x


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"Argument `alpha` must be in \[0, 1\], but got 1.5\."),
        ({"alpha": "0.5"}, r"Argument `alpha` must be in \[0, 1\], but got '0\.5'\."),
        ({"temperature": 0}, r"Argument `temperature` must be above 0, but got 0\."),
        ({"temperature": -4.0}, r"Argument `temperature` must be above 0, but got -4\.0\."),
        ({"temperature": "4"}, r"Argument `temperature` must be a number, or `Scheduled`, but got '4'\."),
        ({"losses": "kdd"}, r"Argument `losses` must name one of kd, .*, but got 'kdd'\. Did you mean 'kd'\?"),
        ({"losses": F.mse_loss, "temperature": 2.0}, r"Argument `temperature` must be left out unless"),
        ({"losses": nn.Linear(1, 1)}, r"Argument `losses` must hold no parameters to train"),
        ({"teacher": "resnet"}, r"Argument `teacher` must be an nn.Module, .*, but got 'resnet', which does not exist"),
        ({"teacher": [Net()]}, r"Argument `teacher` must be .* a list\. Write `TeacherEnsemble"),
        ({"teacher": 3}, r"Argument `teacher` must be an nn.Module, \"ema\" or a path, but got a int\.$"),
        ({"student": "resnet"}, r"Argument `student` must be a LightningModule or an nn.Module, but got a str"),
        ({"student": L.LightningModule()}, r"Argument `student` must define training_step"),
        ({"student": NamedTeacher()}, r"Argument `student` must not have an attribute named `teacher`"),
        ({"task_loss": F.cross_entropy}, r"Argument `task_loss` must be left out when `student` is a LightningModule"),
        (
            {"student": Net()},
            r"Argument `task_loss` must be a callable when `student` is a plain nn.Module, but got None",
        ),
        (
            {"student": Logs(), "task_loss": F.cross_entropy, "optimizer": torch.optim.Adam},
            r"Argument `student` must not use names of LightningModule, but got Logs with log",
        ),
        ({"teacher_checkpoint": "nowhere.ckpt"}, r"Argument `teacher_checkpoint` must be a checkpoint file, but got"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        DistillationModule(**{"student": Student(), "teacher": Net(), **arguments})


def test_a_teacher_must_not_be_part_of_the_student():
    student = Student()
    with pytest.raises(
        ValueError, match=r"must not share parameters .* '0.weight', which is the student's 'net.0.weight'"
    ):
        DistillationModule(student, student.net)
    assert all(p.requires_grad for p in student.parameters())
    with pytest.raises(ValueError, match="must not be distilled already"):
        DistillationModule(DistillationModule(student, Net()), Net())


def test_refused_before_training(trainer):
    class Several(Student):
        def configure_optimizers(self):
            return [torch.optim.SGD(self.parameters(), 0.1), torch.optim.SGD(self.parameters(), 0.1)]

    with pytest.raises(RuntimeError, match="multiple optimizers is only supported with manual optimization"):
        trainer(max_epochs=1).fit(DistillationModule(Several(), Net()), loader())
    with pytest.raises(ValueError, match=r"`outputs` must be the dotted path .* but got 'nett'.* Its submodules: net"):
        trainer(max_epochs=1).fit(DistillationModule(Student(), Net(), outputs="nett"), loader())
    module = DistillationModule(Net(), Net(), task_loss=F.cross_entropy, optimizer=torch.optim.Adam)
    with pytest.raises(ValueError, match=r"A batch must be \(inputs, target\)"):
        trainer(max_epochs=1).fit(module, torch.utils.data.DataLoader(torch.zeros(4, 4)))
    with pytest.raises(TypeError, match="on the student's class"):
        module.load_from_checkpoint("a.ckpt")


class Returns(Net):
    """A teacher whose logits are in what ``of`` makes of them."""

    def __init__(self, of, width=3):
        super().__init__(width)
        self.of = of

    def forward(self, x):
        return self.of(self.linear(x))


@pytest.mark.parametrize(
    ("teacher", "arguments", "message"),
    [
        (Returns(lambda y: {"out": y, "x": y}), {}, r"got a dict with \[out\], \[x\]\. .* `teacher_outputs='\[out\]'`"),
        (Returns(lambda y: {"out": y}), {"teacher_outputs": "[ou]"}, r"`\[ou\]` isn't in a dict with \[out\]"),
        (Net(5), {}, r"must have the same shape, but got \(3, 3\) and \(3, 5\)\. Select them with"),
        (
            Returns(lambda y: y[:, None].repeat(1, 2, 1)),
            {},
            r"must have the same shape, but got \(3, 3\) and \(3, 2, 3\)",
        ),
        (Net(5), {"losses": "dkd"}, r"must have the same shape, but got \(3, 3\) and \(3, 5\)"),
        (Net(), {"losses": lambda s, t: s}, r"must return a scalar Tensor"),
    ],
)
def test_what_does_not_fit_is_refused_before_the_first_step(trainer, teacher, arguments, message):
    """Also in ``plan``, and nothing has moved: no random number, no statistics of a norm."""

    class Normed(Plain):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 3))

        def on_train_batch_start(self, batch, batch_idx):
            raise AssertionError("training began")

    torch.manual_seed(3)
    module = DistillationModule(Normed(), teacher, **arguments)
    state = torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        plan(trainer(max_epochs=1), module, train_dataloaders=loader())
    with pytest.raises(ValueError, match=message):
        trainer(max_epochs=1).fit(module, loader())
    assert torch.equal(torch.get_rng_state(), state)
    assert module.net[0].num_batches_tracked == 0


def test_a_call_that_the_batch_does_not_tell_is_no_error(trainer):
    """``training_step`` may call ``forward`` with what it makes of the batch, and a stream isn't touched."""

    class Makes(Plain):
        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0][:, None].expand(-1, 4)), batch[1])

    class Views(Plain):
        """Two views of each sample, so that there are more logits than the batch has samples."""

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch[0].repeat(2, 1)), batch[1].repeat(2))

    class Stream(torch.utils.data.IterableDataset):
        started = 0

        def __iter__(self):
            self.started += 1
            return iter([(torch.ones(4), torch.tensor(1))] * 4)

    data = torch.utils.data.TensorDataset(torch.randn(8), torch.randint(0, 3, (8,)))
    trainer(max_epochs=1).fit(DistillationModule(Makes(), Net()), torch.utils.data.DataLoader(data, 4))
    views = DistillationModule(Views(), Net(), losses="dkd", target=lambda batch: batch[1].repeat(2))
    trainer(max_epochs=1).fit(views, loader())
    stream = Stream()
    trainer(max_epochs=1).fit(DistillationModule(Plain(), Net()), torch.utils.data.DataLoader(stream, 2))
    assert stream.started == 1


def test_hooks_see_the_batch_once(trainer):
    """The batch that layers are tried with goes through the hooks in Lightning's order, each once."""

    class Hooks(Student):
        def on_before_batch_transfer(self, batch, dataloader_idx):
            assert batch[1].ndim == 1
            return batch[0], F.one_hot(batch[1], 3)

        def on_after_batch_transfer(self, batch, dataloader_idx):
            assert not batch[1].is_floating_point()
            return batch[0], batch[1].float()

    module = DistillationModule(Hooks(), Student(), losses=["kd", LossTerm("hint", student_layer="net.0")])
    trainer(max_epochs=1).fit(module, loader())


def test_teacher_checkpoint(tmp_path):
    source = Net()
    torch.save(source.state_dict(), tmp_path / "state.pt")
    torch.save({"state_dict": source.state_dict(), "epoch": 3}, tmp_path / "lightning.ckpt")
    for name in ("state.pt", "lightning.ckpt"):
        module = DistillationModule(Student(), Net(), teacher_checkpoint=tmp_path / name)
        assert torch.equal(module.teacher.linear.weight, source.linear.weight)

    (tmp_path / "broken.ckpt").write_bytes((tmp_path / "state.pt").read_bytes()[:200])
    torch.save({"weight": torch.zeros(2)}, tmp_path / "other.pt")
    for name, message in (
        ("broken.ckpt", r"must be a readable checkpoint, but got '.*broken.ckpt': "),
        ("other.pt", r"'linear.weight' is missing, 'linear.bias' is missing, 'weight' is unknown\."),
    ):
        with pytest.raises(ValueError, match=message) as error:
            DistillationModule(Student(), Net(), teacher_checkpoint=tmp_path / name)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"'linear.weight' is \(3, 4\), not \(5, 4\)"):
        DistillationModule(Student(), Net(5), teacher_checkpoint=tmp_path / "state.pt")


class Recorded(L.Callback):
    """What callbacks see after each step, and what a logger gets."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, *args):
        self.seen.append({name: float(trainer.callback_metrics[name]) for name in ("distillation_loss", "task_loss")})


def test_each_step_logs_what_it_computed_as_self_log_would(trainer):
    class Logs(Student):
        def log(self, *args, **kwargs):  # a way of one's own, asked in every step
            super().log(*args, **kwargs)

    seen = []
    for kind in (Student, Logs):
        torch.manual_seed(0)
        module, recorded = DistillationModule(kind(width=5), Net()), Recorded()
        trainer(recorded, max_epochs=2).fit(module, loader())
        seen.append(recorded.seen)
    assert seen[0] == seen[1]
    assert len({step["distillation_loss"] for step in seen[0]}) == len(seen[0]) == 8
