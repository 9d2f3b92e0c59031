"""Registry record of TensorRT, with the functions that it names."""

from pathlib import Path
from typing import Any

from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.registry import UNLOADABLE, EngineSpec
from lightning_accel.engines.tensorrt.cuda import has_gpu
from lightning_accel.engines.tensorrt.library import LIBRARIES, load_library

_HERE = "lightning_accel.engines.tensorrt.record"

ENGINE = EngineSpec(
    "tensorrt",
    "lightning_accel.engines.tensorrt.runner:TensorRTRunner",
    requirements={"tensorrt": "lightning-accel[gpu]", "tensorrt-rtx-cu12": "lightning-accel[tensorrt-rtx]"},
    modules=tuple(LIBRARIES),
    suffixes=(".engine",),
    source="built",
    build=f"{_HERE}:build",
    rest_in_fp16=True,
    precisions=("fp32", "fp16", "bf16", "int8"),
    unavailable=f"{_HERE}:unavailable",
    status=f"{_HERE}:statuses",
    check=f"{_HERE}:check",
    refuses=f"{_HERE}:refuses",
    threads=False,
)


def build(onnx_file: Path, out: Path, precision: str) -> dict[str, Any]:
    """Build an engine file and return the entries for the manifest."""
    from lightning_accel.engines.tensorrt.build import build_engine
    from lightning_accel.engines.tensorrt.command import equivalent_command

    info = build_engine(onnx_file, out)
    runs = has_gpu()
    return {
        "status": "built, verified and measured here" if runs else "built here, not run",
        "file": info.path.name,
        "runs_here": runs,
        "library": info.library,
        "version": info.version,
        "precision": precision,
        "sparse_layers": info.sparse_layers,
        "command": equivalent_command(info, onnx_file),
        "warnings": info.warnings,
    }


def unavailable() -> str:
    """Why TensorRT can't run an engine on this machine; empty if it can."""
    return "" if has_gpu() else "needs an NVIDIA GPU and its driver, and this machine has none"


def statuses() -> dict[str, str]:
    """Status of both libraries for ``doctor``."""
    return {library: _status(library) for library in LIBRARIES}


def check() -> None:
    """Raise unless one of the libraries is installed.

    Raises:
        MissingPackageError: neither is; the message names the extra.
    """
    load_library(None)


def refuses(arithmetic: Arithmetic) -> str:
    """Why TensorRT can't run a target's arithmetic; empty if it can."""
    if arithmetic.activations == "int8":
        return ""
    return "its parser refuses uint8; the targets `tensorrt` and `portable` are int8 throughout"


def _status(library: str) -> str:
    try:
        load_library(library)
    except ModuleNotFoundError:
        return "not installed"
    except (ImportError, OSError, RuntimeError) as error:
        return f"{UNLOADABLE}: {error}"
    return "builds and runs here" if has_gpu() else "builds here, runs on an NVIDIA GPU"
