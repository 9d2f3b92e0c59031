import sys
from pathlib import Path

import pytest
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.loggers.logger import DummyLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lightning_accel as la
from lightning_accel.core.layer_plot import draw_layers, log_layers
from tests.support.models import Classifier, loader


def test_a_bar_for_each_layer():
    figure = draw_layers({"a": 0.25, "b": 1.0}, "share of zeros")
    axes = figure.axes[0]
    assert [bar.get_width() for bar in axes.patches] == [1.0, 1.0, 0.25, 1.0]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["a", "b"]
    assert [text.get_text() for text in axes.texts] == ["25%", "100%"]
    assert axes.get_title() == "share of zeros"


def test_a_run_shows_what_left_each_layer(trainer, tmp_path):
    logger = TensorBoardLogger(tmp_path)
    callbacks = [la.ChannelPruning(0.25, start=0, end=1), la.WeightPruning(0.5, start=1, end=2)]
    trainer(*callbacks, logger=logger, max_epochs=3).fit(Classifier(), loader())
    events = EventAccumulator(logger.log_dir).Reload()
    assert set(events.Tags()["images"]) == {"layers/channels", "layers/weights"}
    assert {"macs", "parameters", "sparsity", "sparsity/net.conv1.weight"} <= set(events.Tags()["scalars"])


def test_tables_have_a_picture_beside_them(trainer, tmp_path):
    logger = CSVLogger(tmp_path, flush_logs_every_n_steps=1)
    callbacks = [la.ChannelPruning(0.25, start=0, end=1), la.WeightPruning(0.5, start=1, end=2)]
    trainer(*callbacks, logger=logger, max_epochs=3, log_every_n_steps=1).fit(Classifier(), loader())
    folder = Path(logger.log_dir)
    assert {file.name for file in folder.glob("*.png")} == {"layers_channels.png", "layers_weights.png"}
    columns = set((folder / "metrics.csv").read_text().splitlines()[0].split(","))
    layers = {f"sparsity/net.{layer}.weight" for layer in ("conv1", "conv2", "head")}
    assert {"macs", "parameters", "sparsity", *layers} <= columns


def test_other_loggers_have_the_scalars_alone(caplog):
    with caplog.at_level("INFO"):
        log_layers([DummyLogger()], "layers", {"a": 0.5}, "share", 1)
    assert "No picture of `layers` is logged to DummyLogger: it has the scalars alone." in caplog.text


def test_without_matplotlib_it_is_said(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with caplog.at_level("INFO"):
        log_layers([TensorBoardLogger(tmp_path)], "layers/x", {"a": 0.5}, "share", 1)
    assert (
        'No picture of `layers/x` is logged: matplotlib isn\'t installed (pip install "lightning-accel[report]")'
        in caplog.text
    )


def test_shares_without_layers_are_not_drawn(tmp_path):
    logger = TensorBoardLogger(tmp_path)
    log_layers([logger], "layers", {}, "share", 1)
    assert not list(tmp_path.rglob("events*"))


@pytest.mark.parametrize("name", ["macs", "parameters"])
def test_logged_sizes_are_counted(trainer, name):
    module = Classifier()
    fit = trainer(la.ChannelPruning(0.25, start=0, end=0), max_epochs=1)
    fit.fit(module, loader())
    conv1, conv2, head = module.net.conv1, module.net.conv2, module.net.head
    wanted = {
        "parameters": sum(p.numel() for p in module.parameters()),
        "macs": 64 * 9 * (3 * conv1.out_channels + conv2.in_channels * conv2.out_channels) + head.in_features * 4,
    }
    assert float(fit.logged_metrics[name]) == wanted[name]
