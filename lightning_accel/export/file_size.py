"""Say when an int8 file isn't smaller than the float32 file of the same network, and why."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper

_INTEGERS = (TensorProto.INT8, TensorProto.UINT8)
_SHOWN = 3


def size_of(path: Path) -> int:
    """Bytes of an ONNX file and of the weights beside it."""
    beside = path.with_name(f"{path.name}.data")
    return path.stat().st_size + (beside.stat().st_size if beside.is_file() else 0)


def why_not_smaller(int8: Path, fp32: Path) -> str:
    """One sentence if the int8 file has at least as many bytes as the float32 file; otherwise empty.

    Args:
        int8: a file with stored integers.
        fp32: the same network without quantization.
    """
    small, large = size_of(int8), size_of(fp32)
    if small < large:
        return ""
    tensors = onnx.load(int8, load_external_data=False).graph.initializer
    sizes = {t.name: int(np.prod(t.dims)) * helper.tensor_dtype_to_np_dtype(t.data_type).itemsize for t in tensors}
    integers = sum(sizes[t.name] for t in tensors if t.data_type in _INTEGERS)
    floats = {t.name: sizes[t.name] for t in tensors if t.data_type == TensorProto.FLOAT}
    rest = small - integers - sum(floats.values())
    parts = {
        "its nodes and names, which quantization adds to": rest,
        "weights that stay in float32"
        + "".join(f", `{name}`" for name in sorted(floats, key=lambda name: -floats[name])[:_SHOWN]): sum(
            floats.values()
        ),
        "integers": integers,
    }
    listed = "; ".join(f"{size:,} of {what}" for what, size in sorted(parts.items(), key=lambda part: -part[1]))
    return f"The int8 file isn't smaller: {small:,} bytes beside {large:,} in float32. Of them are {listed}."
