"""Modules, callbacks and Trainers of `pytorch_lightning` work as those of `lightning` do: the same run gives the same bits."""

import json
import subprocess
import sys
from types import ModuleType

import lightning.pytorch as ours
import pytest
import pytorch_lightning as theirs
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader, TensorDataset

import lightning_accel as la
from lightning_accel.calls.contexts import builds_layers_late
from lightning_accel.core.packages import TrainerCallback, both, counterpart, is_users, package_of, twin
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.export.evaluate import user_metrics
from lightning_accel.export.held_out import held_out

PACKAGES = (ours, theirs)


def network_class(pl: ModuleType):
    class Net(pl.LightningModule):
        def __init__(self, width=16):
            super().__init__()
            self.save_hyperparameters()
            self.net = nn.Sequential(nn.Linear(8, width), nn.ReLU(), nn.Linear(width, 3))
            self.hooks = []

        def forward(self, x):
            return self.net(x)

        def setup(self, stage):
            self.hooks.append("setup")

        def on_fit_start(self):
            self.hooks.append("on_fit_start")

        def training_step(self, batch, batch_idx):
            x, y = batch
            loss = cross_entropy(self(x), y)
            self.log("train_loss", loss)
            return loss

        def validation_step(self, batch, batch_idx):
            x, y = batch
            self.log("val_accuracy", (self(x).argmax(1) == y).float().mean())

        def test_step(self, batch, batch_idx):
            x, y = batch
            self.log("test_loss", cross_entropy(self(x), y))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Net


def loader(shuffle=True):
    x = torch.randn(64, 8, generator=torch.Generator().manual_seed(0))
    return DataLoader(TensorDataset(x, x[:, :3].argmax(1)), 16, shuffle=shuffle)


def trainer(pl: ModuleType, *callbacks, **kwargs):
    quiet = {
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
    }
    return pl.Trainer(accelerator="cpu", callbacks=list(callbacks), **{**quiet, "max_epochs": 3, **kwargs})


def stack(pl: ModuleType, folder, **export):
    return [
        la.ChannelPruning(pruning_ratio=0.3, end=1),
        la.WeightPruning(sparsity=0.5, start=1, end=2),
        la.QuantizationAwareTraining("portable", start=2, calibration_batches=2),
        la.ExactResume(),
        pl.callbacks.EarlyStopping("val_accuracy", mode="max", patience=9),
        pl.callbacks.ModelCheckpoint(folder, "best", monitor="val_accuracy", mode="max", every_n_epochs=1),
        *([la.ModelExport(str(folder / "bundle"), engines=["onnxruntime"], samples=16)] if export else []),
    ]


def run(pl: ModuleType, folder, distilled: bool, **export):
    """Train with every callback; what is left of the run."""
    torch.manual_seed(0)
    kind = network_class(pl)
    student, teacher = kind(), kind()
    module = la.DistillationModule(student, teacher) if distilled else student
    t = trainer(pl, *stack(pl, folder, **export), enable_checkpointing=True)
    t.fit(module, loader(), loader(False))
    return kind, t, module


@pytest.mark.parametrize("distilled", [False, True])
def test_the_same_run_in_both_packages_gives_the_same_bits(tmp_path, distilled):
    runs = [run(pl, tmp_path / package_of(pl.Trainer), distilled) for pl in PACKAGES]
    (_, t1, m1), (_, t2, m2) = runs
    assert package_of(t2) == package_of(m2) == "pytorch_lightning"
    assert isinstance(m2, la.DistillationModule) == distilled
    assert m1.hooks == m2.hooks == ["setup", "on_fit_start"]
    state = m1.state_dict()
    assert state.keys() == m2.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in m2.state_dict().items())
    assert dict(t1.callback_metrics) == dict(t2.callback_metrics)
    assert t1.checkpoint_callback.best_model_score == t2.checkpoint_callback.best_model_score
    assert m2.net[0].weight.shape[0] == 11  # of 16, three tenths removed
    assert t2.callback_metrics["sparsity"].item() == pytest.approx(60 / 121)  # half of 11 * 8 + 11 * 3 weights


def test_export_resume_and_load(tmp_path):
    kind, t, module = run(theirs, tmp_path, False, export=True)
    manifest = json.loads((tmp_path / "bundle" / "manifest.json").read_text())
    assert manifest["complete"]
    x = next(iter(loader()))[0]
    with la.load_runner(tmp_path / "bundle") as runner:
        got = runner(x.numpy())
    assert torch.allclose(torch.from_numpy(got), module.eval()(x), atol=0.1)
    best = t.checkpoint_callback.best_model_path
    loaded = la.load_from_checkpoint(kind, best)
    assert torch.equal(loaded(x), la.load_from_checkpoint(kind, best)(x))
    expected = trainer(theirs).test(loaded, loader(False), verbose=False)
    with_checkpoints = trainer(theirs, *stack(theirs, tmp_path, export=True), enable_checkpointing=True)
    replayed = with_checkpoints.test(kind(), loader(False), best, verbose=False)
    assert replayed == expected
    again = kind()
    longer = trainer(theirs, *stack(theirs, tmp_path, export=True), enable_checkpointing=True, max_epochs=4)
    longer.fit(again, loader(), loader(False), ckpt_path=best)
    assert longer.global_step == 16
    assert again.net[0].weight.shape[0] == 11


def test_the_functions_take_such_a_module():
    kind = network_class(theirs)
    torch.manual_seed(0)
    module = kind()
    same = network_class(ours)()
    same.load_state_dict(module.state_dict())
    x = torch.randn(4, 8)
    quantized = [la.quantize(m.eval(), loader(), target="portable", calibration_batches=2)(x) for m in (module, same)]
    assert torch.equal(*quantized)
    assert all(found.status == "ok" for found in la.check(module, x, engines=["onnxruntime"], seconds=60))
    planned = [
        la.plan(trainer(pl, la.WeightPruning(sparsity=0.5)), network_class(pl)(), loader(), loader(False)).to_dict()
        for pl in PACKAGES
    ]
    assert planned[0] == planned[1]
    assert planned[0]["total_steps"] == 12


def test_a_datamodule_and_post_training_quantization(tmp_path):
    class Data(theirs.LightningDataModule):
        def train_dataloader(self):
            return loader()

        def val_dataloader(self):
            return loader(False)

    export = la.ModelExport(str(tmp_path / "b"), engines=["onnxruntime"], samples=16)
    t = trainer(theirs, la.PostTrainingQuantization("portable"), export, max_epochs=1)
    module = network_class(theirs)()
    t.fit(module, datamodule=Data())
    rows = json.loads((tmp_path / "b" / "report.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["network fp32", "network int8"]
    validated = trainer(theirs).validate(module, datamodule=Data(), verbose=False)
    assert user_metrics(module, held_out(t, None, None)) == validated[0]


@pytest.mark.parametrize("pl", PACKAGES)
def test_mixed_packages_are_refused_by_name(pl):
    other = ours if pl is theirs else theirs
    with pytest.raises(
        InvalidArgumentError, match=r"`model` must come from the package of the Trainer, `\w+`, but got a Net of `\w+`"
    ):
        la.plan(trainer(pl), network_class(other)(), loader())


def test_a_distilled_module_in_the_other_packages_trainer_is_refused():
    kind = network_class(theirs)
    with pytest.raises(InvalidArgumentError, match="`student` must come from the package of the Trainer, `lightning`"):
        trainer(ours).fit(la.DistillationModule(kind(), kind()), loader())


def test_importing_and_using_this_library_imports_no_pytorch_lightning():
    code = (
        "import sys, lightning_accel as la; la.QuantizationAwareTraining(); la.ModelExport(); la.DistillationModule; la.plan; la.check\n"
        "assert 'pytorch_lightning' not in sys.modules\n"
        "import pytorch_lightning as pl\n"
        "pl.Trainer(callbacks=[la.WeightPruning(sparsity=0.5)], logger=False, accelerator='cpu')"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True, timeout=120)


def test_twins_and_counterparts():
    assert both(ours.Trainer) == (ours.Trainer, theirs.Trainer)
    assert both(nn.Linear) == (nn.Linear,)
    assert twin(la.WeightPruning) is None
    assert issubclass(TrainerCallback, ours.Callback)
    assert counterpart(ours.Trainer, network_class(theirs)()) is theirs.Trainer
    assert counterpart(ours.Trainer, nn.Linear(1, 1)) is ours.Trainer


@pytest.mark.parametrize("package", ["torchgeo", "torch_users", "lightning_pose", "lightning_gpt", "torchvision"])
@pytest.mark.parametrize("pl", PACKAGES)
def test_a_package_whose_name_begins_like_a_library_is_a_users(package, pl):
    late = type(
        "Late", (pl.LightningModule,), {"__module__": f"{package}.models", "configure_model": lambda self: None}
    )
    assert is_users(late)
    assert builds_layers_late(late())
    assert not builds_layers_late(pl.LightningModule())
