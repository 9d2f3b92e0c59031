"""The config that a recipe becomes."""

import yaml

from lightning_accel import Budgets
from lightning_accel.planning.compression.config import config_of, config_text, recipe_config
from lightning_accel.planning.compression.recipe import Recipe, made
from tests.cli.test_lightning_cli import Data
from tests.support.models import Classifier

ALL = Recipe("all", ("openvino",), "openvino", reduction=2.0, epochs=9, distilled=True, seed=3)


def test_saved_arguments_are_known_and_others_are_named():
    class Local(Classifier):
        pass

    sections, missing = config_of(Classifier(width=16), Data(), {"max_epochs": 3, "accelerator": "cpu"})
    assert missing == ["data"]  # it saves none, and takes some
    assert sections["model"]["class_path"] == "tests.support.models.Classifier"
    assert sections["model"]["init_args"] == {"width": 16, "lr": 0.05, "dropout": 0.0}
    assert sections["trainer"] == {"max_epochs": 3, "accelerator": "cpu"}
    assert config_of(Local(), Data(), None)[1] == ["model", "data", "trainer"]
    assert config_of(Classifier(), Data(), {"logger": object()})[1] == ["data", "trainer"]


def test_the_callbacks_of_the_config_are_those_of_the_run():
    user = [
        {"class_path": "lightning_accel.ModelExport"},
        {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"},
    ]
    sections = {
        "model": {"class_path": "m.Net"},
        "data": {"class_path": "m.Data"},
        "trainer": {"max_epochs": 5, "callbacks": user},
    }
    config = recipe_config(
        ALL, sections, "net.ckpt", "out", {"module": "net", "inputs": len}, Budgets(0.5, 2.0, batch=4)
    )
    names = [section["class_path"].rpartition(".")[2] for section in config["trainer"]["callbacks"]]
    assert names == [
        "InitialWeights",
        "ChannelPruning",
        "QuantizationAwareTraining",
        "LearningRateMonitor",
        "ModelExport",
    ]
    assert config["trainer"]["max_epochs"] == 9
    assert config["seed_everything"] == 3
    assert config["model"]["init_args"]["student"] == config["model"]["init_args"]["teacher"] == {"class_path": "m.Net"}
    assert config["model"]["init_args"]["outputs"] == "net"
    export = config["trainer"]["callbacks"][-1]["init_args"]
    assert export["engines"] == ["openvino"]
    assert export["module"] == "net"
    assert "inputs" not in export  # a function, which YAML doesn't hold
    assert export["budgets"] == {"max_drop": 0.5, "max_latency_ms": 2.0, "batch": 4}
    channels, quantization = (made(section) for section in ALL.compression())
    assert (channels.target.macs_reduction, channels.start, channels.end) == (2.0, 0, 3)
    assert (quantization.start, quantization.lr_scale) == (7, 0.1)


def test_the_text_says_how_it_is_run_and_what_it_lacks():
    recipe = Recipe("ptq", ("openvino",), "openvino", "high")
    text = config_text(
        recipe, recipe_config(recipe, {}, "net.ckpt", "out", {}, Budgets(1, 2)), "a/recipe.yaml", ["data"]
    )
    assert text.startswith("# lightning-accel quantize -c a/recipe.yaml\n")
    assert "# Add the sections `data` of your own config" in text
    content = yaml.safe_load(text)
    assert (content["target"], content["effort"], content["engine"], content["ckpt_path"]) == (
        "openvino",
        "high",
        ["openvino"],
        "net.ckpt",
    )
