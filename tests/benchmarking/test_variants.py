from pathlib import Path

import pytest

from lightning_accel.benchmarking.variants import BASELINE, variants_of
from lightning_accel.engines.tensorrt.cuda import has_gpu

FOLDER = Path("bundle")


def line(engine, precision, file="model.onnx", **kwargs):
    return {"engine": engine, "file": file, "precision": precision, **kwargs}


def named(precision, *lines, files=("model.onnx", "reference.onnx")):
    engines = {one["engine"]: one for one in lines}
    variants = variants_of(
        FOLDER, {"engines": engines, "model": "model.onnx", "precision": precision, "files": dict.fromkeys(files)}
    )
    assert len({variant.name for variant in variants}) == len(variants)
    return {variant.name: variant for variant in variants}


@pytest.mark.parametrize(
    ("precision", "common"),
    [
        ("fp32", ["fp32", "int8"]),
        ("int8", ["fp32", "int8"]),
        ("fp16", ["fp32", "fp16", "int8"]),
    ],
)
def test_the_default_variants_are_those_that_matter(precision, common):
    variants = named(precision, line("onnxruntime", precision))
    of_engines = [f"{engine} {one}" for engine in ("onnxruntime", "openvino") for one in common]
    assert [name for name, variant in variants.items() if variant.common] == [
        "pytorch eager",
        *of_engines,
        "tensorrt int8",
    ]


def test_which_file_a_variant_runs():
    variants = named("int8", line("onnxruntime", "int8"), line("pytorch", "int8", "model.pt2"))
    assert variants[BASELINE].file == variants["openvino fp32"].file == FOLDER / "reference.onnx"
    assert variants["onnxruntime int8"].file == variants["openvino int8"].file == FOLDER / "model.onnx"
    assert variants["pytorch inference_mode"].file == FOLDER / "model.pt2"
    assert variants["onnxruntime dynamic int8"].file == FOLDER / "reference.onnx"  # which it is made of
    assert variants["onnxruntime cuda int8"].options == {"providers": ["CUDAExecutionProvider"]}
    assert variants["onnxruntime tensorrt fp32"].options == {"providers": ["TensorrtExecutionProvider"]}
    plain = named("fp32", line("onnxruntime", "fp32"), files=("model.onnx",))
    assert plain[BASELINE].file == FOLDER / "model.onnx"
    assert plain["onnxruntime int8"].file is None
    assert "lightning-accel quantize" in plain["onnxruntime int8"].missing


def test_what_a_bundle_can_load_can_ship():
    variants = named("int8", line("onnxruntime", "int8"), line("pytorch", "int8", "model.pt2"))
    loads = {name for name, variant in variants.items() if not variant.unshippable and variant.file is not None}
    assert loads == {
        "pytorch inference_mode",
        "onnxruntime fp32",
        "onnxruntime int8",
        "openvino fp32",
        "openvino int8",
    }


@pytest.mark.skipif(has_gpu(), reason="tells what is known without a GPU")
def test_engines_of_tensorrt_in_the_bundle_and_built_for_the_comparison():
    rival = line("tensorrt", "fp16", "engines/fp16.engine")
    variants = named("int8", line("tensorrt", "int8+fp16", "engines/model.engine", alternative=rival))
    assert variants["tensorrt int8"].file == FOLDER / "engines" / "model.engine"
    assert variants["tensorrt int8"].precision == "int8+fp16"
    assert variants["tensorrt int8"].unshippable == ""
    assert variants["tensorrt int8"].common
    assert variants["tensorrt fp16"].file == FOLDER / "engines" / "fp16.engine"
    assert variants["tensorrt fp16"].unshippable == "the manifest names the faster of TensorRT's engines"
    assert variants["tensorrt fp32"].make == "tensorrt fp32"
    assert variants["tensorrt fp32"].unshippable.startswith("built for the comparison")
    for precision in ("fp32", "fp16", "int8"):
        assert (
            variants[f"tensorrt {precision}"].missing == "needs an NVIDIA GPU and its driver, and this machine has none"
        )


def test_bf16_has_no_kernels_on_a_cpu():
    variants = named("bf16", line("tensorrt", "bf16", "engines/model.engine"))
    assert variants["onnxruntime bf16"].missing == "onnxruntime has no bf16 kernels on a CPU"
    assert variants["tensorrt bf16"].common
    assert not variants["tensorrt int8"].common
