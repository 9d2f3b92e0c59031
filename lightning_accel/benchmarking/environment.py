"""Describe the machine and the installed packages, for the report beside each measurement."""

import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from lightning_accel.core.cpu import cpu_fields
from lightning_accel.engines.registry import requirements
from lightning_accel.engines.tensorrt.cuda import gpu_name

FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")


def environment() -> dict[str, Any]:
    """Describe this machine and what is installed on it, as JSON values.

    Nothing is imported. Values that the system doesn't report are ``None``, not ``False``.

    Returns:
        ``cpu`` (model name), ``cpu_flags`` (name -> whether the CPU has it), ``cores`` (that this process may use),
        ``load_average`` (of the last 1, 5 and 15 minutes), ``gpu``, ``platform``, ``python``, ``packages`` (those
        installed), and ``torch_threads`` if torch is imported already.

    Example:
        >>> environment()["cpu_flags"]["avx2"]  # doctest: +SKIP
        True
    """
    fields = cpu_fields()
    flags = fields.get("flags", fields.get("Features"))
    present = None if flags is None else set(flags.split())
    torch = sys.modules.get("torch")
    return {
        "cpu": fields.get("model name") or platform.processor() or platform.machine(),
        "cpu_flags": {flag: None if present is None else flag in present for flag in FLAGS},
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "load_average": [round(load, 2) for load in os.getloadavg()] if hasattr(os, "getloadavg") else None,
        "gpu": gpu_name(),
        "platform": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: found for name in packages() if (found := _version(name)) is not None},
        "torch_threads": None if torch is None else torch.get_num_threads(),
    }


def packages() -> list[str]:
    """Distributions whose versions are reported with a measurement: numerical libraries and all engines."""
    return list(dict.fromkeys(["torch", "numpy", "onnx", *requirements(), "lightning-accel"]))


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None
