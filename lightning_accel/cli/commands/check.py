"""Try, without training, whether a module can be captured, exported, quantized and built, and say what stands in the way.

Exit code: 0 nothing stands in the way; 1 something does; 3 nothing was found, but not all could be tried.
"""

import argparse
import io
import json
import os
import sys
import time
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

from lightning_accel.cli.arrays import load_arrays
from lightning_accel.errors import InvalidArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("module", help="path of the class, e.g. package.module.MyLit; looked for from this folder, too")
    parser.add_argument("--ckpt", type=Path, help="checkpoint to load; its hyper-parameters build the module")
    parser.add_argument("--init", action="append", default=[], metavar="NAME=VALUE", help="argument of its constructor")
    parser.add_argument(
        "--shape", action="append", default=[], metavar="NAME=2x3x32x32", help="an input, e.g. ids=2x128:int64"
    )
    parser.add_argument("--data", type=Path, help="inputs instead: .npz by name, or .npy for the only one")
    parser.add_argument("--target", default="portable", help="arithmetic to quantize for; default portable")
    parser.add_argument("--engine", action="append", help="engine to build, several times; default: those installed")
    parser.add_argument("--seconds", type=float, default=30.0, help="time for all of it; default 30")
    parser.add_argument("--json", type=Path, help="write the findings there")


def run(arguments: argparse.Namespace) -> int:
    """Try and print."""
    started = time.monotonic()
    sys.path.insert(0, os.getcwd())
    from lightning_accel.export.check import check_module
    from lightning_accel.export.module_source import build_call, build_module, required_inputs

    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # of the libraries to their own developers, as are the graphs that torch prints
        module = build_module(arguments.module, arguments.ckpt, dict(map(_value, arguments.init)))
        arrays = None if arguments.data is None else load_arrays(arguments.data, required_inputs(module))
        call = build_call(module, arguments.shape, arrays)
        spent = min(
            time.monotonic() - started, arguments.seconds - 1.0
        )  # one second is left, however slow imports were
        findings = check_module(
            module, call, target=arguments.target, engines=arguments.engine, seconds=arguments.seconds, spent=spent
        )
    print(f"{arguments.module}{f' with {arguments.ckpt}' if arguments.ckpt else ''}")
    for finding in findings:
        print(finding)
    if arguments.json is not None:
        arguments.json.write_text(json.dumps([finding.to_dict() for finding in findings], indent=2) + "\n")
    statuses = {finding.status for finding in findings}
    return 1 if "stands in the way" in statuses else 3 if statuses - {"ok"} else 0


def _value(text: str) -> tuple[str, Any]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise InvalidArgumentError(f"Argument `--init` must read NAME=VALUE, but got {text!r}.")
    try:
        return name, json.loads(value)
    except json.JSONDecodeError:
        return name, value
