"""Generate temporary files for variants that are compared but not shipped."""

import logging
from dataclasses import replace
from pathlib import Path

from lightning_accel.benchmarking.variants import RuntimeVariant
from lightning_accel.core.optional import require


def prepared(variant: RuntimeVariant, folder: Path) -> RuntimeVariant:
    """Generate the file of a variant; on failure return the variant with the reason in ``missing``.

    Args:
        variant: variants without ``make`` are returned unchanged.
        folder: destination of the file.
    """
    if not variant.make or variant.missing:
        return variant
    assert variant.file is not None
    try:
        if variant.make == "dynamic int8":
            return replace(variant, file=dynamic_int8(variant.file, folder / "dynamic.onnx"))
        return replace(variant, file=_tensorrt(variant.file, variant.precision, folder))
    except Exception as error:  # quantizers and builders raise unrelated types
        return replace(variant, missing=f"generating it failed: {type(error).__name__}: {error}"[:500])


def dynamic_int8(source: Path, out: Path) -> Path:
    """Quantize a float32 ONNX file dynamically with ONNX Runtime: weights in the file, activations at run time.

    Weights become uint8, the only type that its dynamic convolutions support, and which doesn't saturate on any CPU.

    Args:
        source: the float32 file.
        out: the file to write.

    Raises:
        MissingPackageError: ONNX Runtime isn't installed.
    """
    quantization = require("onnxruntime.quantization", "runtime", "Variant `onnxruntime dynamic int8`")
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
    """Build an engine that isn't part of the bundle; called only on a machine with a GPU."""
    from lightning_accel.engines.tensorrt.build import build_engine
    from lightning_accel.onnx.half_precision import lower_precision

    if precision == "fp16":
        lower_precision(source, folder / "fp16.onnx", "fp16")
        source = folder / "fp16.onnx"
    return build_engine(source, folder / f"{precision}.engine").path
