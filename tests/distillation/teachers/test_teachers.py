"""Teachers that are no single torch network: where they compute, what they say, and that they leave no trace."""

import copy
import pickle

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper
from scipy.special import logsumexp, softmax
from torch import nn

from lightning_accel import DistillationModule, ExactResume, LossTerm, QuantizationAwareTraining, load_runner
from lightning_accel.distillation.teachers.base import network_of
from lightning_accel.teachers import EMATeacher, HuggingFaceTeacher, OnnxTeacher, Teacher, TeacherEnsemble
from tests.distillation.models import Net, Plain
from tests.distillation.models import loader as vectors
from tests.support.models import Classifier, Residual, loader
from tests.support.onnx_models import save


def step(teacher, student=None, batch=None, **kwargs):
    """The distillation loss of one step outside of a Trainer."""
    torch.manual_seed(0)
    module = DistillationModule(student or Plain(), teacher, alpha=1.0, **kwargs)
    module.log = lambda *args, **kwargs: None
    return module.training_step(batch or next(iter(vectors())), 0), module


# --- a place and a precision of its own


class Spy(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.seen = []

    def forward(self, x):
        y = self.conv(x)
        self.seen.append((x.dtype, y.dtype, x.is_contiguous(memory_format=torch.channels_last)))
        return y.mean((2, 3))


@pytest.mark.parametrize("autocast", [False, True])
def test_precision_and_memory_format_are_the_teacher_s_own(autocast):
    spy = Spy()
    teacher = Teacher(spy, precision="bfloat16", channels_last=True)
    module = DistillationModule(Classifier(), teacher, alpha=1.0)
    module.log = lambda *args: None
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        module.training_step(next(iter(loader())), 0)
    assert spy.seen == [(torch.bfloat16, torch.bfloat16, True)]
    assert spy.conv.weight.is_contiguous(memory_format=torch.channels_last)
    module.double()
    assert spy.conv.weight.dtype == torch.bfloat16
    assert teacher(torch.zeros(1, 3, 8, 8)).dtype == torch.float32


def test_half_precision_outputs_are_near_those_of_the_network():
    torch.manual_seed(0)
    network = Residual(12).eval()
    x = torch.randn(4, 3, 8, 8)
    torch.testing.assert_close(
        Teacher(copy.deepcopy(network), precision="bfloat16")(x), network(x), rtol=0.05, atol=0.05
    )


def test_a_device_of_its_own_is_kept():
    teacher = Teacher(Net(), device="cpu")
    module = DistillationModule(Plain(), teacher)
    assert teacher.home == torch.device("cpu")
    module.half()  # as a move to another device would, this goes through `_apply`
    assert {p.device.type for p in teacher.parameters()} == {"cpu"}
    assert {p.dtype for p in teacher.parameters()} == {torch.float16}
    fixed = Teacher(Net(), device="cpu", precision="float32")
    DistillationModule(Plain(), fixed).half()
    assert {p.dtype for p in fixed.parameters()} == {torch.float32}


def test_layers_are_named_as_in_the_wrapped_network(trainer):
    teacher = Teacher(Residual(12), channels_last=True)
    assert network_of(teacher) is teacher.network
    module = DistillationModule(Classifier(), teacher, losses="hint", student_layer="net.norm1", teacher_layer="norm1")
    trainer(max_epochs=1).fit(module, loader())
    assert list(module.adapters) == ["hint:net.norm1:norm1"]


def test_a_checkpoint_loads_into_the_wrapped_network(tmp_path):
    source = Net()
    torch.save({"state_dict": source.state_dict()}, tmp_path / "teacher.ckpt")
    module = DistillationModule(Plain(), Teacher(Net()), teacher_checkpoint=tmp_path / "teacher.ckpt")
    assert torch.equal(module.teacher.network.linear.weight, source.linear.weight)


# --- several


def test_several_teachers_equal_the_formula():
    torch.manual_seed(0)
    nets, weights = [Net(), Net(), Net()], [1.0, 2.0, 5.0]
    x = torch.randn(6, 4)
    logits = [net(x).detach().double().numpy() for net in nets]
    mean = sum(w * y for w, y in zip(weights, logits, strict=True)) / 8
    np.testing.assert_allclose(TeacherEnsemble(nets, weights)(x).detach().numpy(), mean, rtol=1e-5, atol=1e-6)
    mixed = sum(w * softmax(y, axis=1) for w, y in zip(weights, logits, strict=True)) / 8
    output = TeacherEnsemble(nets, weights, average="probabilities")(x).detach().numpy()
    np.testing.assert_allclose(output, np.log(mixed), rtol=1e-5)
    np.testing.assert_allclose(logsumexp(output, axis=1), 0, atol=1e-6)
    loss, module = step(TeacherEnsemble(nets))
    assert loss.requires_grad
    assert not any(p.requires_grad for p in module.teacher.parameters())


def test_several_teachers_select_their_logits():
    class Pair(Net):
        def forward(self, x):
            return x, self.linear(x)

    net = Pair()
    x = torch.randn(2, 4)
    torch.testing.assert_close(TeacherEnsemble([net, net], outputs="[1]")(x), net.linear(x))


# --- a file


@pytest.fixture
def onnx_file(tmp_path):
    def write(net):
        return save(
            tmp_path / "teacher.onnx",
            [helper.make_node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
            [("x", TensorProto.FLOAT, ["n", 4])],
            [("y", TensorProto.FLOAT, ["n", 3])],
            [("w", net.linear.weight.detach().numpy()), ("b", net.linear.bias.detach().numpy())],
        )

    return write


def test_an_onnx_file_teaches_like_its_network(onnx_file):
    torch.manual_seed(1)
    net = Net()
    path = onnx_file(net)
    expected, _ = step(net)
    with load_runner(path) as runner:
        for teacher in (path, str(path), runner, OnnxTeacher(path), OnnxTeacher(path, "onnxruntime")):
            torch.testing.assert_close(step(teacher)[0], expected)
    assert OnnxTeacher(path)(torch.zeros(1, 4, dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(TypeError, match="can't be pickled"):
        pickle.dumps(OnnxTeacher(path))
    teacher = OnnxTeacher(path)
    assert copy.deepcopy(teacher) is teacher


def test_an_onnx_file_in_a_fit(onnx_file, trainer):
    module = DistillationModule(Plain(), onnx_file(Net()))
    trainer(max_epochs=1).fit(module, vectors())
    assert module._distillation.verified


# --- Hugging Face


def test_a_hugging_face_folder(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    config = transformers.BertConfig(
        vocab_size=11, hidden_size=4, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=3
    )
    source = transformers.BertForSequenceClassification(config).eval()
    source.save_pretrained(tmp_path)
    teacher = HuggingFaceTeacher(str(tmp_path), options={"output_hidden_states": True})
    ids = torch.randint(0, 11, (2, 5))
    output = teacher(ids)
    torch.testing.assert_close(output.logits, source(ids).logits)
    assert len(output.hidden_states) == 2
    assert network_of(teacher) is teacher.network
    with pytest.raises(ValueError, match=r"Argument `auto_class` must be a class of transformers .* 'AutoNothing'"):
        HuggingFaceTeacher(str(tmp_path), auto_class="AutoNothing")


# --- the student itself


class Weights(L.Callback):
    def __init__(self):
        self.weights, self.averages = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if not self.weights:
            self.weights.append(pl_module.net[0].weight.detach().clone())

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.weights.append(pl_module.net[0].weight.detach().clone())
        self.averages.append(pl_module.teacher.network.net[0].weight.detach().clone())


@pytest.mark.parametrize("warmup", [False, True])
def test_the_average_of_the_student_equals_the_formula(warmup, trainer):
    watch = Weights()
    module = DistillationModule(Plain(), EMATeacher(decay=0.8, warmup=warmup))
    runner = trainer(watch, max_epochs=2)
    runner.fit(module, vectors())
    average = watch.weights[0].double().numpy()
    assert len(watch.averages) == 8
    for t, (weight, found) in enumerate(zip(watch.weights[1:], watch.averages, strict=True)):
        decay = min(0.8, (1 + t) / (10 + t)) if warmup else 0.8
        average = decay * average + (1 - decay) * weight.double().numpy()
        np.testing.assert_allclose(found.numpy(), average, rtol=1e-5, atol=1e-7)
    own = {id(p) for p in module.teacher.parameters()}
    assert not own & {id(p) for p in module.parameters()}
    assert set(module.state_dict()) == set(Plain().state_dict())
    assert not any(p.requires_grad for p in module.teacher.parameters())


@pytest.mark.parametrize("teacher", ["ema", "wrapped"])
def test_self_distillation_resumes_bit_identically(teacher, trainer, tmp_path):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 1 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    def module(seed):
        torch.manual_seed(seed)
        own = "ema" if teacher == "ema" else Teacher(EMATeacher(0.9))
        return DistillationModule(Plain(), own, losses={"kd": 1.0, "hint": 0.1}, student_layer="net.0")

    whole, resumed = module(0), module(1)
    trainer(ExactResume(), Save(), max_epochs=2).fit(whole, vectors())
    trainer(ExactResume(), max_epochs=2).fit(resumed, vectors(), ckpt_path=tmp_path / "mid.ckpt")
    assert torch.equal(resumed.net[0].weight, whole.net[0].weight)
    for ours, theirs in zip(resumed.teacher.parameters(), whole.teacher.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert "ema" in torch.load(tmp_path / "mid.ckpt", weights_only=True)["lightning_accel"]["distillation"]
    plain = DistillationModule(Plain(), Net())
    trainer(max_epochs=1).fit(plain, vectors())
    runner = trainer(max_epochs=1)
    runner.fit(plain, vectors())
    runner.save_checkpoint(tmp_path / "other.ckpt")
    other = DistillationModule(Plain(), "ema")
    with pytest.raises(ValueError, match=r"Argument `ckpt_path` must hold the average of an EMATeacher"):
        trainer(max_epochs=2).fit(other, vectors(), ckpt_path=tmp_path / "other.ckpt")


def test_the_average_stays_float_while_the_student_is_quantized(trainer):
    module = DistillationModule(Classifier(), EMATeacher(0.5))
    trainer(QuantizationAwareTraining("portable", start=1, calibration_batches=1), max_epochs=2).fit(module, loader())
    assert "forward" in vars(module)
    assert not any("forward" in vars(m) for m in module.teacher.modules())
    assert (module.teacher.network.net.conv1.weight - module.net.conv1.weight).abs().max() > 0


def test_an_average_without_a_fit():
    with pytest.raises(RuntimeError, match="An EMATeacher exists only in `fit`"):
        EMATeacher()(torch.zeros(1))


# --- evaluation


def test_evaluation_distills_only_if_asked_to(trainer):
    for evaluate in (False, True):
        module = DistillationModule(
            Classifier(), Residual(12), losses={"kd": 1.0, "hint": 1.0}, student_layer="net.norm1",
            teacher_layer="norm1", evaluate=evaluate,
        )  # fmt: skip
        runner = trainer(max_epochs=1)
        runner.fit(module, loader(), loader(seed=1))
        assert ("val_distillation_loss" in runner.callback_metrics) == evaluate
        assert "val_accuracy" in runner.callback_metrics
        assert ("test_distillation_loss" in runner.test(module, loader(seed=1), verbose=False)[0]) == evaluate
    x, _ = next(iter(loader(64, 64, seed=1)))
    module.eval()
    student, teacher = module(x).detach().double().numpy() / 4, module.teacher(x).double().numpy() / 4
    p, q = softmax(teacher, axis=1), softmax(student, axis=1)
    kd = 16 * (p * np.log(p / q)).sum(1).mean()
    (adapter,) = module.adapters.values()
    layers = adapter(module.net.norm1(module.net.conv1(x))), module.teacher.norm1(module.teacher.conv1(x))
    found = runner.test(module, loader(64, 64, seed=1), verbose=False)[0]["test_distillation_loss"]
    np.testing.assert_allclose(found, kd + F.mse_loss(*layers).item(), rtol=1e-4)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Teacher("resnet"), r"Argument `network` must be an nn.Module, but got a str"),
        (lambda: Teacher(Net(), precision="int8"), r"Argument `precision` must be one of \['bfloat16', .*'int8'"),
        (
            lambda: Teacher(Net(), device="gpu"),
            r"Argument `device` must be a torch device of this machine, but got 'gpu'",
        ),
        (lambda: Teacher(Net(), device="cuda:63"), r"must be a torch device of this machine, but got 'cuda:63': \w"),
        (lambda: TeacherEnsemble([]), r"Argument `teachers` must hold a teacher, but got none"),
        (
            lambda: TeacherEnsemble([Net()], [1.0, 2.0]),
            r"Argument `weights` must be above 0, one for each of 1 teachers",
        ),
        (lambda: TeacherEnsemble([Net()], [0.0]), r"Argument `weights` must be above 0"),
        (lambda: TeacherEnsemble([Net()], average="votes"), r'Argument `average` must be "logits" or "probabilities"'),
        (lambda: EMATeacher(1.0), r"Argument `decay` must be in \[0, 1\), but got 1.0"),
        (lambda: OnnxTeacher("nowhere.onnx"), r"Argument `path` must be a bundle or a model file"),
        (lambda: LossTerm("hint"), r"Argument `student_layer` must name a layer"),
    ],
)
def test_bad_arguments(make, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        make()
