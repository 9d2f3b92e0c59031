"""Budgets that choose the recipe, on real (tiny) runs."""

import json
import signal
from pathlib import Path

import lightning as L
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.cli.main import main
from lightning_accel.engines.manifest import read_manifest
from tests.cli.test_lightning_cli import Data, _process, pytestmark  # noqa: F401 - the fixture and marks serve here too
from tests.support.forked import run_module
from tests.support.models import Classifier, images

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
CONFIG = """
model: {class_path: tests.support.models.Classifier, init_args: {width: 32, lr: 0.02}}
data: {class_path: tests.cli.test_lightning_cli.Data, init_args: {train: 256, held_out: 128}}
trainer: {max_epochs: 2, accelerator: cpu, logger: false, enable_progress_bar: false, enable_model_summary: false}
"""


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    trainer = L.Trainer(max_epochs=3, enable_checkpointing=False, default_root_dir=folder, limit_val_batches=0, **QUIET)
    module = Classifier(width=32, lr=0.02)
    trainer.fit(module, Data(train=256))
    trainer.save_checkpoint(folder / "trained.ckpt")
    return folder / "trained.ckpt"


def module_of(path):
    return la.load_from_checkpoint(Classifier, path)


def sizes(found):
    return {r.recipe.stage: r.candidates[0].file_bytes for r in found.results if r.candidates}


def test_the_command_finds_quantization_and_its_config_gives_the_same_bundle(trained, tmp_path, capfd):
    (tmp_path / "config.yaml").write_text(CONFIG)
    command = [
        "compress",
        "-c",
        "config.yaml",
        "--ckpt-path",
        str(trained),
        "--engine",
        "onnxruntime",
        "--dirpath",
        "found",
    ]
    command += ["--max-drop", "2", "--max-bytes", "16000"]
    assert main(command) == 0
    report = json.loads(Path("found/report.json").read_text())
    assert report["fits"]
    assert report["best"]["recipe"]["stage"] == "ptq"
    first, second = report["results"]
    assert first["candidates"][0]["file_bytes"] > 16000 >= second["candidates"][0]["file_bytes"]
    assert second["candidates"][0]["file_bytes"] == Path("found/bundle/model.onnx").stat().st_size
    assert read_manifest("found/bundle")["default"]["file"] == "model.onnx"
    assert "Fits: int8 without training" in capfd.readouterr().out
    text = Path("found/recipe.yaml").read_text()
    assert main(text.splitlines()[0].removeprefix("# lightning-accel ").split()) == 0
    assert Path("found/reproduced/model.onnx").read_bytes() == Path("found/bundle/model.onnx").read_bytes()

    before = Path("found/search.json").read_bytes()  # the same call again measures nothing
    assert main(command) == 0
    assert Path("found/search.json").read_bytes() == before
    command[command.index("16000")] = "20"  # and other budgets use what is there
    assert main(command) == 1
    assert "Argument `max_bytes` must be reachable, but got 20" in capfd.readouterr().err
    assert [json.loads(before)["results"][i]["seconds"] for i in (0, 1)] == [
        r["seconds"] for r in json.loads(Path("found/search.json").read_text())["results"]
    ]


RUN = """
import os, signal, sys, warnings
warnings.simplefilter("ignore")
import lightning as L, torch
import lightning_accel as la
from tests.cli.test_lightning_cli import Data
from tests.planning.compression.test_compress import QUIET, Scheduled

torch.set_num_threads(1)
folder, kill = sys.argv[1:]

class Killed(L.Callback):
    def on_train_batch_end(self, trainer, module, *args):
        if kill != "never" and trainer.global_step == int(kill):
            os.kill(os.getpid(), signal.SIGKILL)

L.seed_everything(1, verbose=False)
module = la.load_from_checkpoint(Scheduled, os.environ["TRAINED"])
found = la.compress(
    module, Data(train=64, held_out=64), la.Budgets(max_drop=100, max_bytes=16000),
    trainer={"max_epochs": 7, "callbacks": [Killed()], **QUIET}, dirpath=folder,
    engines=["onnxruntime"], stages=["float", "qat"], threads=1,
)
print(found.best[0].recipe.name, found.fits)
"""


class Scheduled(Classifier):
    """With an optimizer and a scheduler of the user's own."""

    def configure_optimizers(self):
        groups = [
            {"params": self.net.head.parameters(), "lr": 0.01},
            {"params": [*self.net.conv1.parameters(), *self.net.conv2.parameters()]},
        ]
        optimizer = torch.optim.AdamW(groups, lr=0.005)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_accuracy"}}


def test_a_killed_search_goes_on_bit_for_bit(trained, tmp_path):
    (tmp_path / "run.py").write_text(RUN)

    def run(folder, kill):
        return run_module("run", folder, kill, cwd=tmp_path, TRAINED=str(trained))

    assert "int8 trained, distilled, 3 epochs, for onnxruntime True" in (whole := run("whole", "never")).stdout, (
        whole.stderr
    )
    assert run("parts", "13").returncode == -signal.SIGKILL  # in the second of three epochs
    assert not list(tmp_path.glob("parts/bundle"))
    rest = run("parts", "never")
    assert "int8 trained, distilled, 3 epochs, for onnxruntime True" in rest.stdout, rest.stderr
    assert "float engines" not in rest.stderr  # measured before the kill
    assert (tmp_path / "parts/bundle/model.onnx").read_bytes() == (tmp_path / "whole/bundle/model.onnx").read_bytes()


def test_channels_leave_where_integers_are_not_enough(trained, tmp_path):
    limits = la.Budgets(max_drop=100, max_bytes=11000)
    trainer = {"max_epochs": 2, **QUIET}
    options = {
        "trainer": trainer,
        "dirpath": tmp_path / "found",
        "engines": ["onnxruntime"],
        "stages": ["float", "ptq", "all"],
    }
    module, data = module_of(trained), Data(train=64, held_out=64)
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    found = la.compress(module, data, limits, **options)
    assert found.fits
    assert found.best[0].recipe.stage == "all"
    assert found.best[1].file_bytes == (tmp_path / "found/bundle/model.onnx").stat().st_size <= 11000
    ruled = [r.reason for r in found.results if r.status == "ruled out"]
    assert len(ruled) == 3
    assert all("its speed and size are those of `int8 without training, effort low" in reason for reason in ruled)
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.state_dict().items())
    assert not list((tmp_path / "found").glob("*.tmp"))
    assert "channels for 1/" in (tmp_path / "found/report.md").read_text()


class Curve(L.LightningModule):
    """Regression with a metric of the user's own, of which less is better."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1))

    def forward(self, x):
        return self.net(x)

    def training_step(self, batch, batch_idx):
        x, y = batch
        return nn.functional.mse_loss(self(x), y)

    def validation_step(self, batch, batch_idx):
        x, y = batch
        self.log("val_mae", (self(x) - y).abs().mean())

    def configure_optimizers(self):
        return torch.optim.Adam(self.parameters(), 0.01)


def test_a_metric_of_the_users_own_counts_and_nothing_that_fits_is_told(tmp_path):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 4, generator=generator)
    data = TensorDataset(x, x.square().sum(1, keepdim=True))
    loaders = DataLoader(data, 32, shuffle=True), DataLoader(data, 32)
    module = Curve()
    L.Trainer(max_epochs=20, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET).fit(module, loaders[0])
    options = {"trainer": {"max_epochs": 2, **QUIET}, "engines": ["onnxruntime"], "stages": ["float", "ptq"]}
    found = la.compress(
        module, loaders, la.Budgets(0, max_bytes=12000), dirpath=tmp_path / "found", monitor="val_mae", **options
    )
    mae = L.Trainer(**QUIET, enable_checkpointing=False).validate(module, loaders[1], verbose=False)[0]["val_mae"]
    assert found.score == ("val_mae", pytest.approx(mae, rel=1e-5))
    best = found.results[1].candidates[0]
    with la.load_runner(tmp_path / "found/stages" / found.results[1].recipe.key / "bundle", "onnxruntime") as runner:
        after = float((torch.from_numpy(runner(x.numpy())) - data.tensors[1]).abs().mean())
    assert best.drop == pytest.approx(100 * (after - mae) / mae, rel=1e-3)  # percent
    assert best.drop > 0
    assert not found.fits
    assert "Nothing fits" in str(found)
    assert len(found.front) >= 1
    with pytest.raises(la.LightningAccelError, match="Argument `monitor` must be a metric that `validation_step` logs"):
        la.compress(
            module, loaders, la.Budgets(1, max_bytes=12000), dirpath=tmp_path / "other", monitor="val_f1", **options
        )


def test_a_training_that_takes_too_long_is_not_begun_or_stopped(trained, tmp_path):
    options = {"engines": ["onnxruntime"], "stages": ["float", "channels"], "dirpath": tmp_path / "found"}
    long = {"max_epochs": 1_000_000, **QUIET}  # hours on any machine, and minutes are enough for what comes before
    found = la.compress(
        module_of(trained),
        Data(train=256),
        la.Budgets(100, max_bytes=30000),
        trainer=long,
        max_time="00:00:10:00",
        **options,
    )
    assert not found.fits
    assert found.results[-1].status == "out of time"
    assert "its first steps show a training of" in found.results[-1].reason
    assert found.ended == "there was not enough time for every recipe"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"budgets": la.Budgets(1)}, "`budgets` must limit `max_latency_ms` or `max_bytes`"),
        ({"trainer": {"max_steps": 5}}, "`trainer` must have `max_epochs`"),
        (
            {"trainer": {"max_epochs": 1, "callbacks": [la.ModelExport("b", batch="fixed")]}},
            "whose batch is the first dimension",
        ),
        ({"trainer": {"epochs": 5}}, "`trainer` must hold arguments of the Trainer"),
        ({"data": [1]}, "`data` must be a LightningDataModule or a pair"),
        ({"engines": ["tensorrt"]}, "`engines` must hold some of"),
        ({"stages": ["qat"]}, '`stages` must hold "float"'),
        ({"stages": ["float", "magic"]}, "`stages` must hold some of"),
        ({"max_time": "soon"}, "`max_time` must be a time as the Trainer takes it"),
    ],
)
def test_arguments_are_checked_before_anything_is_written(tmp_path, change, message):
    given = {
        "module": Classifier(),
        "data": Data(),
        "budgets": la.Budgets(1, 2.0),
        "trainer": {"max_epochs": 1, **QUIET},
    }
    with pytest.raises(la.LightningAccelError, match=message):
        la.compress(**{**given, "dirpath": tmp_path / "found", **change})
    assert not (tmp_path / "found").exists()


def test_networks_that_cannot_be_compressed_are_refused(tmp_path):
    data, limits = Data(), la.Budgets(1, 2.0)
    small = la.quantize(Classifier(), [images(16).tensors[0]])
    options = {"trainer": {"max_epochs": 1, **QUIET}, "dirpath": tmp_path / "found"}
    with pytest.raises(la.LightningAccelError, match="`module` must be a float network"):
        la.compress(small, data, limits, **options)
    with pytest.raises(la.LightningAccelError, match="must be the trained network itself"):
        la.compress(la.DistillationModule(Classifier(), Classifier()), data, limits, **options)
    used = L.Trainer(max_epochs=1, enable_checkpointing=False, default_root_dir=tmp_path, **QUIET)
    used.fit(Classifier(), data)
    with pytest.raises(la.LightningAccelError, match="`trainer` must not have run yet"):
        la.compress(Classifier(), data, limits, **{**options, "trainer": used})
