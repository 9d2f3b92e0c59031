import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import Callback, GradientAccumulationScheduler, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

import lightning_accel as la
from lightning_accel import QuantizationAwareTraining, WeightPruning
from lightning_accel.cli import main as cli
from tests.core import drift
from tests.support.models import Classifier, loader


class Scheduled(Classifier):
    def __init__(self, interval="step"):
        super().__init__()
        self.interval = interval

    def configure_optimizers(self):
        optimizer = super().configure_optimizers()
        schedule: torch.optim.lr_scheduler.LRScheduler
        if self.interval == "step":
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=32)
        else:
            schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.3)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": self.interval}}


class Rates(Callback):
    """The learning rate before each step of a real run."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, *_):
        self.seen.append(trainer.optimizers[0].param_groups[0]["lr"])


def callbacks():
    return [
        la.WeightPruning(granularity="2:4", start=1, end=2),
        la.QuantizationAwareTraining("portable", start=3, exclude="net.head"),
    ]


@pytest.mark.parametrize("interval", ["step", "epoch"])
def test_phases_and_learning_rates_are_those_of_the_run(trainer, interval):
    made = la.plan(trainer(*callbacks(), max_epochs=4), Scheduled(interval), train_dataloaders=loader())
    rates = Rates()
    trainer(rates, max_epochs=4).fit(Scheduled(interval), loader())
    assert (made.steps_per_epoch, made.total_steps) == (8, 32)
    pruning, qat = made.phases
    assert (pruning.steps, pruning.epochs, qat.steps) == ((8, 16), (1.0, 2.0), (24, 24))
    assert pruning.lr == pytest.approx(rates.seen[8])
    assert qat.lr == pytest.approx(rates.seen[24])
    assert pruning.lr_share == pytest.approx(rates.seen[8] / max(rates.seen))


def test_each_layer_is_named_with_what_happens_or_why_not(trainer):
    made = la.plan(trainer(*callbacks(), max_epochs=4), Classifier(), train_dataloaders=loader())
    pruning, qat = (phase.layers for phase in made.phases)
    assert pruning["net.conv2.weight"] == "50% of its 2:4 units become zero, with 1 others together"
    assert pruning["net.conv1.weight"] == "stays dense: its input channels (3) aren't divisible by 4"
    assert qat["net.conv1"] == "portable int8"
    assert qat["(phases)"] == (
        "calibration to step 32; fake-quant from step 32; batch norm frozen from step 30, once the learning rate is a tenth of its "
        "highest; ranges final from step 31"
    )
    assert qat["net.head"] == "stays float: excluded"
    integers = 8 * 27 + 8 * 72  # the weights of two convolutions; the head is excluded
    parameters = made.sizes["today"]["parameters"]
    assert made.sizes["after QuantizationAwareTraining"] == {"bytes of weights": 4 * parameters - 3 * integers}
    assert "sparse kernels" in made.phases[0].benefit
    text = str(made)
    assert "WeightPruning: from epoch 1 (step 8) to epoch 2 (step 16), learning rate 0.05 (100% of the highest)" in text
    assert "warning: QuantizationAwareTraining starts at 100% of the highest learning rate" in text


def test_warnings_are_of_rates_that_do_not_suit_the_phase(trainer):
    """Quantization is learned at a low rate; pruning needs one at which the network still learns."""
    settings = {"max_epochs": 4}
    qat = la.QuantizationAwareTraining("portable", start=0)
    made = la.plan(trainer(qat, **settings), Scheduled("epoch"), train_dataloaders=loader())
    assert made.warnings == [
        "QuantizationAwareTraining starts at 100% of the highest learning rate; train with fake-quantization below 10%."
    ]
    late = la.QuantizationAwareTraining("portable", start=2)  # at 0.3 ** 2
    assert not la.plan(trainer(late, **settings), Scheduled("epoch"), train_dataloaders=loader()).warnings
    scaled = la.QuantizationAwareTraining("portable", start=0, lr_scale=0.05)
    assert not la.plan(trainer(scaled, **settings), Scheduled("epoch"), train_dataloaders=loader()).warnings
    early = [la.ChannelPruning(0.5, end=1), la.WeightPruning(0.5, end=2)]
    assert not la.plan(trainer(*early, **settings), Scheduled("epoch"), train_dataloaders=loader()).warnings
    last = la.WeightPruning(0.5, end=1.0)
    made = la.plan(trainer(last, **settings), Scheduled("step"), train_dataloaders=loader())
    assert made.warnings == [
        "WeightPruning ends at 0.0% of the highest learning rate; the network must recover from pruning, so the learning rate must "
        "still be high. End it earlier."
    ]


def test_channels_that_leave_and_what_is_left(trainer):
    module = Classifier()
    pruning = la.ChannelPruning(macs_reduction=2.0, start=0, end=1, round_to=2)
    made = la.plan(trainer(pruning, max_epochs=3), module, train_dataloaders=loader())
    layers = made.phases[0].layers
    assert layers["net.head"] == "channels kept: it reaches the output"
    assert layers["net.conv1"].startswith("8 channels -> about ")
    assert module.net.conv1.out_channels == 8
    assert made.sizes["today"]["MACs a sample"] == 8 * 64 * 27 + 8 * 64 * 72 + 8 * 4
    ratio = made.sizes["today"]["MACs a sample"] / made.sizes["after ChannelPruning"]["MACs a sample"]
    trainer(pruning, max_epochs=3).fit(module, loader())
    conv1, conv2 = module.net.conv1, module.net.conv2
    left = (
        conv1.out_channels * 64 * 27 + conv2.out_channels * 64 * 9 * conv2.in_channels + module.net.head.in_features * 4
    )
    assert ratio == pytest.approx(made.sizes["today"]["MACs a sample"] / left, rel=0.35)
    assert ratio >= 2
    assert (
        made.sizes["after ChannelPruning"]["bytes of weights"] == 4 * made.sizes["after ChannelPruning"]["parameters"]
    )
    assert made.sizes["after ChannelPruning"]["parameters"] < made.sizes["today"]["parameters"]


def test_a_run_that_is_over_is_not_shipped_by_its_plan(trainer, tmp_path):
    def both():
        return la.WeightPruning(0.5, end=1), la.ModelExport(tmp_path / "bundle")

    t = trainer(*both(), max_epochs=2)
    t.fit(Classifier(), loader(), loader())
    t.save_checkpoint(tmp_path / "over.ckpt")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    with pytest.raises(RuntimeError, match="must have a first training step to be planned"):
        la.plan(
            trainer(*both(), max_epochs=2),
            Classifier(),
            loader(),
            loader(),
            ckpt_path=str(tmp_path / "over.ckpt"),
        )
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_bytes_of_a_pruned_and_quantized_network_are_those_of_the_run(trainer):
    """Biases and batch norms stay float, and their share grows as channels leave."""

    def both():
        pruning = la.ChannelPruning(macs_reduction=2.0, start=0, end=1, round_to=4)
        return pruning, la.QuantizationAwareTraining("portable", start=2, calibration_batches=2)

    made = la.plan(trainer(*both(), max_epochs=3), Classifier(16), train_dataloaders=loader())
    module = Classifier(16)
    trainer(*both(), max_epochs=3).fit(module, loader())
    count = sum(p.numel() for p in module.parameters())
    integers = sum(m.weight.numel() for m in (module.net.conv1, module.net.conv2, module.net.head))
    assert count < sum(p.numel() for p in Classifier(16).parameters())
    assert made.sizes["after ChannelPruning"]["parameters"] == count
    assert made.sizes["after QuantizationAwareTraining"] == {"bytes of weights": 4 * count - 3 * integers}


@pytest.mark.filterwarnings(r"ignore:\s+By default only one JsonargparseDeprecationWarning")
@pytest.mark.filterwarnings(r"ignore:\s+``ArgumentParser.add_instantiator`` was deprecated")
@pytest.mark.filterwarnings(r"ignore:\s+``instantiate_classes`` was deprecated")
@pytest.mark.filterwarnings(r"ignore:\s+skip_none parameter was deprecated")
def test_the_command_line_plans_what_yaml_says(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lightning-accel"])
    accel = "lightning_accel"
    pruning = {
        "sparsity": {"net.conv2.*": 0.5, "net.head.*": 0.25},
        "criterion": "l2",
        "scope": "layer",
        "start": 1,
        "end": 2,
    }
    channels = {"macs_reduction": 2.0, "end": 1, "limits": {"net.conv1": 0.75}, "exclude": ["net.head"], "round_to": 2}
    config = {
        "seed_everything": 1,
        "model": {"class_path": "tests.support.models.Classifier"},
        "data": {"class_path": "tests.cli.test_lightning_cli.Data"},
        "trainer": {
            "max_epochs": 4,
            "accelerator": "cpu",
            "logger": False,
            "enable_checkpointing": False,
            "default_root_dir": str(tmp_path),
            "callbacks": [
                {"class_path": f"{accel}.ChannelPruning", "init_args": channels},
                {"class_path": f"{accel}.WeightPruning", "init_args": pruning},
                {"class_path": f"{accel}.QuantizationAwareTraining", "init_args": {"target": "portable", "start": 3}},
            ],
        },
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["plan", "-c", str(tmp_path / "run.yaml")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "32 optimizer steps, 8 an epoch" in lines
    count = 8 * 27 + 16 + 8 * 72 + 8 + 16 + 36
    macs = 64 * 8 * (27 + 72) + 32
    assert f"today: {count} parameters, {macs:,} MACs a sample, {4 * count:,} bytes of weights" in lines
    order = [line.partition(":")[0] for line in lines if ": from epoch" in line]
    assert order == ["ChannelPruning", "WeightPruning", "QuantizationAwareTraining"]
    said = {" ".join(line.split()) for line in lines}
    assert {"net.conv2.weight 50% of its weights become zero", "net.head channels kept: it is excluded"} <= said
    assert not (tmp_path / "lightning_logs").exists()
    config["trainer"]["callbacks"][0]["init_args"]["macs_reduction"] = 100.0
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    assert cli.main(["plan", "-c", str(tmp_path / "run.yaml")]) == 1
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "Argument `macs_reduction` must be reachable" in line


def test_nothing_is_trained_logged_or_written(trainer, tmp_path):
    module = Classifier()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    keep = ModelCheckpoint(tmp_path / "checkpoints", save_last=True)
    export = la.ModelExport(str(tmp_path / "bundle"), engines="onnxruntime")
    fit = trainer(
        *callbacks(), keep, export, max_epochs=4, enable_checkpointing=True, logger=CSVLogger(tmp_path / "logs")
    )
    la.plan(fit, module, train_dataloaders=loader(), val_dataloaders=loader(32))
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert "forward" not in module.__dict__
    assert not list(tmp_path.rglob("*"))
    assert isinstance(fit.logger, CSVLogger)


def test_what_fit_would_refuse_is_refused(trainer):
    with pytest.raises(ValueError, match="'neck', which matches none"):
        la.plan(trainer(la.WeightPruning(0.5, include="neck")), Classifier(), train_dataloaders=loader())


def test_a_run_without_steps(trainer):
    with pytest.raises(RuntimeError, match="must have a first training step to be planned"):
        la.plan(trainer(max_epochs=0), Classifier(), train_dataloaders=loader())


def test_a_rate_that_depends_on_a_metric_is_not_guessed(trainer):
    class Plateau(Classifier):
        def configure_optimizers(self):
            optimizer = super().configure_optimizers()
            scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "val_accuracy"}}

    made = la.plan(trainer(la.WeightPruning(0.5)), Plateau(), train_dataloaders=loader(), val_dataloaders=loader(16))
    assert (made.phases[0].lr, made.warnings) == (None, [])


def test_a_stream_s_phases_are_at_its_steps_or_epochs(trainer):
    """Its epochs have no known length: a share is a step, an epoch an epoch, and nothing is at epoch 0 that isn't."""
    shares = trainer(WeightPruning(0.5, start=0.25, end=0.5), max_epochs=-1, max_steps=40)
    planned = la.plan(shares, Classifier(), train_dataloaders=drift.stream(0))
    assert [(p.steps, p.epochs) for p in planned.phases] == [((10, 20), (None, None))]
    assert "WeightPruning: from step 10 to step 20" in str(planned)
    assert "40 optimizer steps, an unknown number of an epoch" in str(planned)
    epochs = trainer(WeightPruning(0.5, start=1, end=2), QuantizationAwareTraining("portable", start=3), max_epochs=5)
    planned = la.plan(epochs, Classifier(), train_dataloaders=drift.stream(64))
    assert [p.epochs for p in planned.phases] == [(1, 2), (3, 3)]
    assert "QuantizationAwareTraining: from epoch 3\n" in str(planned)
    assert "calibration from epoch 3, fake-quant 8 batches later" in str(planned)
    assert planned.conflicts == []


def test_the_rates_of_a_run_that_accumulates_on_a_schedule(trainer):
    """4, 8 and 16 steps: a scheduler that moves by epochs has moved once at step 4 and twice at step 12."""

    class Decaying(Classifier):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD(self.parameters(), 1.0)
            return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1)]

    accumulate = GradientAccumulationScheduler({0: 4, 1: 2, 2: 1})
    pruning = [
        WeightPruning(0.5, start=e, end=e, include=g, name=g)
        for e, g in enumerate(("net.conv1*", "net.conv2*", "net.head*"))
    ]
    planned = la.plan(trainer(accumulate, *pruning, max_epochs=3), Decaying(), train_dataloaders=loader(128))
    assert planned.total_steps == 28
    assert [p.steps for p in planned.phases] == [(0, 0), (4, 4), (12, 12)]
    assert [p.lr for p in planned.phases] == pytest.approx([1.0, 0.1, 0.01])


def test_a_plan_is_called_as_fit_is(trainer):
    class Data(L.LightningDataModule):
        def train_dataloader(self):
            return loader()

        val_dataloader = train_dataloader

    calls = [
        la.plan(trainer(la.WeightPruning(sparsity=0.5)), Classifier(), loader(), loader()),
        la.plan(trainer(la.WeightPruning(sparsity=0.5)), Classifier(), loader(), val_dataloaders=loader()),
        la.plan(
            trainer(la.WeightPruning(sparsity=0.5)), Classifier(), train_dataloaders=loader(), val_dataloaders=loader()
        ),
        la.plan(trainer(la.WeightPruning(sparsity=0.5)), Classifier(), Data()),
        la.plan(trainer(la.WeightPruning(sparsity=0.5)), Classifier(), datamodule=Data()),
    ]
    assert all(made.to_dict() == calls[0].to_dict() for made in calls)
