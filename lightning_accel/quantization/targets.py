"""Targets: the integer arithmetic of the runtime that will execute the network (law 8).

INT8 is not one arithmetic. A :class:`Target` says which one: training simulates it, export writes it, verification runs
it. Dequantized value = ``(integer - zero_point) * scale``.
"""

import platform
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch


@dataclass(frozen=True)
class Target:
    """Arithmetic of one runtime.

    Args:
        name: what the user writes.
        signed_activations: int8 with zero point 0 (symmetric), or uint8 with a zero point (affine).
        weight_max: largest integer of a weight; weights are int8, symmetric, per output channel.
        engines: engines whose kernels reproduce this arithmetic, the natural one first.
        why: one sentence for the report.
    """

    name: str
    signed_activations: bool
    weight_max: int
    engines: tuple[str, ...]
    why: str

    @property
    def low(self) -> int:
        """Smallest integer of an activation."""
        return -128 if self.signed_activations else 0

    @property
    def high(self) -> int:
        """Largest integer of an activation."""
        return 127 if self.signed_activations else 255

    @property
    def dtype(self) -> torch.dtype:
        """Integer type of activations."""
        return torch.int8 if self.signed_activations else torch.uint8


@cache
def cpu_has_vnni() -> bool:
    """Whether this CPU multiplies 8-bit integers without saturating 16-bit sums (VNNI on x86, dot product on ARM).

    Source: the kernel's list of CPU flags; where there is none (macOS, Windows), only ARM is taken to have it.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _onnxruntime(vnni: bool) -> Target:
    if vnni:
        return Target(
            "onnxruntime", False, 127, ("onnxruntime",), "uint8 activations, full-range weights: this CPU has VNNI"
        )
    why = "uint8 activations, 7-bit weights: without VNNI this CPU's kernels add pairs of products in saturating int16"
    return Target("onnxruntime", False, 63, ("onnxruntime",), why)


def target_of(name: str, vnni: bool | None = None) -> Target:
    """The target of that name.

    Args:
        name: ``"tensorrt"``, ``"onnxruntime"`` or ``"portable"``.
        vnni: whether the CPU that will run it has VNNI; ``None`` means this machine's.

    Raises:
        ValueError: there is none.
    """
    known = {
        "tensorrt": lambda: Target(
            "tensorrt", True, 127, ("tensorrt",), "int8 with zero point 0, the only form TensorRT's parser accepts"
        ),
        "onnxruntime": lambda: _onnxruntime(cpu_has_vnni() if vnni is None else vnni),
        "portable": lambda: Target(
            "portable",
            True,
            63,
            ("onnxruntime", "tensorrt", "openvino"),
            "int8 with zero point 0 and 7-bit weights: no kernel saturates, and every parser accepts it",
        ),
    }
    if name not in known:
        raise ValueError(f"Argument `target` must be one of {sorted(known)}, but got {name!r}.")
    return known[name]()


def saturates(target: Target, engine: str, vnni: bool | None = None) -> str:
    """Why an engine's kernels can't reproduce a target's arithmetic; empty if they can.

    Args:
        target: what was trained for.
        engine: what is to run it.
        vnni: whether its CPU has VNNI; ``None`` means this machine's.

    Source: AVX2's ``vpmaddubsw`` adds two products of uint8 and int8 in saturating int16: with weights up to 127 the sum
    reaches 2 * 255 * 127 = 64,770, with weights up to 63 it stays at 32,130, below 32,767.
    """
    has_vnni = cpu_has_vnni() if vnni is None else vnni
    if engine == "onnxruntime" and target.weight_max > 64 and not has_vnni:
        return (
            f"weights up to {target.weight_max} saturate in the int8 kernels of a CPU without VNNI; "
            "the targets `onnxruntime` and `portable` keep to 7 bits there"
        )
    return ""
