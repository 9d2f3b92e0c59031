"""Find 2:4 sparse weights in an ONNX file, which NVIDIA's sparse tensor cores run faster."""

from typing import Any

import numpy as np


def sparse_2_to_4(model: Any) -> tuple[list[str], list[str]]:
    """Find convolutions and matrix products with at least 2 zeros in every 4 weights along their input channels.

    Args:
        model: an ``onnx.ModelProto`` with its weights.

    Returns:
        Names of nodes whose weights are 2:4 sparse, and of those whose aren't.
    """
    from onnx import numpy_helper

    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    producer = {name: node for node in model.graph.node for name in node.output}
    sparse: list[str] = []
    dense: list[str] = []
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        name, transposed = (
            node.input[1],
            node.op_type == "Gemm" and any(a.name == "transB" and a.i for a in node.attribute),
        )
        while name in producer and producer[name].op_type in ("DequantizeLinear", "Cast", "Transpose"):
            transposed ^= producer[name].op_type == "Transpose"
            name = producer[name].input[0]
        if name not in constants:
            continue  # a product of activations
        weight = numpy_helper.to_array(constants[name])
        # Input channels: second axis of a convolution kernel or transposed matrix, otherwise the second to last axis.
        axis = 1 if node.op_type == "Conv" or transposed else weight.ndim - 2
        (sparse if _holds(np.moveaxis(weight, axis, -1)) else dense).append(node.name)
    return sparse, dense


def _holds(weight: np.ndarray) -> bool:
    """Whether each complete group of 4 along the last axis has at least 2 zeros."""
    channels = weight.shape[-1] // 4 * 4
    groups = weight[..., :channels].reshape(-1, 4)
    return channels > 0 and bool(((groups == 0).sum(1) >= 2).all())
