"""Print what is installed, which engines run or only build here, and how fast and exact they compute int8 on this CPU."""

import argparse
import json
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning_accel.benchmarking.environment import environment
from lightning_accel.benchmarking.int8_probe import int8_speed
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.kernel_probe import FORMS, KernelFinding, probe_kernels
from lightning_accel.engines.registry import UNLOADABLE, all_engines, probed_engines, requirements

_REPORTS = {
    "wandb": "lightning-accel[wandb]",
    "transformers": "lightning-accel[transformers]",
    "matplotlib": "lightning-accel[report]",
}

_FORMATS = (("uint8", 127), ("uint8", 63), ("int8", 127), ("int8", 63))  # activations, largest weight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of the command."""
    parser.add_argument("--json", type=Path, help="write the findings to this file")
    parser.add_argument("--no-probe", action="store_true", help="don't run the engines")


def run(arguments: argparse.Namespace) -> int:
    """Diagnose and print.

    Returns:
        0, or 1 if something is broken: ONNX Runtime is missing or installed twice, or an engine can't be loaded.
    """
    found = diagnose(probe=not arguments.no_probe)
    print(_screen(found))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(found, indent=2) + "\n")
    return 1 if found["broken"] else 0


def diagnose(*, probe: bool = True) -> dict[str, Any]:
    """Find out what this machine can do.

    Args:
        probe: run the engines on small int8 files.

    Returns:
        ``environment``, ``extras`` (package -> version, or how to install it), ``engines`` (name -> status), ``int8`` (speed, for
        each engine and format), ``kernels`` (error, for each engine, form of operators and format), ``broken`` (what must be
        fixed).
    """
    packages = {package: needs for package, needs in {**requirements(), **_REPORTS}.items() if package != "torch"}
    extras = {package: _version(package) or f'pip install "{needs}"' for package, needs in packages.items()}
    installed = {package for package in packages if _version(package)}
    broken = []
    if {"onnxruntime", "onnxruntime-gpu"} <= installed:
        broken.append(
            "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's files: uninstall both, then install one"
        )
    if not {"onnxruntime", "onnxruntime-gpu"} & installed:
        broken.append(
            'ONNX Runtime is missing; every export is verified with it: pip install "lightning-accel[cpu]", or "lightning-accel[runtime]" '
            "on a machine that only runs bundles"
        )
    engines = {name: status for spec in all_engines() for name, status in spec.statuses().items()}
    broken += [f"{name}: {status}" for name, status in engines.items() if status.startswith(UNLOADABLE)]
    runs = [engine for engine in probed_engines() if probe and engines[engine].startswith("runs")]
    kernels = [
        probe_kernels(engine, form, Arithmetic(*of)).to_dict() for engine in runs for form in FORMS for of in _FORMATS
    ]
    int8 = [vars(int8_speed(engine, *of)) for engine in runs for of in _FORMATS]
    return {
        "environment": environment(),
        "extras": extras,
        "engines": engines,
        "int8": int8,
        "kernels": kernels,
        "broken": broken,
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _screen(found: dict[str, Any]) -> str:
    machine = found["environment"]
    flags = ", ".join(flag for flag, has in machine["cpu_flags"].items() if has) or "none of the relevant ones"
    lines = [
        f"{machine['cpu']}, {machine['cores']} cores ({flags}); GPU: {machine['gpu'] or 'none'}",
        f"Python {machine['python']}, torch {machine['packages'].get('torch', 'not installed')}",
        "",
        *(f"{name:18s} {status}" for name, status in found["engines"].items()),
        "",
        *(f"{name:18s} {status}" for name, status in found["extras"].items()),
    ]
    if found["int8"]:
        lines += [
            "",
            "int8 on this CPU: speed-up of a 3x3 convolution with 64 channels over float32 in the same engine, 1 thread:",
        ]
    lines += [f"{one['engine']:18s} {_format(one):22s} {_speed(one)}" for one in found["int8"]]
    if found["kernels"]:
        lines += [
            "",
            "int8 kernels on this CPU: largest error in quantization steps of the output; at most one step is exact:",
        ]
    rows: dict[tuple[str, str], list[str]] = {}
    for one in found["kernels"]:
        wrong = rows.setdefault((f"{one['engine']} {one['version']}", one["form"]), [])
        if not one["exact"]:
            wrong.append(f"{_format(one['arithmetic'])} {_words(one)}")
    lines += [f"{engine:18s} {form:34s} {'; '.join(wrong) or 'exact'}" for (engine, form), wrong in rows.items()]
    return "\n".join([*lines, *(f"BROKEN: {text}" for text in found["broken"])])


def _speed(one: dict[str, Any]) -> str:
    if one["noisy"]:
        return f"too noisy to tell: from {one['low']:.1f}x to {one['high']:.1f}x; repeat it on a quiet machine"
    return f"{one['speedup']:.1f}x"


def _format(values: dict[str, Any]) -> str:
    return f"{values['activations']} x int8 up to {values['weight_max']}"


def _words(values: dict[str, Any]) -> str:
    given = {name: value for name, value in values.items() if name != "exact"}
    return str(KernelFinding(**{**given, "arithmetic": Arithmetic(**values["arithmetic"])}))
