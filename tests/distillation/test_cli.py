"""From YAML through a real LightningCLI, and loaded where this library does not exist."""

import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.cli import LightningCLI, _InstantiatorFn

from lightning_accel import DistillationModule, SoftTargetLoss
from lightning_accel.distillation.hparams import nested_instantiator
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
                "losses": {"class_path": "lightning_accel.SoftTargetLoss", "init_args": {"temperature": 2.0}},
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
