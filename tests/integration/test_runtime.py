"""The extra `runtime`: bundles are loaded, verified and measured where no package of training can be imported."""

import os
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import numpy as np
import pytest
from torch.utils.data import DataLoader

import lightning_accel as la
from lightning_accel.errors import EngineError, InvalidArgumentError
from tests.support.models import Classifier, images, loader
from tests.support.onnx_models import linear

PROJECT = tomllib.loads((Path(la.__file__).parents[1] / "pyproject.toml").read_text())["project"]
# Import names of what `pip install lightning-accel[runtime]` brings, with what NumPy, onnx and ONNX Runtime depend on themselves.
BROUGHT = {"numpy", "onnx", "onnxruntime", "google", "ml_dtypes", "typing_extensions", "flatbuffers", "packaging"}
HIDE = """
from importlib.machinery import PathFinder
HIDDEN, find = {hidden!r}, PathFinder.find_spec
def find_spec(name, path=None, target=None):
    return None if name.split(".")[0] in HIDDEN else find(name, path, target)
PathFinder.find_spec = find_spec
"""


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    import lightning as L

    folder = tmp_path_factory.mktemp("runtime") / "bundle"
    callbacks = [
        la.PostTrainingQuantization("portable", 2),
        la.ModelExport(folder, engines=["onnxruntime"], keep_samples=16),
    ]
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = L.Trainer(max_epochs=1, callbacks=callbacks, accelerator="cpu", **quiet)
    trainer.fit(Classifier(), loader(32), DataLoader(images(64, 1), 16))
    return folder


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Environment of processes that import nothing beyond the extra, nor do the processes that they start."""
    folder = tmp_path_factory.mktemp("bare")
    hidden = {name for name in packages_distributions() if name not in {*BROUGHT, "lightning_accel", "_virtualenv"}}
    assert {"torch", "lightning", "jsonargparse", "matplotlib", "tqdm", "yaml"} <= hidden
    (folder / "sitecustomize.py").write_text(HIDE.format(hidden=hidden))
    root = Path(la.__file__).parents[1]
    return {**os.environ, "PYTHONPATH": f"{folder}{os.pathsep}{root}", "OMP_NUM_THREADS": "1"}


def run(bare, *arguments):
    done = subprocess.run(
        [sys.executable, "-m", "lightning_accel", *arguments], env=bare, capture_output=True, text=True, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--help"], "usage: lightning-accel"),
        (["--version"], f"lightning-accel {la.__version__}"),
        (["doctor", "--no-probe"], "onnxruntime        runs here ("),
        (["verify", "{bundle}"], "onnxruntime (model.onnx): passed"),
        (
            ["benchmark", "{bundle}", "--seconds", "0.05", "--batch", "1", "--callers", "1", "--no-record"],
            "onnxruntime int8",
        ),
        (["bundle", "{bundle}", "--triton", "{tmp}/models"], "start it with: tritonserver"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_commands(bundle, bare, tmp_path, arguments, says):
    code, out, err = run(bare, *(a.format(bundle=bundle, tmp=tmp_path) for a in arguments))
    assert code == 0, err
    assert says in out


@pytest.mark.parametrize("command", ["fit", "export", "quantize", "plan", "check"])
def test_commands_that_train_name_the_extra(bare, command):
    code, out, err = run(bare, command, "x")
    assert (code, out) == (1, "")
    assert err.count("\n") == 1
    assert f"`lightning-accel {command}` needs the package" in err
    assert err.rstrip().endswith('pip install "lightning-accel[cpu]"')


def test_the_extra_brings_neither_torch_nor_lightning():
    extras = PROJECT["optional-dependencies"]
    names = {line.split(">")[0].split("[")[0] for line in [*PROJECT["dependencies"], *extras["runtime"]]}
    assert names == {"numpy", "onnx", "onnxruntime"}
    assert "lightning-accel[runtime,train]" in extras["cpu"]


def test_int8_turns_nan_into_the_smallest_number_of_its_range(bundle):
    """What the documentation says; `check_finite` is for who wants to know."""
    nan, low = np.full((1, 3, 8, 8), np.nan, np.float32), np.full((1, 3, 8, 8), -np.inf, np.float32)
    with la.load_runner(bundle, "onnxruntime") as runner:
        assert runner.path.name == "model.onnx"
        assert np.isfinite(runner(nan)).all()
        np.testing.assert_array_equal(runner(nan), runner(low))
    with la.load_runner(bundle / "reference.onnx") as runner:
        assert np.isnan(runner(nan)).all()


def test_check_finite(bundle, tmp_path):
    x = np.zeros((2, 3, 8, 8), np.float32)
    with la.load_runner(bundle, "onnxruntime", check_finite=True) as runner:
        assert runner(x).shape == (2, 4)
        x[1, 0, 0, 0], x[0, 0, 0, 0] = np.nan, np.inf
        with pytest.raises(
            InvalidArgumentError, match="finite numbers, but got 1 NaN and 1 infinite values in input `x`"
        ):
            runner(x)
    linear(tmp_path / "m.onnx")
    with la.load_runner(tmp_path / "m.onnx", check_finite=True) as runner:
        large = np.full((1, 3), 3e38, np.float32)
        with pytest.raises(EngineError, match=r"has 0 NaN and [12] infinite values, although the inputs are finite"):
            runner(large)


def test_samples_with_nan_verify_nothing(bundle):
    x = np.zeros((4, 3, 8, 8), np.float32)
    x[2, 0, 0, 0] = np.nan
    with pytest.raises(
        InvalidArgumentError,
        match=r"must hold numbers, but got NaN in \['x'\], which the network hands on to its outputs",
    ):
        la.verify_bundle(bundle, {"x": x})
