"""Layers by path: found, captured, adapted, trained, resumed; under pruning and quantization too."""

import copy
import subprocess
import sys
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_accel import ChannelPruning, DistillationModule, ExactResume, LossTerm, QuantizationAwareTraining
from lightning_accel.distillation.adapters import keep_channels_, make_adapter, replace_parameters_
from lightning_accel.distillation.layers.paths import expand
from lightning_accel.distillation.layers.selection import select_tensor, split_path
from lightning_accel.losses import HintLoss
from lightning_accel.teachers import EMATeacher
from tests.support.models import Classifier, Residual, loader


def distilled(width=8, teacher_width=12, seed=0, **kwargs):
    torch.manual_seed(seed)
    student, teacher = Classifier(width), Residual(teacher_width).eval()
    settings = {"losses": {"kd": 0.5, "hint": 0.5}, "student_layer": "net.norm1", "teacher_layer": "norm1", **kwargs}
    return DistillationModule(student, teacher, **settings)


class Each(L.Callback):
    """Calls a function after every batch."""

    def __init__(self, function):
        self.function = function

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.function(trainer, pl_module, batch)


# --- paths


def test_paths_and_selections():
    assert split_path("bert[hidden_states][-1]", "student_layer") == ("bert", ("hidden_states", -1))
    assert split_path("['logits']", "teacher_outputs") == ("", ("logits",))
    net = nn.ModuleDict({"body": nn.Sequential(*(nn.Sequential(nn.Linear(2, 2)) for _ in range(11)))})
    assert expand(net, "body.*", "student_layer") == [f"body.{i}" for i in range(11)]
    assert expand(net, ["body.1?.0[0]", "body.2"], "student_layer") == ["body.10.0[0]", "body.2"]
    assert expand(net, "[0]", "student_layer") == ["[0]"]
    tensor = torch.zeros(1)
    assert select_tensor({"a": (tensor, 3)}, ("a", 0), "[a][0]", "outputs") is tensor
    assert select_tensor((tensor,), (), "x", "outputs") is tensor


def test_a_path_that_leads_nowhere_lists_what_is_near(trainer):
    module = distilled(student_layer="net.nrm1")
    with pytest.raises(ValueError, match=r"of a layer of Classifier, but got 'net.nrm1'\. Near it: net.norm1") as error:
        trainer(max_epochs=1).fit(module, loader())
    assert "net.norm2" in str(error.value)
    with pytest.raises(ValueError, match=r"`teacher_layer` must be the path of a layer of Residual, but got 'x.y'"):
        trainer(max_epochs=1).fit(distilled(teacher_layer="x.y"), loader())
    with pytest.raises(ValueError, match=r"`teacher_layer` must lead to as many layers .* got 1 \(norm1\) for 2"):
        trainer(max_epochs=1).fit(distilled(student_layer="net.norm?"), loader())


# --- in a fit


def test_the_loss_equals_the_formula_and_the_adapter_learns(trainer):
    module = distilled(losses="hint", alpha=1.0)
    logged, adapters, features = [], [], []

    def note(runner, pl_module, batch):
        logged.append(float(runner.callback_metrics["distillation_loss"]))

    before = copy.deepcopy(module.student)
    runner = trainer(Each(note), max_epochs=1)

    class Keep(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            (adapter,) = pl_module.adapters.values()
            if batch_idx == 0:
                adapters.append(copy.deepcopy(adapter))
                features.append(batch[0])

    runner.callbacks.append(Keep())
    runner.fit(module, loader())
    x, adapter, before = features[0], adapters[0], before.train()
    student = before.net.norm1(before.net.conv1(x))
    teacher = module.teacher.norm1(module.teacher.conv1(x))
    weight, bias = adapter.weight[:, :, 0, 0].detach().numpy(), adapter.bias.detach().numpy()
    adapted = np.einsum("oc,nchw->nohw", weight, student.detach().numpy()) + bias[:, None, None]
    np.testing.assert_allclose(logged[0], ((adapted - teacher.numpy()) ** 2).mean(), rtol=1e-5)
    (after,) = module.adapters.values()
    assert not torch.equal(after.weight, adapter.weight)
    assert logged[-1] < logged[0]


def test_nothing_of_it_is_in_the_student(trainer, tmp_path):
    module = distilled()
    keys = set(module.state_dict())
    attributes = set(vars(module.net))
    runner = trainer(max_epochs=1)
    runner.fit(module, loader())
    assert len(module.adapters) == 1
    assert set(module.state_dict()) == keys
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in [*module.modules(), *module.teacher.modules()])
    assert set(vars(module.net)) == attributes
    own = {id(p) for adapter in module.adapters.values() for p in adapter.parameters()}
    assert not own & {id(p) for p in module.parameters()}
    assert own <= {id(p) for p in runner.optimizers[0].param_groups[0]["params"]}
    runner.save_checkpoint(tmp_path / "a.ckpt")
    checkpoint = torch.load(tmp_path / "a.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == keys
    assert list(checkpoint["lightning_accel"]["distillation"]["adapters"]) == ["hint:net.norm1:norm1"]
    assert torch.equal(Classifier.load_from_checkpoint(tmp_path / "a.ckpt").net.head.weight, module.net.head.weight)
    program = torch.export.export(module.net.eval(), (torch.zeros(2, 3, 8, 8),))
    assert set(program.state_dict) == {key.removeprefix("net.") for key in keys}


def test_same_channels_need_no_adapter_and_random_numbers_stay(trainer):
    same = distilled(teacher_width=8)
    trainer(max_epochs=1).fit(same, loader())
    assert same.adapters == {}
    plain, hinted = Classifier(dropout=0.5), Classifier(dropout=0.5)
    hinted.load_state_dict(plain.state_dict())
    for module, losses in ((plain, "kd"), (hinted, {"kd": 1.0, "hint": 0.0})):
        layers = {} if losses == "kd" else {"student_layer": "net.norm1", "teacher_layer": "norm1"}
        torch.manual_seed(3)
        teacher = Residual(12)
        torch.manual_seed(3)
        data = loader(shuffle=True)
        trainer(max_epochs=1).fit(DistillationModule(module, teacher, losses=losses, **layers), data)
    assert torch.equal(plain.net.conv1.weight, hinted.net.conv1.weight)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resume_is_bit_identical_in_the_middle_of_an_epoch(trainer, tmp_path, accumulate):
    class Save(L.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 2 and trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "mid.ckpt")

    settings = {"max_epochs": 2, "accumulate_grad_batches": accumulate}
    whole = distilled()
    trainer(ExactResume(), Save(), **settings).fit(whole, loader(shuffle=True))
    resumed = distilled(seed=1)
    resumed.teacher.load_state_dict(whole.teacher.state_dict())
    trainer(ExactResume(), **settings).fit(resumed, loader(shuffle=True), ckpt_path=tmp_path / "mid.ckpt")
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    (ours,), (theirs,) = resumed.adapters.values(), whole.adapters.values()
    assert torch.equal(ours.weight, theirs.weight)
    with pytest.raises(ValueError, match=r"must be resumed with the losses .* adapters none for a checkpoint with"):
        trainer(**settings).fit(
            DistillationModule(Classifier(), Residual(12)), loader(), ckpt_path=tmp_path / "mid.ckpt"
        )


def test_schedulers_clipping_and_device_moves_include_the_adapter(trainer):
    class Scheduled(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            return [optimizer], [torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.1)]

    torch.manual_seed(0)
    module = DistillationModule(
        Scheduled(), Residual(12), losses="hint", student_layer="net.norm1", teacher_layer="norm1"
    )
    norms = []

    def note(trainer, pl_module, batch):
        gradients = [
            p.grad for group in trainer.optimizers[0].param_groups for p in group["params"] if p.grad is not None
        ]
        norms.append(float(torch.stack([g.norm() for g in gradients]).norm()))

    runner = trainer(Each(note), max_epochs=2, gradient_clip_val=0.01)
    runner.fit(module, loader())
    assert max(norms) <= 0.01 * (1 + 1e-3)
    assert runner.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.05 * 0.01)
    module.to("meta")
    assert {p.device.type for a in module.adapters.values() for p in a.parameters()} == {"meta"}


def test_globs_and_lists_average_their_pairs(trainer):
    torch.manual_seed(0)
    batch = next(iter(loader()))
    module = DistillationModule(
        Classifier(), Residual(8), losses=LossTerm(HintLoss(), 1.0, ["net.norm1", "net.norm2"], "norm?"), alpha=1.0
    )
    module.log = lambda *args: None
    total = module.training_step(batch, 0)
    parts = []
    for layer in ("norm1", "norm2"):
        module = DistillationModule(
            module.student, module.teacher, losses=LossTerm("hint", 1.0, f"net.{layer}", layer), alpha=1.0
        )
        module.log = lambda *args: None
        parts.append(module.training_step(batch, 0))
    torch.testing.assert_close(total, sum(parts) / 2)


class Branches(nn.Module):
    """A layer that returns a tuple, one that returns a dict."""

    def __init__(self, width):
        super().__init__()
        self.pair, self.head = Pair(width), nn.Linear(width, 3)

    def forward(self, x):
        hidden, extra = self.pair(x)
        return {"logits": self.head(hidden), "hidden_states": (x, hidden, extra["deep"])}


class Pair(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.linear = nn.Linear(4, width)

    def forward(self, x):
        return self.linear(x), {"deep": self.linear(x) * 2}


@pytest.mark.parametrize("path", ["pair[0]", "pair[1][deep]", "[hidden_states][1]", "[hidden_states][-1]"])
def test_tuples_and_dicts(path, trainer):
    module = DistillationModule(
        Branches(5),
        Branches(6),
        losses=["kd", LossTerm("hint", 1.0, path)],
        task_loss=F.cross_entropy,
        optimizer=torch.optim.Adam,
    )
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    trainer(max_epochs=1).fit(module, DataLoader(data, batch_size=4))
    (adapter,) = module.adapters.values()
    assert adapter.weight.shape == (6, 5)


def test_hugging_face_hidden_states(trainer):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")

    def bert(layers, width):
        config = transformers.BertConfig(
            vocab_size=11,
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=8,
            num_labels=3,
            output_hidden_states=True,
            attn_implementation="eager",
            output_attentions=True,
        )
        return transformers.BertForSequenceClassification(config)

    class Bert(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = bert(1, 4)

        def forward(self, input_ids, attention_mask):
            return self.net(input_ids=input_ids, attention_mask=attention_mask)

        def training_step(self, batch, batch_idx):
            return F.cross_entropy(self(batch["input_ids"], batch["attention_mask"]).logits, batch["labels"])

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), 0.1)

    torch.manual_seed(0)
    terms = [
        LossTerm("kd"),
        LossTerm("hidden", 1.0, "[hidden_states][-1]"),
        LossTerm("cosine", 1.0, "net.bert.encoder.layer.0", "bert.encoder.layer.1", name="direction"),
        LossTerm("attention", 1.0, "[attentions][0]", "[attentions][1]"),
        LossTerm("minilm", 1.0, "net.bert.*.layer.0.attention.self.query", "bert.*.layer.1.attention.self.query"),
    ]
    terms[-1].loss.heads = 2
    module = DistillationModule(Bert(), bert(2, 6), losses=terms)
    data = [
        {
            "input_ids": torch.randint(0, 11, (4, 6)),
            "attention_mask": torch.ones(4, 6).long(),
            "labels": torch.tensor([0, 1, 2, 0]),
        }
    ]
    runner = trainer(max_epochs=1)
    runner.fit(module, DataLoader(data, batch_size=None))
    names = {"kd", "hidden", "direction", "attention", "minilm"}
    assert {f"distillation_loss/{name}" for name in names} <= set(runner.callback_metrics)
    assert {a.weight.shape for a in module.adapters.values()} == {(6, 4)}
    assert len(module.adapters) == 2


# --- refused


class Inplace(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.relu, self.twice = nn.Linear(4, 3), nn.ReLU(inplace=True), nn.Linear(3, 3)
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.twice(self.twice(self.relu(self.linear(x))))


@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("linear", "overwritten in place by a later layer"),
        ("twice", "'twice' was called 2 times"),
        ("unused", "'unused' was called not at all"),
    ],
)
def test_layers_that_say_nothing_clear(layer, message, trainer):
    module = DistillationModule(
        Inplace(), Inplace(), losses="hint", student_layer=layer, task_loss=F.cross_entropy, optimizer=torch.optim.Adam
    )
    data = TensorDataset(torch.randn(8, 4), torch.randint(0, 3, (8,)))
    with pytest.raises(RuntimeError, match=message):
        trainer(max_epochs=1).fit(module, DataLoader(data, batch_size=4))


def test_shapes_that_can_not_be_aligned(trainer):
    with pytest.raises(ValueError, match=r"shapes that can be aligned, but got \(3, 8, 8, 8\) and \(3, 4\)"):
        trainer(max_epochs=1).fit(distilled(teacher_layer="head"), loader())
    with pytest.raises(ValueError, match=r"Argument `channels` must lie in \[0, 3\), but got \[3\]"):
        keep_channels_(make_adapter(torch.zeros(1, 3), torch.zeros(1, 5)), [3])


# --- while the student changes


def test_an_adapter_follows_lost_channels():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 6, 4, 4), torch.randn(2, 5, 4, 4)
    adapter = make_adapter(student, teacher)
    optimizer = torch.optim.SGD(adapter.parameters(), 0.1, momentum=0.9)
    adapter(student).sum().backward()
    optimizer.step()
    momentum = optimizer.state[adapter.weight]["momentum_buffer"]
    kept, weight = [0, 2, 3, 5], adapter.weight
    student[:, [1, 4]] = 0
    before = adapter(student)
    keep_channels_(adapter, kept, [optimizer])
    torch.testing.assert_close(adapter(student[:, kept]), before)
    assert adapter.weight is weight
    assert torch.equal(optimizer.state[weight]["momentum_buffer"], momentum[:, kept])
    adapter(student[:, kept]).sum().backward()
    optimizer.step()

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 0.1)
    old, new = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    replace_parameters_(optimizer, [], [old])
    optimizer.state[old]["momentum_buffer"] = torch.ones(2)
    replace_parameters_(optimizer, [old], [new])
    assert [p.shape for p in optimizer.param_groups[0]["params"]] == [(1,), (3,)]
    assert not optimizer.state


@pytest.mark.parametrize("told", [True, False])
def test_a_student_that_loses_channels_is_distilled_all_the_while(told, trainer):
    """``ChannelPruning`` removes them; where the module isn't told which, its adapter is made anew."""
    shapes, optimized, before, after = [], [], [], []

    class Watch(L.Callback):
        def on_train_epoch_start(self, trainer, pl_module):
            (adapter,) = pl_module.adapters.values()
            (before if self.first else after).append(
                (adapter.weight.detach().clone(), pl_module.net.conv1.weight.detach().clone())
            )

        def __init__(self, first):
            self.first = first

    def note(trainer, pl_module, batch):
        (adapter,) = pl_module.adapters.values()
        shapes.append(tuple(adapter.weight.shape[:2]))
        optimized.append(sum(p is adapter.weight for p in trainer.optimizers[0].param_groups[0]["params"]))
        assert adapter.weight.grad.abs().sum() > 0

    module = distilled()
    if not told:
        module.structure_changed = lambda change: None
    pruning = ChannelPruning(pruning_ratio=0.25, start=1, end=1)
    callbacks = [Watch(True), pruning, Watch(False), Each(note)]
    trainer(*callbacks, max_epochs=2).fit(module, loader())
    kept = module.net.conv1.out_channels
    assert kept < 8
    assert shapes == [(12, 8)] * 8 + [(12, kept)] * 8
    assert set(optimized) == {1}
    (weight, conv), (sliced, remaining) = before[1], after[1]
    index = [next(i for i, row in enumerate(conv) if torch.equal(row, other)) for other in remaining]
    if told:
        assert torch.equal(sliced, weight[:, index])
    else:
        assert torch.equal(sliced, weight)  # until the next step


def test_an_average_of_the_student_loses_its_channels(trainer):
    averages = []

    class Watch(L.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            averages.append(pl_module.teacher.network.net.conv1.weight.detach().clone())

    module = DistillationModule(Classifier(), EMATeacher(0.9, warmup=False))
    trainer(ChannelPruning(pruning_ratio=0.25, start=1, end=1), Watch(), max_epochs=2).fit(module, loader())
    assert module.net.conv1.out_channels < 8
    assert averages[8].shape == module.net.conv1.weight.shape
    assert not torch.equal(averages[8], module.net.conv1.weight)
    assert module.teacher.network.net.conv1.weight.shape == module.net.conv1.weight.shape


@pytest.mark.parametrize("layer", ["net.norm1", "net.conv2", "net.head"])
def test_features_of_a_quantized_student_are_those_of_its_layers(layer, trainer, tmp_path):
    teacher_layer = layer.removeprefix("net.")
    module = distilled(student_layer=layer, teacher_layer=teacher_layer, alpha=0.5)
    seen = []

    def note(trainer, pl_module, batch):
        seen.append((float(trainer.callback_metrics["distillation_loss/hint"]), "forward" in vars(pl_module)))

    qat = QuantizationAwareTraining("portable", start=1, calibration_batches=2)
    runner = trainer(qat, Each(note), max_epochs=2)
    runner.fit(module, loader())
    assert [captured for _, captured in seen] == [False] * 8 + [True] * 8
    losses = [loss for loss, _ in seen]
    assert all(np.isfinite(losses))
    assert losses[8] < 1.5 * max(losses[6:8])  # goes on where it was


def test_before_fake_quant_is_active_the_features_are_those_of_the_float_network(trainer):
    module = distilled(alpha=0.5)
    qat = QuantizationAwareTraining("portable", start=0, calibration_batches=100)
    values = {}
    for name, callbacks in (("float", []), ("captured", [qat])):
        logged: list[float] = []

        def note(trainer, pl_module, batch, logged=logged):
            logged.append(float(trainer.callback_metrics["distillation_loss/hint"]))

        other = distilled(alpha=0.5)
        other.load_state_dict(module.state_dict())
        trainer(*callbacks, Each(note), max_epochs=1).fit(other, loader())
        values[name] = logged
    assert values["captured"] == values["float"]


# --- two processes

SCRIPT = """
import sys; sys.path.insert(0, sys.argv[1])
from pathlib import Path
import torch, lightning as L, lightning_accel as la
from tests.support.models import Classifier, Residual, loader

torch.set_num_threads(1)
torch.manual_seed(0)
student, teacher = Classifier(), Residual(12)
module = la.DistillationModule(student, teacher, losses={"kd": 0.5, "hint": 0.5}, student_layer="net.norm1", teacher_layer="norm1")
devices = int(sys.argv[3])

class Other(L.Callback):
    def setup(self, trainer, pl_module, stage):
        torch.manual_seed(trainer.global_rank)  # ranks may draw different adapters

class Eval(L.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        pl_module.eval()  # batch statistics are each rank's own

trainer = L.Trainer(
    max_epochs=1, accelerator="cpu", devices=devices, strategy="ddp" if devices > 1 else "auto", logger=False,
    enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, default_root_dir=sys.argv[2],
    callbacks=[Other(), Eval()], use_distributed_sampler=False,
)
data = whole = loader(32, 8)
if devices > 1:
    from torch.utils.data import DataLoader, BatchSampler
    class Half(L.LightningDataModule):
        def train_dataloader(self):
            r = self.trainer.global_rank
            return DataLoader(whole.dataset, batch_sampler=[list(range(8 * i + 4 * r, 8 * i + 4 * r + 4)) for i in range(4)])
    data = Half()
trainer.fit(module, data)
(adapter,) = module.adapters.values()
torch.save({"adapter": adapter.state_dict(), "student": module.state_dict()}, Path(sys.argv[2]) / f"{devices}_{trainer.global_rank}.pt")
"""


@pytest.mark.timeout(240)
def test_two_ranks_train_the_adapter_as_one_process_does(tmp_path):
    (tmp_path / "run.py").write_text(SCRIPT)
    for devices in ("1", "2"):
        command = [sys.executable, str(tmp_path / "run.py"), str(Path(__file__).parents[3]), str(tmp_path), devices]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt", weights_only=True) for name in ("1_0", "2_0", "2_1"))
    for part in ("adapter", "student"):
        for key, value in one[part].items():
            assert torch.equal(first[part][key], second[part][key]), key
            torch.testing.assert_close(first[part][key], value, rtol=1e-4, atol=1e-6)
