"""Equivalent command line of NVIDIA's own tool for a build."""

import shlex
from pathlib import Path

from lightning_accel.engines.tensorrt.library import EngineInfo


def equivalent_command(info: EngineInfo, onnx_path: str | Path) -> str:
    """``trtexec``, or ``tensorrt_rtx`` of TensorRT for RTX, with the arguments of a build.

    Args:
        info: record of the build.
        onnx_path: the ONNX file.
    """
    words = ["tensorrt_rtx" if info.library == "tensorrt_rtx" else "trtexec"]
    words += [f"--onnx={onnx_path}", f"--saveEngine={info.path}"]
    if info.library == "tensorrt" and int(info.version.split(".")[0]) < 11:
        words.append("--stronglyTyped")  # the only mode from version 11 on
    for place, option in enumerate(("minShapes", "optShapes", "maxShapes")):
        shapes = [f"{name}:{'x'.join(map(str, of_input[place]))}" for name, of_input in info.profile.items()]
        words += [f"--{option}={','.join(shapes)}"] if shapes else []
    options = info.options
    if options.get("workspace_bytes") is not None:
        words.append(f"--memPoolSize=workspace:{options['workspace_bytes']}B")
    if options.get("level") is not None:
        words.append(f"--builderOptimizationLevel={options['level']}")
    if options.get("timing_cache"):
        words.append(f"--timingCacheFile={options['timing_cache']}")
    if options.get("sparse"):
        words.append("--sparsity=enable")
    if options.get("compatibility"):
        name = {"ampere_plus": "ampere+", "same_compute_capability": "sameComputeCapability"}[options["compatibility"]]
        words.append(f"--hardwareCompatibilityLevel={name}")
    return " ".join(shlex.quote(word) for word in words)
