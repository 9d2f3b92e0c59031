"""An error's class decides whether the command line prints one line or a traceback."""

import errno
import subprocess
import sys

import lightning as L
import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException

from lightning_accel import errors
from lightning_accel.cli.commands import verify
from lightning_accel.cli.errors import UsageError
from lightning_accel.cli.main import main
from tests.cli.test_lightning_cli import _process, pytestmark, told  # noqa: F401 - the fixture and marks serve here too
from tests.support.models import Classifier

OWN = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.LightningAccelError)]
WITHOUT_WORDS = "No signal words\nin two lines."  # neither "must" nor "needs" nor "can't"
USERS = [FileNotFoundError(errno.ENOENT, "No such file", "x.yaml"), OSError(errno.ENOSPC, "No space left on device")]
BUGS = [ValueError("must be a number"), TypeError("needs a tensor"), KeyError("x"), OSError("no path in it")]


class Failing(Classifier):
    """Raises, in the first training step, what a test asks for."""

    error: BaseException = RuntimeError()

    def training_step(self, batch, batch_idx):
        raise type(self).error


def fit(error):
    Failing.error = error
    config = {
        "model": {"class_path": "tests.cli.test_errors.Failing"},
        "data": {"class_path": "tests.cli.test_lightning_cli.Data"},
        "trainer": {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "max_epochs": 1},
    }
    with open("run.yaml", "w") as file:
        yaml.safe_dump(config, file)
    return main(["fit", "-c", "run.yaml"])


def light(error, monkeypatch):
    def run(arguments):
        raise error

    monkeypatch.setattr(verify, "run", run)
    return main(["verify", "bundle"])


def test_every_class_of_the_library_is_tried():
    assert {"InvalidArgumentError", "EngineError", "VerificationError"} <= {cls.__name__ for cls in OWN}


@pytest.mark.parametrize("cls", OWN, ids=lambda cls: cls.__name__)
def test_the_librarys_errors_are_one_line(cls, capfd, monkeypatch):
    assert fit(cls(WITHOUT_WORDS)) == 1
    assert told(capfd) == "lightning-accel: error: No signal words in two lines."
    assert light(cls(WITHOUT_WORDS), monkeypatch) == 1
    assert told(capfd) == "lightning-accel: error: No signal words in two lines."


@pytest.mark.parametrize("error", [*USERS, MisconfigurationException("Two loggers.")], ids=repr)
def test_errors_of_the_users_paths_and_of_lightnings_settings_are_one_line(error, capfd):
    assert fit(error) == 1
    assert told(capfd) == f"lightning-accel: error: {error}"


@pytest.mark.parametrize("error", USERS, ids=repr)
def test_a_light_command_prints_errors_of_paths_in_one_line(error, capfd, monkeypatch):
    assert light(error, monkeypatch) == 1
    assert told(capfd) == f"lightning-accel: error: {error}"


@pytest.mark.parametrize("error", BUGS, ids=repr)
def test_bugs_keep_their_traceback_whatever_their_words(error, monkeypatch):
    with pytest.raises(type(error)) as raised:
        light(error, monkeypatch)
    assert raised.value is error
    with pytest.raises(type(error)) as raised:
        fit(error)
    assert raised.value is error


def test_a_bug_that_follows_an_expected_error_keeps_its_traceback():
    bug = KeyError("x")
    bug.__cause__ = errors.RunError("no state")
    with pytest.raises(KeyError):
        fit(bug)


def test_an_unknown_error_of_torch_keeps_its_traceback():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        fit_module("tests.cli.test_errors.WrongShapes")


class WrongShapes(Classifier):
    def training_step(self, batch, batch_idx):
        return torch.ones(2, 3) @ torch.ones(2, 3)


def fit_module(path, *more):
    common = [
        "--trainer.accelerator=cpu",
        "--trainer.logger=false",
        "--trainer.max-epochs=1",
        "--trainer.enable-progress-bar=false",
    ]
    return main(["fit", "--model", path, "--data", "tests.cli.test_lightning_cli.Data", *common, *more])


class FailingToBuild(L.LightningModule):
    def __init__(self):
        raise errors.InvalidArgumentError("Nothing fits.")


def test_an_error_of_a_constructor_is_one_line(capfd):
    assert fit_module("tests.cli.test_errors.FailingToBuild") != 0
    assert told(capfd) == "lightning-accel: error: Nothing fits."


class BuggyCallback(L.Callback):
    def __init__(self):
        raise ValueError("must be a bug: no error of the library")


def test_a_bug_in_a_constructor_keeps_its_traceback():
    with pytest.raises(ValueError, match="must be a bug"):
        fit_module("tests.support.models.Classifier", "--trainer.callbacks=tests.cli.test_errors.BuggyCallback")


def test_the_variable_shows_the_traceback_of_both_kinds_of_commands(monkeypatch):
    monkeypatch.setenv("LIGHTNING_ACCEL_DEBUG", "1")
    for run in (lambda: light(errors.EngineError("x"), monkeypatch), lambda: fit(errors.EngineError("x"))):
        with pytest.raises(errors.EngineError):
            run()


def test_a_command_line_that_cannot_be_parsed_ends_with_2(capfd, monkeypatch):
    assert light(UsageError("x"), monkeypatch) == 2
    assert main(["verify"]) == 2
    assert (
        "error: the following arguments are required: bundle. See `lightning-accel verify --help`."
        in capfd.readouterr().err
    )


def test_a_reader_that_has_seen_enough_is_no_error():
    """What ``lightning-accel doctor | head -0`` does."""
    code = "import os, sys; r, w = os.pipe(); os.close(r); os.dup2(w, 1); from lightning_accel.cli import main as m; "
    code += "from lightning_accel.cli.commands import verify; "
    code += "verify.run = lambda _: sys.stdout.write('x' * 100000) and sys.stdout.flush(); m.main(['verify', '.'])"
    done = subprocess.run([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True, check=False)
    assert done.stderr == ""
