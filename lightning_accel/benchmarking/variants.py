"""List the runtime variants of a bundle, with the reason why a variant can't run or ship."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_accel.engines.registry import EngineSpec, all_engines, engine_named

BASELINE = "onnxruntime fp32"
REFERENCE = "reference.onnx"

_NO_INT8 = (
    "the bundle holds no int8 file: train with QuantizationAwareTraining, or make one without training: "
    "lightning-accel quantize --ckpt-path FILE"
)
_NO_PROGRAM = 'the bundle holds no `model.pt2`: export with ModelExport(engines=[..., "pytorch"])'
_TORCH_MODES = {  # variant -> mode, and why load_runner can't run it
    "pytorch eager": ("eager", "`load_runner` runs the program in inference_mode"),
    "pytorch inference_mode": ("inference_mode", ""),
    "pytorch channels_last": ("channels_last", "`load_runner` runs the program as it was captured"),
    "pytorch compile": ("compile", "compiled in each process with a C++ compiler"),
    "pytorch bf16 autocast": ("bf16", "`load_runner` runs the program as it was captured"),
    "pytorch fp16 autocast": ("fp16", "`load_runner` runs the program as it was captured"),
    "torchao dynamic int8": (
        "torchao dynamic",
        "generated from the program in memory; the bundle contains no file of it",
    ),
    "torchao weight-only int8": (
        "torchao weights",
        "generated from the program in memory; the bundle contains no file of it",
    ),
}


@dataclass(frozen=True)
class RuntimeVariant:
    """One variant: an engine, a precision, a file and how it is called.

    Args:
        name: engine and precision, e.g. ``"onnxruntime int8"``.
        engine: name of the engine, as in :func:`~lightning_accel.engines.base.load_runner`.
        precision: of the file: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``, ``"int8+fp16"``.
        file: file to run; ``None`` if there is none.
        mode: execution mode of PyTorch; empty for the other engines.
        make: conversion of ``file`` before the run: ``"dynamic int8"``, ``"tensorrt fp32"`` or ``"tensorrt fp16"``.
        options: further arguments of the engine's runner.
        missing: reason why it can't run here, known before the run; otherwise empty.
        unshippable: reason why ``load_runner`` can't run it from the bundle; empty if it can.
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


def variants_of(folder: Path, manifest: Mapping[str, Any]) -> list[RuntimeVariant]:
    """List all variants for the files of a bundle; some may turn out not to run here.

    Args:
        folder: the bundle.
        manifest: its ``engines``, ``files``, ``model`` and ``precision`` are read.
    """
    precision, model = str(manifest["precision"]), folder / manifest["model"]
    reference = folder / REFERENCE if REFERENCE in manifest["files"] else model
    variants = _of_pytorch(folder, manifest)
    engines = all_engines()
    for spec in (spec for spec in engines if spec.source == "onnx"):
        engine, common = spec.name, spec.common or spec.name in manifest["engines"]
        variants.append(RuntimeVariant(f"{engine} fp32", engine, "fp32", reference, common=common))
        for other in dict.fromkeys([*([precision] if precision != "fp32" else []), "int8"]):
            file = model if other == precision else None
            missing = "" if file is not None else _NO_INT8
            if other not in spec.precisions:
                missing = f"{engine} has no {other} kernels on a CPU"
            variants.append(RuntimeVariant(f"{engine} {other}", engine, other, file, missing=missing, common=common))
        if engine == "onnxruntime":
            made = "regenerated from the float32 file for every benchmark; the bundle contains no verified copy"
            variants.append(
                RuntimeVariant(
                    f"{engine} dynamic int8", engine, "int8", reference, make="dynamic int8", unshippable=made
                )
            )
            variants += _of_providers(reference, model, precision)
    for spec in (spec for spec in engines if spec.source == "built" and spec.name != "tensorrt"):
        variants += _of_built(spec, folder, manifest)
    variants += _of_tensorrt(folder, manifest, reference)
    return [_failed(variant, manifest.get("failed", {}).get(variant.engine)) for variant in variants]


def _failed(variant: RuntimeVariant, failure: Mapping[str, str] | None) -> RuntimeVariant:
    """A variant of an engine that failed when the bundle was written is measured, and never ships."""
    if failure is None:
        return variant
    return replace(variant, unshippable=f"{variant.engine} failed when the bundle was written: {failure['reason']}")


def _of_pytorch(folder: Path, manifest: Mapping[str, Any]) -> list[RuntimeVariant]:
    line = manifest["engines"].get("pytorch")
    file = None if line is None else folder / line["file"]
    precision = str(manifest["precision"])  # the program holds fake-quantization: int8 is computed in float
    variants = []
    for name, (mode, unshippable) in _TORCH_MODES.items():
        common = name == "pytorch eager" or (name == "pytorch inference_mode" and file is not None)
        missing = "" if file is not None else _NO_PROGRAM
        variants.append(
            RuntimeVariant(
                name, "pytorch", precision, file, mode, missing=missing, unshippable=unshippable, common=common
            )
        )
    return variants


def _of_built(spec: EngineSpec, folder: Path, manifest: Mapping[str, Any]) -> list[RuntimeVariant]:
    """The engine file of a bundle that was exported for the engine; nothing for other bundles."""
    line = manifest["engines"].get(spec.name)
    if line is None:
        return []
    precision, missing = str(line["precision"]), spec.why_unavailable()
    name = f"{spec.name} {precision.partition('+')[0]}"
    return [RuntimeVariant(name, spec.name, precision, folder / line["file"], missing=missing, common=True)]


def _of_providers(reference: Path, model: Path, precision: str) -> list[RuntimeVariant]:
    variants = []
    files = {"fp32": reference, **({precision: model} if precision != "fp32" else {})}
    for provider in ("CUDA", "TensorRT"):
        for of, file in files.items():
            chosen = {"providers": [f"{'Tensorrt' if provider == 'TensorRT' else provider}ExecutionProvider"]}
            says = "`load_runner` runs the bundle's ONNX files on the CPU; pass it `providers=` to run them so"
            name = f"onnxruntime {provider.lower()} {of}"
            variants.append(RuntimeVariant(name, "onnxruntime", of, file, options=chosen, unshippable=says))
    return variants


def _of_tensorrt(folder: Path, manifest: Mapping[str, Any], reference: Path) -> list[RuntimeVariant]:
    line = manifest["engines"].get("tensorrt", {})
    lines = [one for one in (line, line.get("alternative")) if one and one.get("file")]
    shipped = {one["precision"].partition("+")[0]: one for one in lines}
    variants = []
    for precision in dict.fromkeys(["fp32", "fp16", "int8", *shipped]):
        one = shipped.get(precision)
        name = f"tensorrt {precision}"
        missing = engine_named("tensorrt").why_unavailable()
        common = precision == (lines[0]["precision"].partition("+")[0] if lines else "int8")
        if one is not None:
            full, file = one["precision"], folder / one["file"]
            own = "" if one is lines[0] else "the manifest names the faster of TensorRT's engines"
            variants.append(
                RuntimeVariant(name, "tensorrt", full, file, missing=missing, unshippable=own, common=common)
            )
        elif precision == "int8":
            said = missing or 'no int8 engine in the bundle: export with ModelExport(engines=["tensorrt"]) after QAT'
            variants.append(RuntimeVariant(name, "tensorrt", precision, None, missing=said, common=common))
        else:
            made = 'built for the comparison; export with ModelExport(engines=["tensorrt"]) to ship one'
            variants.append(
                RuntimeVariant(
                    name, "tensorrt", precision, reference, make=name, missing=missing, unshippable=made, common=common
                )
            )
    return variants
