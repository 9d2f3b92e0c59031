"""Targets: integer arithmetic of the runtimes that execute a network.

INT8 arithmetic differs between runtimes. A :class:`Target` describes one: training simulates it, export writes it, verification
runs it. Dequantized value = ``(integer - zero_point) * scale``. Doesn't import torch, so it is available where bundles run.
"""

import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from lightning_accel.core.arguments import NOT_EMPTY, at_least, check_fields
from lightning_accel.core.cpu import cpu_name
from lightning_accel.core.registry import Registry
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.kernel_probe import KernelFinding, engine_version, probe_kernels
from lightning_accel.engines.registry import engine_named, engine_names, probed_engines, resolve
from lightning_accel.errors import InvalidArgumentError, MissingPackageError

Probe = Callable[[str, str, Arithmetic], KernelFinding]

# Kinds of operators that a target may compute in integers.
CONVOLUTION, TRANSPOSED, LINEAR, MATMUL = "convolution", "transposed convolution", "linear", "matmul"
ATTENTION, SUM, POOLING, EMBEDDING = "attention", "sum", "pooling", "embedding"
OPERATORS = (CONVOLUTION, TRANSPOSED, LINEAR, MATMUL, ATTENTION, SUM, POOLING, EMBEDDING)
ACTIVATIONS = ("int8", "uint8")
_LARGEST_UNSATURATED = 64  # two products with uint8 fit into int16: 2 * 255 * 64 = 32,640


@dataclass(frozen=True)
class Target:
    """Integer arithmetic of one runtime and the operators that it supports. A new target is a new instance; no code depends on the name.

    Args:
        name: name in ``target=...``.
        activations: ``"int8"``: zero point 0 (symmetric); ``"uint8"``: any zero point (affine).
        weight_max: largest integer of a weight; weights are int8, symmetric, per output channel.
        engines: engines whose kernels reproduce this arithmetic, the default one first.
        why: explanation in one sentence, for the report.
        operators: kinds of operators for which the runtime has integer kernels.
        outputs: whether convolutions and sums are computed in integers only if their result is quantized too.
        both_summands: whether both operands of a residual sum must be integers; otherwise the sum is fused into the
            preceding convolution, in its accumulator.
        rest: type of all other operators: ``"float32"``, or ``"float16"`` by casts in the file.
        opset: ONNX opset of the file: the lowest that supports all operators and that the parser accepts.

    Raises:
        InvalidArgumentError: a field is out of its range.

    Example:
        >>> Target("dsp", "int8", 127, ("onnxruntime",), "8 bits throughout", operators=("convolution",)).rest
        'float32'
    """

    name: str
    activations: str
    weight_max: int
    engines: tuple[str, ...]
    why: str
    operators: tuple[str, ...] = (CONVOLUTION, LINEAR, MATMUL, SUM)
    outputs: bool = False
    both_summands: bool = False
    rest: str = "float32"
    opset: int = 18

    def __post_init__(self) -> None:
        check_fields(self, name=NOT_EMPTY, engines=NOT_EMPTY, operators=NOT_EMPTY, opset=at_least(1))
        if self.activations not in ACTIVATIONS:
            raise InvalidArgumentError(
                f"Argument `activations` must be one of {ACTIVATIONS}, but got {self.activations!r}."
            )
        if not 1 <= self.weight_max <= 127:
            raise InvalidArgumentError(
                f"Argument `weight_max` must be from 1 to 127 (int8), but got {self.weight_max!r}."
            )
        if unknown := sorted(set(self.operators) - set(OPERATORS)):
            raise InvalidArgumentError(f"Argument `operators` must hold some of {OPERATORS}, but got {unknown}.")
        if self.rest not in ("float32", "float16"):
            raise InvalidArgumentError(f'Argument `rest` must be "float32" or "float16", but got {self.rest!r}.')

    @property
    def signed_activations(self) -> bool:
        """Whether activations are int8 with zero point 0, the only form that TensorRT's parser accepts."""
        return self.activations == "int8"

    @property
    def limits(self) -> tuple[int, int]:
        """Smallest and largest integer of an activation."""
        return (-128, 127) if self.signed_activations else (0, 255)


@cache
def cpu_has_vnni() -> bool:
    """Whether this CPU multiplies 8-bit integers without saturating 16-bit sums (VNNI on x86, dot product on ARM).

    Source: the CPU flags in ``/proc/cpuinfo``; on other systems (macOS, Windows) only ARM is assumed to have it.
    """
    if platform.machine().lower() in ("arm64", "aarch64"):
        return True
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text().split() if cpuinfo.is_file() else []
    return "avx512_vnni" in flags or "avx_vnni" in flags


def _full_range(vnni: bool) -> tuple[int, str]:
    """Largest weight that doesn't saturate in any kernel of this CPU, and the reason."""
    if vnni:
        return 127, "full-range weights: this CPU has VNNI"
    return 63, "7-bit weights: without VNNI this CPU's kernels add pairs of products in saturating int16"


def _onnxruntime(vnni: bool) -> Target:
    weight_max, why = _full_range(vnni)
    kinds = (CONVOLUTION, LINEAR, MATMUL, ATTENTION, SUM, POOLING, EMBEDDING)
    why = f"uint8 activations, {why}"
    return Target("onnxruntime", "uint8", weight_max, ("onnxruntime",), why, kinds, outputs=True, both_summands=True)


def _openvino(vnni: bool) -> Target:
    weight_max, why = _full_range(vnni)
    # Without attention: in one comparison its fused kernel in float was up to 8 % faster than int8 products around a softmax.
    kinds = (CONVOLUTION, TRANSPOSED, LINEAR, MATMUL, SUM, EMBEDDING)
    why = f"uint8 activations, {why}"
    return Target("openvino", "uint8", weight_max, ("openvino",), why, kinds)


def _tensorrt(vnni: bool) -> Target:
    why = "int8 with zero point 0, the only form TensorRT's parser accepts; the rest in float16"
    kinds = (CONVOLUTION, TRANSPOSED, LINEAR, MATMUL, SUM)
    return Target("tensorrt", "int8", 127, ("tensorrt",), why, kinds, rest="float16")


def _portable(vnni: bool) -> Target:
    why = "int8 with zero point 0 and 7-bit weights: no kernel saturates, and every parser accepts it"
    return Target("portable", "int8", 63, ("onnxruntime", "tensorrt", "openvino"), why)


_BUILTIN: dict[str, Callable[[bool], Target]] = {
    "tensorrt": _tensorrt,
    "onnxruntime": _onnxruntime,
    "openvino": _openvino,
    "portable": _portable,
}
_TARGETS: Registry[Target] = Registry(
    "target", "lightning_accel.targets", _BUILTIN, lambda name: _BUILTIN[name](cpu_has_vnni()), Target
)


def register_target(target: Target) -> None:
    """Make a target known under its name in this process.

    A distribution declares its targets as entry points of the group ``lightning_accel.targets`` instead.

    Args:
        target: the arithmetic. Registering an equal target again does nothing.

    Raises:
        InvalidArgumentError: another target has this name.
    """
    _TARGETS.register(target.name, target, "target")


def unregister_target(name: str) -> None:
    """Remove a target that :func:`register_target` added.

    Raises:
        InvalidArgumentError: there is none of that name.
    """
    _TARGETS.unregister(name)


def target_names() -> list[str]:
    """Names of all targets: those of this package, those of entry points, and those registered in this process."""
    return list(_TARGETS)


def default_target() -> str:
    """Name of the target that this machine can run.

    ``"tensorrt"`` where there is an NVIDIA GPU with TensorRT, else ``"onnxruntime"`` or ``"openvino"``, whichever is installed first
    in this order; ``"portable"`` where no engine is installed.
    """
    for name in ("tensorrt", "onnxruntime", "openvino"):
        engine = engine_named(name)
        if engine.installed() and not engine.why_unavailable():
            return name
    return "portable"


def finer_targets(target: Target) -> str:
    """Sentence on targets whose steps are finer than those of this one, for a network that it rounds too coarsely; empty if none are."""
    if not target.signed_activations and target.weight_max >= 127:
        return ""
    return " Targets with uint8 activations (`onnxruntime`, `openvino`) have finer steps."


def target_of(name: str | Target, vnni: bool | None = None) -> Target:
    """Look up a target by its name; a :class:`Target` is returned as it is.

    Args:
        name: ``"tensorrt"``, ``"onnxruntime"``, ``"openvino"``, ``"portable"`` or the name of another target, see :func:`target_names`.
        vnni: whether the CPU that will run it has VNNI; ``None`` means this machine's.

    Raises:
        InvalidArgumentError: no target has this name.
    """
    if isinstance(name, Target):
        return name
    if name in _BUILTIN and vnni is not None:
        return _BUILTIN[name](vnni)
    hint = (
        " Weights alone are quantized by QuantizationAwareTraining, or without training by `quantization.quantize_weights_`."
        if name in ("int4", "int8-weights")
        else ""
    )
    return _TARGETS.get(name, "target", hint)


def saturation(weight: int, engine: str, vnni: bool) -> str:
    """Reason why int8 weights can overflow in an engine's kernels; empty if they can't.

    Args:
        weight: largest magnitude of the integers.
        engine: ``"onnxruntime"`` or ``"openvino"``; other engines have different kernels.
        vnni: whether its CPU has VNNI.

    Source: AVX2's ``vpmaddubsw`` adds two products of uint8 and int8 in saturating int16: with weights up to 127 the sum
    reaches 2 * 255 * 127 = 64,770, with weights up to 63 it stays at 32,130, below 32,767. VNNI adds in int32.
    """
    if vnni or weight <= _LARGEST_UNSATURATED or engine not in probed_engines():
        return ""
    return (
        f"weights up to {weight} saturate in the int8 kernels of a CPU without VNNI; "
        "the targets `onnxruntime`, `openvino` and `portable` keep to 7 bits there"
    )


def arithmetic_of(target: Target) -> Arithmetic:
    """Properties of a target that determine an engine's kernels."""
    return Arithmetic(target.activations, target.weight_max, target.outputs, target.both_summands)


def cannot_reproduce(
    target: Target,
    engine: str,
    *,
    forms: Iterable[str] = (),
    vnni: bool | None = None,
    probe: Probe = probe_kernels,
) -> str:
    """Reason why an engine's kernels can't reproduce a target's arithmetic; empty if they can.

    Measured on this machine for the forms of the network; for another CPU, inferred from its flags.

    Args:
        target: target of the quantization.
        engine: name of the engine.
        forms: forms of the network's operators, see :data:`~lightning_accel.engines.kernel_probe.FORMS`.
        vnni: whether another CPU has VNNI; ``None`` means this machine, on which the engine is probed.
        probe: measures the error of an engine for a form.
    """
    spec = engine_named(engine) if engine in engine_names() else None
    if spec is not None and spec.refuses and (reason := resolve(spec.refuses)(arithmetic_of(target))):
        return str(reason)
    if vnni is not None:
        return saturation(target.weight_max, engine, vnni)
    if (
        spec is None or not spec.probed or not engine_version(engine)
    ):  # a missing engine is reported elsewhere, with its extra
        return ""
    try:
        wrong = [found for found in _probed(target, engine, forms, probe) if not found.exact]
    except MissingPackageError:  # its version is known and it doesn't import: reported elsewhere, too
        return ""
    return _refusal(target, engine, wrong, forms, probe) if wrong else ""


def _refusal(target: Target, engine: str, wrong: Sequence[KernelFinding], forms: Iterable[str], probe: Probe) -> str:
    """The measured errors, and a target that the engine reproduces."""
    names = dict.fromkeys((engine, "portable", "onnxruntime", "openvino"))
    others = [target_of(name) for name in names if name in target_names()]
    right = (
        other.name
        for other in others
        if arithmetic_of(other) != arithmetic_of(target)
        and all(found.exact for found in _probed(other, engine, forms, probe))
    )
    name = next(right, None)
    fix = "no target of this library is exact there" if name is None else f"the target `{name}` is exact there"
    errors = "; ".join(f"{found.form}: {found}" for found in wrong)
    return (
        f"with {target.activations} activations and weights up to {target.weight_max} {engine} {wrong[0].version} diverges "
        f"from the file on this CPU ({cpu_name()}), as measured in steps of the output's quantization ({errors}); {fix}"
    )


def _probed(target: Target, engine: str, forms: Iterable[str], probe: Probe) -> list[KernelFinding]:
    return [probe(engine, form, arithmetic_of(target)) for form in sorted(forms)]
