"""Generate temporary files for variants that are compared but not shipped."""

import logging
from dataclasses import replace
from pathlib import Path

from lightning_accel.benchmarking.variants import RuntimeVariant
from lightning_accel.core.optional import require


def prepared(variant: RuntimeVariant, folder: Path) -> RuntimeVariant:
    """Make what a variant runs; one that can't be made here says why.

    Args:
        variant: one with ``make``; others are returned as they are.
        folder: where the file goes.
    """
    if not variant.make or variant.missing:
        return variant
    assert variant.file is not None
    try:
        if variant.make == "dynamic int8":
            return replace(variant, file=dynamic_int8(variant.file, folder / "dynamic.onnx"))
        return replace(variant, file=_tensorrt(variant.file, variant.precision, folder))
    except Exception as error:  # quantizers and builders raise what they like; it becomes the row's reason
        return replace(variant, missing=f"it can't be made: {type(error).__name__}: {error}"[:500])


def dynamic_int8(source: Path, out: Path) -> Path:
    """Quantize a float32 ONNX file as ONNX Runtime does without data: weights now, activations as they come.

    Weights become uint8, the only form in which its convolutions run, and one that no CPU's kernels saturate with.

    Args:
        source: the float32 file.
        out: the file to write.

    Raises:
        MissingPackageError: ONNX Runtime isn't installed.
    """
    quantization = require("onnxruntime.quantization", "cpu", "Variant `onnxruntime dynamic int8`")
    import onnx

    model = onnx.load(source)
    del model.graph.value_info[:]  # shapes that the exporter left contradict those of the new nodes
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # advice to optimize the file first; the engine does so when it loads it
    try:
        quantization.quantize_dynamic(model, out, weight_type=quantization.QuantType.QUInt8)
    finally:
        root.setLevel(level)
    return out


def _tensorrt(source: Path, precision: str, folder: Path) -> Path:
    """Build an engine that the bundle doesn't hold; asked for only where there is a GPU."""
    from lightning_accel.engines.tensorrt.build import build_engine
    from lightning_accel.onnx.half_precision import lower_precision

    if precision == "fp16":
        lower_precision(source, folder / "fp16.onnx", "fp16")
        source = folder / "fp16.onnx"
    return build_engine(source, folder / f"{precision}.engine").path
