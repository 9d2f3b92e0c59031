"""Test, without training, whether a module can be captured, exported, quantized and built, and print what prevents it.

Exit code: 0 nothing prevents it; 1 something does; 3 no problem was found, but not everything could be tried.
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
from lightning_accel.cli.options import add_list_option
from lightning_accel.errors import InvalidArgumentError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument(
        "module", help="import path of the class, e.g. package.module.MyLit; the current folder is searched, too"
    )
    parser.add_argument(
        "--ckpt-path", type=Path, help="checkpoint to load; the module is built with its hyper-parameters"
    )
    parser.add_argument(
        "--init", action="append", default=[], metavar="NAME=VALUE", help="argument of the constructor; may be repeated"
    )
    parser.add_argument(
        "--shape",
        action="append",
        default=[],
        metavar="NAME=2x3x32x32",
        help="shape of an input, e.g. ids=2x128:int64; may be repeated",
    )
    parser.add_argument("--data", type=Path, help="inputs instead of shapes: .npz by name, or .npy for a single input")
    parser.add_argument("--target", default="portable", help="arithmetic to quantize for; default portable")
    add_list_option(parser, "--engine", help="engine to build for; default: all that are installed")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="limit of its time on the CPU in seconds; default 30"
    )
    parser.add_argument("--json", type=Path, help="write the findings to this file")


def run(arguments: argparse.Namespace) -> int:
    """Try and print."""
    started = time.process_time()
    sys.path.insert(0, os.getcwd())
    from lightning_accel.export.check import check
    from lightning_accel.export.module_source import build_call, build_module, required_inputs

    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")  # meant for the libraries' own developers, like the graphs that torch prints
        module = build_module(arguments.module, arguments.ckpt_path, dict(map(_value, arguments.init)))
        arrays = None if arguments.data is None else load_arrays(arguments.data, required_inputs(module))
        call = build_call(module, arguments.shape, arrays)
        spent = min(
            time.process_time() - started, arguments.seconds - 1.0
        )  # one second is left, however slow imports were
        findings = check(
            module, call, target=arguments.target, engines=arguments.engine, seconds=arguments.seconds, spent=spent
        )
    print(f"{arguments.module}{f' with {arguments.ckpt_path}' if arguments.ckpt_path else ''}")
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
