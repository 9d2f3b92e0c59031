"""Whether int8 weights in a file can overflow in the kernels of a CPU: known from both, whatever a few samples happen to show."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_accel.quantization.targets import saturation


def saturates(file: Path, engine: str, cpu_flags: Mapping[str, bool | None]) -> str:
    """Why the int8 kernels of this CPU may compute something else than the file says; empty if they can't.

    Args:
        file: the ONNX file with Q/DQ nodes.
        engine: that runs it.
        cpu_flags: of :func:`~lightning_accel.benchmarking.environment.environment`; a CPU that doesn't tell isn't suspected.
    """
    wide = not cpu_flags.get("avx2") or bool(cpu_flags.get("avx512_vnni") or cpu_flags.get("avx_vnni"))
    if not saturation(127, engine, wide):  # no weight would: the file needn't be read
        return ""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    read = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [
        numpy_helper.to_array(t) for t in graph.initializer if t.name in read and t.data_type == onnx.TensorProto.INT8
    ]
    largest = max((int(np.abs(weight.astype(np.int16)).max(initial=0)) for weight in weights), default=0)
    return saturation(largest, engine, wide)
