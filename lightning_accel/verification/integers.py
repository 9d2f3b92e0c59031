"""Compare integers, scales and zero points in a file with the trained ones bit for bit, and Q/DQ nodes with fake-quant (law 6)."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper

from lightning_accel.errors import VerificationError
from lightning_accel.quantization.arithmetic.fake_quant import fake_quantize
from lightning_accel.quantization.graph.convert import TrainedIntegers
from lightning_accel.verification.segments import run_as_written


def check_integers(path: str | Path, trained: Mapping[str, TrainedIntegers]) -> dict[str, int]:
    """Compare the stored integers of an ONNX file with the trained ones.

    Args:
        path: the file.
        trained: from :func:`~lightning_accel.onnx.export.export_onnx`.

    Returns:
        How many weights, integers, activations and Q/DQ nodes were compared.

    Raises:
        VerificationError: one differs; the message names it.
    """
    model = onnx.load(path)
    constants = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    constants |= {
        node.output[0]: numpy_helper.to_array(node.attribute[0].t)
        for node in model.graph.node
        if node.op_type == "Constant" and node.attribute[0].name == "value"
    }
    readers: dict[str, list[onnx.NodeProto]] = {}  # equal weights are stored once and read with several scales
    tables = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "Gather"}  # of embeddings
    for node in model.graph.node:
        if node.op_type == "DequantizeLinear":
            readers.setdefault(tables.get(node.input[0], node.input[0]), []).append(node)
    products: dict[str, list[onnx.NodeProto]] = {}
    for node in model.graph.node:
        if node.op_type == "MatMulInteger":
            products.setdefault(node.input[1], []).append(node)
    quantizers = [node for node in model.graph.node if node.op_type == "QuantizeLinear"]
    counts = {"weights": 0, "integers": 0, "activations": 0, "nodes": 0}
    for path_of, part in trained.items():
        for name, (integers, scale, axis) in part.weights.items():
            counts["weights"] += 1
            counts["integers"] += integers.numel()
            dynamic = _stored(name, integers.numpy(), constants, products)
            if dynamic is not None:
                _same(f"integers of `{name}`", constants[dynamic], integers.numpy())
                _check_products(name, products[dynamic], scale.numpy(), model, constants)
                continue
            stored = _stored(name, integers.numpy(), constants, readers)
            if stored is None:
                raise VerificationError(
                    f"The file must store the integers of `{name}`, but there are none (in `{path_of}`)."
                )
            _same(f"integers of `{name}`", constants[stored], integers.numpy())
            scales = [constants[node.input[1]].reshape(-1) for node in readers[stored]]
            if not any(_equal(found, scale.numpy()) for found in scales):
                _same(f"scales of `{name}`", scales[0], scale.numpy())
            if any(len(node.input) > 2 and np.any(constants[node.input[2]]) for node in readers[stored]):
                raise VerificationError(f"Zero points of `{name}` must be 0, but got others in the file.")
            along = [_axis_of(node) for node in readers[stored] if np.size(constants[node.input[1]]) > 1]
            if any(found % integers.ndim != axis % integers.ndim for found in along):
                raise VerificationError(
                    f"The scales of `{name}` must go along axis {axis}, but another one is in the file."
                )
    wanted = Counter((np.float32(s), z) for part in trained.values() for s, z in part.activations.values())
    found: Counter[tuple[np.float32, int]] = Counter()
    run: set[tuple[np.float32, int, bool]] = set()
    for node in quantizers:
        scale, zero_point = constants[node.input[1]], constants[node.input[2]] if len(node.input) > 2 else np.int8(0)
        if np.size(scale) != 1 or np.size(zero_point) != 1:
            raise VerificationError(f"QuantizeLinear `{node.name}` must have one scale, but it has {np.size(scale)}.")
        pair = (np.float32(np.ravel(scale)[0]), int(np.ravel(zero_point)[0]))
        (back,) = readers.get(node.output[0], [None])[:1]
        if back is None or not _reads(back, constants, pair):
            raise VerificationError(
                f"QuantizeLinear `{node.name}` must be followed by its own DequantizeLinear, but it isn't."
            )
        found[pair] += 1
        node_of = (*pair, np.asarray(zero_point).dtype == np.int8)
        if node_of not in run:  # nodes with the same scale and zero point are one function
            _check_node(*node_of)
            run.add(node_of)
        counts["nodes"] += 2
    if set(found) != set(wanted) or found - wanted:  # the exporter merges equal quantizers of copies of one tensor
        missing, extra = wanted - found, found - wanted
        raise VerificationError(
            "Scales and zero points of the file's QuantizeLinear nodes must be the trained ones, but "
            f"{sum(missing.values())} are missing ({list(missing)[:3]}) and {sum(extra.values())} are others ({list(extra)[:3]})."
        )
    counts["activations"] = sum(wanted.values())
    return counts


def _check_products(
    name: str,
    products: list[onnx.NodeProto],
    scale: np.ndarray,
    model: onnx.ModelProto,
    constants: Mapping[str, np.ndarray],
) -> None:
    """Check a dynamically quantized layer, once for each of its calls: the quantization of its input, the scale of its sums."""
    quantizers = {n.output[0]: n for n in model.graph.node if n.op_type == "DynamicQuantizeLinear"}
    for product in products:
        source = quantizers.get(product.input[0])
        if source is None or list(product.input[2:]) != [source.output[2]]:
            raise VerificationError(
                f"MatMulInteger of `{name}` must read what DynamicQuantizeLinear makes, and a weight with zero point 0, but doesn't."
            )
        factors = [
            constants[other]
            for node in model.graph.node
            if node.op_type == "Mul" and source.output[1] in node.input
            for other in node.input
            if other in constants
        ]
        if not any(_equal(found, scale) for found in factors):
            _same(f"scales of `{name}`", factors[0] if factors else np.zeros(0), scale)


def _stored(
    name: str, integers: np.ndarray, constants: Mapping[str, np.ndarray], readers: Mapping[str, list[onnx.NodeProto]]
) -> str | None:
    """Name under which a weight is stored: its own, or that of an equal one, since the exporter stores equal tensors once."""
    own = [key for key in constants if key in readers and (key == name or key.endswith(f".{name}"))]
    equal = (
        key
        for key in readers
        if key in constants and constants[key].dtype == np.int8 and np.array_equal(constants[key], integers)
    )
    return own[0] if own else next(equal, None)


def _axis_of(node: onnx.NodeProto) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 1)


def _reads(node: onnx.NodeProto, constants: Mapping[str, np.ndarray], pair: tuple[np.float32, int]) -> bool:
    """Whether a DequantizeLinear has this scale and zero point."""
    zero_point = constants[node.input[2]] if len(node.input) > 2 else np.zeros(())
    return np.array_equal(np.ravel(constants[node.input[1]]), [pair[0]]) and np.array_equal(
        np.ravel(zero_point), [pair[1]]
    )


def _equal(stored: np.ndarray, trained: np.ndarray) -> bool:
    return stored.shape == trained.shape and stored.tobytes() == trained.astype(stored.dtype).tobytes()


def _same(what: str, stored: np.ndarray, trained: np.ndarray) -> None:
    if not _equal(stored, trained):
        differ = int(np.sum(stored != trained)) if stored.shape == trained.shape else "all"
        raise VerificationError(
            f"The {what} must be the trained ones bit for bit, but {differ} of {trained.size} differ."
        )


def _check_node(scale: np.float32, zero_point: int, signed: bool) -> None:
    """Run QuantizeLinear, DequantizeLinear and fake-quant on values that lie on, beside and between steps."""
    low, high = (-128, 127) if signed else (0, 255)
    steps = np.arange(low - zero_point - 3, high - zero_point + 4, dtype=np.float32)
    spread = np.random.default_rng(0).uniform(steps[0], steps[-1], 4096).astype(np.float32)
    edges = (steps + np.float32(0.5)) * scale
    values = np.concatenate(
        [
            steps * scale,
            edges,
            np.nextafter(edges, np.float32(np.inf)),
            np.nextafter(edges, np.float32(-np.inf)),
            spread * scale,
        ]
    )
    integer = TensorProto.INT8 if signed else TensorProto.UINT8
    graph = helper.make_graph(
        [
            helper.make_node("QuantizeLinear", ["x", "scale", "zero_point"], ["q"]),
            helper.make_node("DequantizeLinear", ["q", "scale", "zero_point"], ["y"]),
        ],
        "node",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [
            helper.make_tensor("scale", TensorProto.FLOAT, [], [scale]),
            helper.make_tensor("zero_point", integer, [], [zero_point]),
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    (got,) = run_as_written(model, ["y"], {"x": values})
    want = fake_quantize(torch.from_numpy(values), torch.tensor(scale), zero_point, low, high).numpy()
    if not np.array_equal(got, want):
        raise VerificationError(
            f"QuantizeLinear with scale {scale} and zero point {zero_point} must equal fake-quant on the same input, but "
            f"{int(np.sum(got != want))} of {len(values)} values differ."
        )
