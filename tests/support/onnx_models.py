"""Small ONNX files with known answers, written with onnx.helper."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


def save(path: Path, nodes, inputs, outputs, constants=()) -> Path:
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(*value) for value in inputs],
        [helper.make_tensor_value_info(*value) for value in outputs],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path)
    return path


def linear(path: Path, batch="n") -> Path:
    """y = x @ [[1, 0], [0, 2], [3, 0]] with x of shape (n, 3)."""
    weight = np.array([[1, 0], [0, 2], [3, 0]], np.float32)
    return save(
        path,
        [helper.make_node("MatMul", ["x", "w"], ["y"], name="matmul")],
        [("x", TensorProto.FLOAT, [batch, 3])],
        [("y", TensorProto.FLOAT, [batch, 2])],
        [("w", weight)],
    )


def gather(path: Path) -> Path:
    """Two outputs of two inputs: table[ids] with table = 0, 10, 20, 30, and the negated mask."""
    return save(
        path,
        [helper.make_node("Gather", ["table", "ids"], ["values"]), helper.make_node("Not", ["mask"], ["inverse"])],
        [("ids", TensorProto.INT64, ["n"]), ("mask", TensorProto.BOOL, ["n"])],
        [("values", TensorProto.FLOAT, ["n"]), ("inverse", TensorProto.BOOL, ["n"])],
        [("table", np.array([0, 10, 20, 30], np.float32))],
    )


def conv(path: Path, dtype=np.float32, shape=("n", 3, 8, 8)) -> Path:
    weight = np.random.default_rng(0).normal(size=(4, 3, 3, 3)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    return save(
        path,
        [helper.make_node("Conv", ["x", "w"], ["y"], name="conv0")],
        [("x", kind, list(shape))],
        [("y", kind, [shape[0], 4, None, None])],
        [("w", weight)],
    )


def quantized_linear(path: Path, zero_point: int = 0) -> Path:
    """x (n, 64) through int8 Q/DQ, times int8 weights (64, 8) through DQ; scales 1/16 and 1/32."""
    weight = np.random.default_rng(1).integers(-127, 128, size=(64, 8)).astype(np.int8)
    return save(
        path,
        [
            helper.make_node("QuantizeLinear", ["x", "xs", "zp"], ["xq"], name="x_quantize"),
            helper.make_node("DequantizeLinear", ["xq", "xs", "zp"], ["xd"], name="x_dequantize"),
            helper.make_node("DequantizeLinear", ["wq", "ws", "zero"], ["wd"], name="w_dequantize"),
            helper.make_node("MatMul", ["xd", "wd"], ["y"], name="matmul"),
        ],
        [("x", TensorProto.FLOAT, ["n", 64])],
        [("y", TensorProto.FLOAT, ["n", 8])],
        [
            ("xs", np.float32(1 / 16)),
            ("zp", np.int8(zero_point)),
            ("zero", np.int8(0)),
            ("ws", np.float32(1 / 32)),
            ("wq", weight),
        ],
    )


def quantized_reference(x: np.ndarray) -> np.ndarray:
    weight = np.random.default_rng(1).integers(-127, 128, size=(64, 8)).astype(np.int64)
    integers = np.clip(np.rint(x.astype(np.float64) * 16), -128, 127).astype(np.int64)
    return (integers @ weight / (16 * 32)).astype(np.float32)  # powers of two: exact in float32
