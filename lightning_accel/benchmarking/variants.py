"""The ways people run a network, for the files of one bundle: each can be run here, or says what it would take."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lightning_accel.engines.tensorrt.cuda import has_gpu

BASELINE = "onnxruntime fp32"
REFERENCE = "reference.onnx"

_NO_INT8 = (
    "the bundle holds no int8 file: train with QuantizationAwareTraining, or make one without training: "
    "lightning-accel quantize --ckpt-path FILE"
)
_NO_PROGRAM = 'the bundle holds no `model.pt2`: export with ModelExport(engines=[..., "pytorch"])'
_NO_GPU = "needs an NVIDIA GPU and its driver, and this machine has none"
_TORCH_MODES = {  # way -> how it calls the program, and why load_runner doesn't
    "pytorch eager": ("eager", "`load_runner` runs the program in inference_mode"),
    "pytorch inference_mode": ("inference_mode", ""),
    "pytorch channels_last": ("channels_last", "`load_runner` runs the program as it was captured"),
    "pytorch compile": ("compile", "compiled anew in each process, with a C++ compiler"),
    "pytorch bf16 autocast": ("bf16", "`load_runner` runs the program as it was captured"),
    "pytorch fp16 autocast": ("fp16", "`load_runner` runs the program as it was captured"),
    "torchao dynamic int8": ("torchao dynamic", "made of the program in memory; no file of it is in the bundle"),
    "torchao weight-only int8": ("torchao weights", "made of the program in memory; no file of it is in the bundle"),
}


@dataclass(frozen=True)
class Way:
    """One way to run a network.

    Args:
        name: engine and precision, e.g. ``"onnxruntime int8"``.
        engine: what runs it, as in :func:`~lightning_accel.engines.base.load_runner`.
        precision: of the file: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int8+fp16"``.
        file: what is run; ``None`` if there is none.
        mode: how PyTorch calls the program; empty for the other engines.
        make: what the file has to be made of ``file`` first: ``"dynamic int8"``, ``"tensorrt fp32"`` or ``"tensorrt fp16"``.
        options: further arguments of the engine's runner.
        missing: why it can't run here; empty if it can, as far as is known before it is tried.
        unshippable: why ``load_runner`` can't run it from the bundle; empty if it can.
        common: whether it is in the default comparison.
    """

    name: str
    engine: str
    precision: str
    file: Path | None
    mode: str = ""
    make: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    missing: str = ""
    unshippable: str = ""
    common: bool = False


def ways_of(folder: Path, manifest: Mapping[str, Any]) -> list[Way]:
    """All ways for the files of a bundle; whether each runs here is found out when it is tried.

    Args:
        folder: the bundle.
        manifest: its ``engines``, ``files``, ``model`` and ``precision`` are read.
    """
    precision, model = str(manifest["precision"]), folder / manifest["model"]
    reference = folder / REFERENCE if REFERENCE in manifest["files"] else model
    ways = _of_pytorch(folder, manifest)
    for engine in ("onnxruntime", "openvino"):
        ways.append(Way(f"{engine} fp32", engine, "fp32", reference, common=True))
        for other in dict.fromkeys([*([precision] if precision != "fp32" else []), "int8"]):
            file = model if other == precision else None
            missing = "" if file is not None else _NO_INT8
            if other == "bf16":
                missing = f"{engine} has no bf16 kernels on a CPU"
            ways.append(Way(f"{engine} {other}", engine, other, file, missing=missing, common=True))
        if engine == "onnxruntime":
            made = "made of the float32 file anew each time; no file of it is in the bundle, and none was verified"
            ways.append(Way(f"{engine} dynamic int8", engine, "int8", reference, make="dynamic int8", unshippable=made))
            ways += _of_providers(reference, model, precision)
    return [*ways, *_of_tensorrt(folder, manifest, reference)]


def _of_pytorch(folder: Path, manifest: Mapping[str, Any]) -> list[Way]:
    line = manifest["engines"].get("pytorch")
    file = None if line is None else folder / line["file"]
    precision = str(manifest["precision"])  # the program is what was trained: int8 is computed in float there
    ways = []
    for name, (mode, unshippable) in _TORCH_MODES.items():
        common = name == "pytorch eager" or (name == "pytorch inference_mode" and file is not None)
        missing = "" if file is not None else _NO_PROGRAM
        ways.append(
            Way(name, "pytorch", precision, file, mode, missing=missing, unshippable=unshippable, common=common)
        )
    return ways


def _of_providers(reference: Path, model: Path, precision: str) -> list[Way]:
    ways = []
    files = {"fp32": reference, **({precision: model} if precision != "fp32" else {})}
    for provider in ("CUDA", "TensorRT"):
        for of, file in files.items():
            chosen = {"providers": [f"{'Tensorrt' if provider == 'TensorRT' else provider}ExecutionProvider"]}
            says = "`load_runner` runs the bundle's ONNX files on the CPU; pass it `providers=` to run them so"
            name = f"onnxruntime {provider.lower()} {of}"
            ways.append(Way(name, "onnxruntime", of, file, options=chosen, unshippable=says))
    return ways


def _of_tensorrt(folder: Path, manifest: Mapping[str, Any], reference: Path) -> list[Way]:
    line = manifest["engines"].get("tensorrt", {})
    lines = [one for one in (line, line.get("alternative")) if one and one.get("file")]
    shipped = {one["precision"].partition("+")[0]: one for one in lines}
    ways = []
    for precision in dict.fromkeys(["fp32", "fp16", "int8", *shipped]):
        one = shipped.get(precision)
        name = f"tensorrt {precision}"
        missing = "" if has_gpu() else _NO_GPU
        common = precision == (lines[0]["precision"].partition("+")[0] if lines else "int8")
        if one is not None:
            full, file = one["precision"], folder / one["file"]
            own = "" if one is lines[0] else "the manifest names the faster of TensorRT's engines"
            ways.append(Way(name, "tensorrt", full, file, missing=missing, unshippable=own, common=common))
        elif precision == "int8":
            said = missing or 'no int8 engine in the bundle: export with ModelExport(engines=["tensorrt"]) after QAT'
            ways.append(Way(name, "tensorrt", precision, None, missing=said, common=common))
        else:
            made = 'built for the comparison; export with ModelExport(engines=["tensorrt"]) to ship one'
            ways.append(
                Way(name, "tensorrt", precision, reference, make=name, missing=missing, unshippable=made, common=common)
            )
    return ways
