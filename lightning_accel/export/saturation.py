"""Whether int8 weights in a file can overflow in the kernels of a CPU: known from both, whatever a few samples happen to show."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

LARGEST = 64  # two products with uint8 stay within int16: 2 * 255 * 64 = 32,640


def saturates(file: Path, engine: str, cpu_flags: Mapping[str, bool | None]) -> str:
    """Why the int8 kernels of this CPU may compute something else than the file says; empty if they can't.

    Args:
        file: the ONNX file with Q/DQ nodes.
        engine: ``"onnxruntime"`` or ``"openvino"``; others have other kernels.
        cpu_flags: of :func:`~lightning_accel.benchmarking.environment.environment`; a CPU that doesn't tell isn't suspected.

    Source: AVX2's ``vpmaddubsw`` adds two products of uint8 and int8 in saturating int16; VNNI adds in int32.
    """
    if engine not in ("onnxruntime", "openvino") or not cpu_flags.get("avx2"):
        return ""
    if cpu_flags.get("avx512_vnni") or cpu_flags.get("avx_vnni"):
        return ""
    import onnx
    from onnx import numpy_helper

    graph = onnx.load(file).graph
    read = {node.input[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    weights = [
        numpy_helper.to_array(t) for t in graph.initializer if t.name in read and t.data_type == onnx.TensorProto.INT8
    ]
    largest = max((int(np.abs(weight.astype(np.int16)).max(initial=0)) for weight in weights), default=0)
    if largest <= LARGEST:
        return ""
    return (
        f"weights up to {largest} saturate in the int8 kernels of a CPU without VNNI; "
        "the targets `onnxruntime`, `openvino` and `portable` keep to 7 bits there"
    )
