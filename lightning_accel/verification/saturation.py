"""Whether int8 weights in a file can overflow in the kernels of a CPU, whatever a few samples happen to show."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.kernel_probe import probe_kernels
from lightning_accel.engines.registry import probed_engines
from lightning_accel.quantization.arithmetic.targets import Probe, saturation

_WEIGHTED = {
    "Conv": "convolution",
    "ConvTranspose": "transposed convolution",
    "Gemm": "linear",
    "MatMul": "linear",
    "MatMulInteger": "dynamic linear",
}
_LIMITS = (63, 64, 127, 128)  # of the weights that are probed: few, to be remembered


def saturates(
    file: Path, engine: str, cpu_flags: Mapping[str, bool | None] | None = None, *, probe: Probe = probe_kernels
) -> str:
    """Why the int8 kernels of a CPU may compute something else than the file says; empty if they can't.

    Args:
        file: the ONNX file with Q/DQ nodes.
        engine: that runs it.
        cpu_flags: of another CPU, as in :func:`~lightning_accel.benchmarking.environment.environment`, from which it is
            inferred; one that doesn't tell isn't suspected. ``None``: of this machine, where it is measured.
        probe: measures it.
    """
    if engine not in probed_engines():
        return ""
    if cpu_flags is not None:
        wide = not cpu_flags.get("avx2") or bool(cpu_flags.get("avx512_vnni") or cpu_flags.get("avx_vnni"))
        if not saturation(127, engine, wide):  # no weight would: the file needn't be read
            return ""
        return saturation(_weights_of(file)[0], engine, wide)
    largest, activations, forms = _weights_of(file)
    arithmetic = Arithmetic(activations, next(limit for limit in _LIMITS if largest <= limit))
    found = [probe(engine, form, arithmetic) for form in sorted(forms)]
    wrong = "; ".join(f"{one.form}: {one}" for one in found if not one.exact)
    if not wrong:
        return ""
    return f"{activations} activations and weights up to {largest} overflow in its int8 kernels on this CPU, as measured ({wrong})"


def _weights_of(file: Path) -> tuple[int, str, set[str]]:
    """The largest magnitude of an int8 weight, the type of activations, and the forms in which weights are read."""
    import onnx
    from onnx import TensorProto, numpy_helper

    graph = onnx.load(file).graph
    stored = {tensor.name: tensor for tensor in graph.initializer}
    weights: dict[str, np.ndarray] = {}  # by the names under which they are read: as integers, as floats, transposed
    activations, forms = "int8", set()
    for name, tensor in stored.items():
        if tensor.data_type == TensorProto.INT8 and tensor.dims:
            weights[name] = numpy_helper.to_array(tensor)
    for node in graph.node:
        read = [name for name in node.input if name in weights]
        if (
            node.op_type == "QuantizeLinear"
            and (len(node.input) < 3 or stored[node.input[2]].data_type == TensorProto.UINT8)
        ) or node.op_type == "DynamicQuantizeLinear":
            activations = "uint8"
        elif node.op_type in ("DequantizeLinear", "Transpose") and node.input[0] in weights:
            weights[node.output[0]] = weights[node.input[0]]
        elif node.op_type in _WEIGHTED and read:
            groups = next((attribute.i for attribute in node.attribute if attribute.name == "group"), 1)
            depthwise = groups != 1 and weights[read[0]].shape[1] == 1
            kind = "depthwise " if depthwise else "grouped " if groups != 1 and node.op_type == "Conv" else ""
            forms.add(kind + _WEIGHTED[node.op_type])
    largest = max((int(np.abs(array.astype(np.int16)).max(initial=0)) for array in weights.values()), default=0)
    return largest, activations, forms
