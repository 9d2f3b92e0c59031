"""Dashes and underscores, repeated and comma-separated lists, and typos."""

import subprocess
import sys

import pytest
import yaml

from lightning_accel.cli.main import main
from lightning_accel.cli.options import did_you_mean, join_lists, with_dashes, with_underscores
from lightning_accel.cli.registry import command_parser
from tests.cli.test_lightning_cli import _process, pytestmark, told  # noqa: F401 - the fixture and marks serve here too


@pytest.mark.parametrize(
    ("word", "dashed"),
    [
        ("--max_drop=0_5", "--max-drop=0_5"),
        ("--trainer.max_epochs", "--trainer.max-epochs"),
        ("my_file.npz", "my_file.npz"),
        ("-c", "-c"),
        ("--", "--"),
    ],
)
def test_only_names_of_options_are_renamed(word, dashed):
    assert with_dashes(word) == dashed
    assert with_underscores(dashed) == word


def test_light_commands_take_both_spellings():
    parser = command_parser("benchmark")
    for option in ("--max-drop", "--max_drop"):
        assert parser.parse_args(["b", option, "0.5"]).max_drop == 0.5
        assert parser.parse_args(["b", f"{option}=0.5"]).max_drop == 0.5


@pytest.mark.parametrize(
    "words",
    [
        ["--engine", "a", "--engine", "b", "--batch", "1", "--batch", "32"],
        ["--engine", "a,b", "--batch", "1,32"],
        ["--engine=a, b", "--batch=1", "--batch=32"],
    ],
)
def test_lists_are_repeated_or_separated_by_commas(words):
    arguments = command_parser("verify").parse_args(["bundle", *words])
    assert (arguments.engine, arguments.batch) == (["a", "b"], [1, 32])
    assert command_parser("verify").parse_args(["bundle"]).engine is None


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--engine", "a", "--x", "1", "--engine", "b,c"], ['--engine=["a", "b", "c"]', "--x", "1"]),
        (["--engine=[a, 'b']"], ['--engine=["a", "b"]']),
        (["--engines", "a"], ["--engines", "a"]),
    ],
)
def test_lists_reach_jsonargparse_as_one_value(words, expected):
    assert join_lists(words, ["engine"]) == expected


@pytest.mark.parametrize("words", [["--engine", "a", "--engine", "b"], ["--engine", "a,b"], ["--engine=[a,b]"]])
@pytest.mark.parametrize("batches", ["--calibration-batches", "--calibration_batches"])
def test_commands_of_the_trainer_take_them_too(capsys, words, batches):
    model = ["--model", "tests.support.models.Classifier", "--ckpt-path", "http://x"]
    with pytest.raises(SystemExit):
        main(["quantize", *model, *words, batches, "3", "--print-config"])
    config = yaml.safe_load(capsys.readouterr().out)
    assert (config["engine"], config["calibration_batches"], config["ckpt_path"]) == (["a", "b"], 3, "http://x")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["benchmrk"], "unknown command `benchmrk`. Did you mean `benchmark`?"),
        (["xyz"], "unknown command `xyz`. The commands are fit, validate,"),
        (["verify", "b", "--engines", "x"], "unknown option `--engines`. Did you mean `--engine`? See `lightning-accel verify --help`."),
        (["verify", "b", "--max_drp", "x"], "unknown option `--max-drp`. See"),
        (["verify", "b", "c"], "unknown arguments: c. See"),
        (["verify", "b", "--batch", "x"], "argument --batch: must be of type int, but got 'x'. See"),
    ],
)  # fmt: skip
def test_typos(capfd, words, expected):
    assert main(words) == 2
    assert expected in told(capfd)


def test_no_near_word_no_suggestion():
    assert did_you_mean("qqq", ["fit", "test"]) == ""


def test_an_unknown_command_loads_no_torch():
    code = "import sys; from lightning_accel.cli.main import main; main(['fti']); main(['--help']); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "False", done.stderr
    assert "Did you mean `fit`?" in done.stderr
