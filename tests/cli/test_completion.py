"""Tab completion, as the shell calls it."""

import os
import subprocess
import sys

import pytest

from lightning_accel.cli.registry import COMMANDS, TRAINER_COMMANDS

pytest.importorskip("argcomplete", reason="the extra `completion` is not installed")


def completions(line):
    """What the shell offers after ``line``: argcomplete writes it to the file descriptor 8."""
    read, write = os.pipe()
    environment = {
        **os.environ,
        "_ARGCOMPLETE": "1",
        "_ARGCOMPLETE_IFS": "\n",
        "COMP_LINE": line,
        "COMP_POINT": str(len(line)),
        "COMP_TYPE": "9",
    }
    code = f"import os, sys; os.dup2({write}, 8); sys.argv[0] = 'lightning-accel'; from lightning_accel.cli.main import main; main([])"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, pass_fds=[write], capture_output=True, check=False
    )
    os.close(write)
    with open(read) as file:
        found = {word.split(" ")[0].strip() for word in file.read().split("\n") if word}
    assert done.returncode == 0, done.stderr
    return found


def test_commands():
    assert completions("lightning-accel ") >= {*COMMANDS, *TRAINER_COMMANDS}
    assert completions("lightning-accel be") == {"benchmark"}


def test_options_of_a_light_command():
    assert completions("lightning-accel verify --en") == {"--engine"}
    assert completions("lightning-accel build m.onnx --engine tensorrt_") == {"tensorrt_rtx"}


def test_options_of_a_command_of_the_trainer():
    assert completions("lightning-accel quantize --calib") == {"--calibration-batches"}
    assert completions("lightning-accel fit --trainer.max-e") == {"--trainer.max-epochs"}


def test_predict_is_of_a_bundle_or_of_the_trainer():
    assert completions("lightning-accel predict bundle --rows") == {"--rows-per-part"}
    assert completions("lightning-accel predict --trainer.max-e") == {"--trainer.max-epochs"}
