"""Lower an ONNX file to half precision with explicit casts, so that every engine computes what the file says (law 7).

Inputs and outputs stay float32. Values that overflow or vanish in half precision are found by running the file on samples,
and their nodes stay in float32; Q/DQ pairs keep their integers. No torch needed.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path
from typing import cast

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from lightning_accel.core.arguments import checked
from lightning_accel.core.optional import require
from lightning_accel.errors import InvalidArgumentError, MissingFileError
from lightning_accel.onnx import file as onnx_file

FLOAT, HALVES = TensorProto.FLOAT, {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
# Largest value, smallest normal one, relative rounding error.
_LIMITS = {"fp16": (65504.0, 2.0**-14, 2.0**-11), "bf16": (3.3e38, 2.0**-126, 2.0**-8)}
BF16_OPSET = 22
_HEADROOM = 4.0  # samples show a part of what will come
# Sums of many terms, and functions that lose all digits near a pole: kept in float32, as autocast does in training.
_SENSITIVE = {
    "ReduceSum",
    "ReduceSumSquare",
    "ReduceL2",
    "ReduceLogSumExp",
    "CumSum",
    "Exp",
    "Log",
    "Pow",
    "Reciprocal",
}
_NO_BF16 = {"HardSwish", "Mish", "ConvTranspose"}  # refused by TensorRT for RTX 1.7 in bf16; built in float32
_INT8_NODES = {"QuantizeLinear", "DequantizeLinear"}
_SCALES_STAY = {"Resize": (1, 2), "Upsample": (1,)}  # operands whose type is always float32


@dataclass(frozen=True)
class PrecisionReport:
    """Result of lowering a file.

    Args:
        precision: ``"fp16"`` or ``"bf16"``.
        lowered: nodes that compute in it.
        kept: nodes that stay in float32, and why.
        casts: casts that were written.
        bytes: size of the file, with weights beside it.
    """

    precision: str
    lowered: int
    kept: dict[str, str] = field(default_factory=dict)
    casts: int = 0
    bytes: int = 0


@checked()
def lower_precision(
    path: str | Path,
    out: str | Path,
    precision: str,
    *,
    samples: Mapping[str, np.ndarray] | Sequence[Mapping[str, np.ndarray]] | None = None,
    keep: Sequence[str] = (),
    largest: int = onnx_file.LARGEST,
) -> PrecisionReport:
    """Lower a float32 file, or the floating-point part of a Q/DQ file, to half precision.

    Args:
        path: the ONNX file.
        out: file to write.
        precision: ``"fp16"`` or ``"bf16"``.
        samples: inputs of a call, or of several, on which ranges are found; without them only weights are looked at.
        keep: globs of nodes, by name or operator, that stay in float32.
        largest: as in :func:`~lightning_accel.onnx.export.export_onnx`.

    Returns:
        The nodes that were lowered, and those that were kept with the reason.

    Raises:
        InvalidArgumentError: another precision, a glob that matches nothing, or a graph with control flow or several domains.

    Example:
        >>> report = lower_precision("model.onnx", "model.fp16.onnx", "fp16", samples={"x": images})  # doctest: +SKIP
        >>> report.kept  # doctest: +SKIP
        {'node_exp': 'Exp is kept in float32'}
    """
    if precision not in HALVES:
        raise InvalidArgumentError(f"Argument `precision` must be one of {sorted(HALVES)}, but got {precision!r}.")
    if not Path(path).is_file():
        raise MissingFileError(f"Argument `path` must be an ONNX file, but got {path}: nothing is there.")
    if Path(out).exists() and Path(path).samefile(out):
        raise InvalidArgumentError(f"Argument `out` must be another file than `path`, but got {out} for both.")
    model = onnx.load(path)
    calls = [] if samples is None else [samples] if isinstance(samples, Mapping) else list(samples)
    missing = [one.name for one in model.graph.input if any(one.name not in call for call in calls)]
    if missing:
        raise InvalidArgumentError(f"Argument `samples` must hold an array for each input, but got none for {missing}.")
    _check_graph(model)
    model = onnx.shape_inference.infer_shapes(model, strict_mode=True, data_prop=True)
    standard = next(entry for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
    if precision == "bf16" and standard.version < BF16_OPSET:
        raise InvalidArgumentError(
            f"Argument `path` must be a file of opset {BF16_OPSET} or newer for bf16, which convolutions don't have before, but got "
            f"{standard.version}. Export it with `export_onnx(..., opset={BF16_OPSET})`."
        )
    kept = _kept(model, precision, calls, keep)
    casts = _Lowering(model, HALVES[precision], kept).run()
    _drop_unread(model)
    if any(node.op_type in _INT8_NODES and node.name not in kept for node in model.graph.node):
        # Opset 19 lets scales be half precision, and changes nothing else that a file of 18 says.
        standard.version = max(standard.version, 19)
    onnx_file.write(model, Path(out), largest)
    beside = Path(f"{out}.data")
    size = Path(out).stat().st_size + (beside.stat().st_size if beside.is_file() else 0)
    return PrecisionReport(precision, len(model.graph.node) - casts - len(kept), kept, casts, size)


def _check_graph(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        if any(a.HasField("g") or a.graphs for a in node.attribute):
            raise InvalidArgumentError(
                f"Argument `path` must be a file without control flow, but got {node.op_type} `{node.name}`."
            )
        if node.domain not in ("", "ai.onnx"):
            raise InvalidArgumentError(
                f"Argument `path` must hold only operators of ONNX itself, but got {node.domain}.{node.op_type} `{node.name}`."
            )


def _kept(
    model: onnx.ModelProto, precision: str, calls: Sequence[Mapping[str, np.ndarray]], keep: Sequence[str]
) -> dict[str, str]:
    """Names of nodes that stay in float32, and why."""
    largest, smallest, rounding = _LIMITS[precision]
    constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer if t.data_type == FLOAT}
    kinds = element_types(model)
    ranges = _ranges(model, calls, kinds) if calls else {}
    kept: dict[str, str] = {}
    matched: set[str] = set()
    for index, node in enumerate(model.graph.node):
        node.name = node.name or f"{node.op_type}_{index}"
        globs = [g for g in keep if fnmatchcase(node.name, g) or fnmatchcase(node.op_type, g)]
        matched.update(globs)
        if not any(kinds.get(name) == FLOAT for name in (*node.input, *node.output)):
            continue
        if globs:
            kept[node.name] = f"kept by {globs[0]!r}"
        elif node.op_type in _SENSITIVE:
            kept[node.name] = f"{node.op_type} is kept in float32"
        elif precision == "bf16" and node.op_type in _NO_BF16:
            kept[node.name] = f"TensorRT has no {node.op_type} in bf16"
        elif node.op_type in _INT8_NODES:
            scale = np.abs(constants.get(node.input[1], np.ones(1))).astype(np.float64)
            half = _rounded(scale, precision)
            if not np.all(np.abs(half - scale) <= rounding * scale):
                kept[node.name] = f"a scale of {scale.min():.1e} isn't a normal number in {precision}"
        else:
            for name in (*node.input, *node.output):
                high = ranges.get(name, 0.0)
                if name in constants and constants[name].size:
                    finite = np.abs(constants[name][np.isfinite(constants[name])])
                    high = float(finite.max(initial=0.0))
                    if 0.0 < high < smallest:
                        kept[node.name] = f"all of `{name}` vanishes in {precision}: at most {high:.1e}"
                room = 1.0 if name in constants else _HEADROOM
                if high * room > largest and not _is_mask(name, constants, high):
                    kept[node.name] = f"`{name}` reaches {high:.1e}, too near the end of {precision}, {largest:.1e}"
    if unknown := [g for g in keep if g not in matched]:
        raise InvalidArgumentError(f"Argument `keep` must match a node, but got {unknown}, which match none.")
    _widen(model, kept)
    return kept


def _is_mask(name: str, constants: Mapping[str, np.ndarray], high: float) -> bool:
    """Whether a constant is the lowest float32, which stands for minus infinity and may become it."""
    return name in constants and high >= float(np.finfo(np.float32).max) * 0.99


def _widen(model: onnx.ModelProto, kept: dict[str, str]) -> None:
    """A pair of quantize and dequantize shares its scale: both are kept, or neither."""
    nodes = [node for node in model.graph.node if node.op_type in _INT8_NODES]
    for node in nodes:
        if node.name in kept:
            for other in nodes:
                if other.input[1] == node.input[1]:
                    kept.setdefault(other.name, kept[node.name])


def _rounded(values: np.ndarray, precision: str) -> np.ndarray:
    return cast(
        np.ndarray, numpy_helper.to_array(_stored("x", values.astype(np.float32), HALVES[precision])).astype(np.float64)
    )


def _stored(name: str, array: np.ndarray, kind: int) -> TensorProto:
    """A float32 array as a half precision tensor; values beyond its range become infinities."""
    with np.errstate(over="ignore"):
        return numpy_helper.from_array(array.astype(helper.tensor_dtype_to_np_dtype(kind)), name)


def element_types(model: onnx.ModelProto) -> dict[str, int]:
    """ONNX element type of each tensor, by name.

    Raises:
        InvalidArgumentError: shape inference left one unknown.
    """
    graph = model.graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*graph.input, *graph.output, *graph.value_info)}
    kinds |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        for name in node.output:
            if name and not kinds.get(name):
                raise InvalidArgumentError(
                    f"Argument `path` must be a file whose types ONNX can infer, but not that of `{name}`."
                )
    return kinds


def _ranges(
    model: onnx.ModelProto, calls: Sequence[Mapping[str, np.ndarray]], kinds: Mapping[str, int]
) -> dict[str, float]:
    """Largest finite magnitude of each float32 tensor in these calls, run in float32 as written."""
    ort = require("onnxruntime", "cpu", "Precision (ranges)")
    names = list(dict.fromkeys(n for node in model.graph.node for n in node.output if kinds.get(n) == FLOAT))
    probe = onnx.ModelProto()
    probe.CopyFrom(model)
    shown = {value.name for value in probe.graph.output}
    probe.graph.output.extend(helper.make_tensor_value_info(n, FLOAT, None) for n in names if n not in shown)
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(probe.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: dict[str, float] = {}
    for call in calls:
        feeds = {value.name: call[value.name] for value in model.graph.input}
        arrays = dict(zip(names, session.run(names, feeds), strict=True))
        arrays |= {name: array for name, array in feeds.items() if array.dtype == np.float32}
        for name, array in arrays.items():
            largest = float(np.abs(array[np.isfinite(array)]).max(initial=0.0))
            found[name] = max(found.get(name, 0.0), largest)
    return found


class _Lowering:
    """Inserts casts where a node needs another type than the tensor has; each tensor is cast once."""

    def __init__(self, model: onnx.ModelProto, half: int, kept: Mapping[str, str]) -> None:
        self.graph, self.half, self.kept = model.graph, half, kept
        self.kinds = element_types(model)
        self.constants = {t.name: t for t in model.graph.initializer if t.data_type == FLOAT}
        self.home = {value.name: FLOAT for value in model.graph.input if self.kinds[value.name] == FLOAT}
        self.made: dict[tuple[str, int], str] = {}
        self.casts = 0

    def run(self) -> int:
        """Lower all nodes but the kept ones; returns the number of casts."""
        nodes, outputs = list(self.graph.node), {value.name for value in self.graph.output}
        del self.graph.node[:]
        for node in nodes:
            wanted = FLOAT if node.name in self.kept else self.half
            stay = _SCALES_STAY.get(node.op_type, ())
            for i, name in enumerate(node.input):
                if name in self.home or name in self.constants:
                    node.input[i] = self._as(name, FLOAT if i in stay else wanted)
            _retype(node, wanted)
            lowered = [(i, name) for i, name in enumerate(node.output) if self.kinds.get(name) == FLOAT]
            self.home.update((name, wanted) for _, name in lowered)
            shown = [(i, name) for i, name in lowered if name in outputs and wanted != FLOAT]
            for i, name in shown:  # readers inside take the half, the world outside a float
                node.output[i] = self.made[name, wanted] = f"{name}_half"
                self.home[name] = FLOAT
            self.graph.node.append(node)
            for _, name in shown:
                self._cast(f"{name}_half", name, FLOAT)
        del self.graph.value_info[:]
        return self.casts

    def _as(self, name: str, kind: int) -> str:
        """The tensor in another type: a stored constant, or a cast."""
        if self.home.get(name, FLOAT) == kind:
            return name
        if (name, kind) not in self.made:
            made = f"{name}_{TensorProto.DataType.Name(kind).lower()}"
            self.made[name, kind] = made
            if name in self.constants:
                array = numpy_helper.to_array(self.constants[name])
                self.graph.initializer.append(_stored(made, array, kind))
            else:
                self._cast(name, made, kind)
        return self.made[name, kind]

    def _cast(self, name: str, made: str, kind: int) -> None:
        self.graph.node.append(helper.make_node("Cast", [name], [made], name=f"cast_{made}", to=kind))
        self.casts += 1


def _retype(node: onnx.NodeProto, wanted: int) -> None:
    """Update types stored in attributes."""
    if wanted == FLOAT:
        return
    for attribute in node.attribute:
        if attribute.name in ("to", "dtype", "stash_type", "output_dtype") and attribute.i == FLOAT:
            if attribute.name != "stash_type":  # layer norm computes its mean in float32, and should
                attribute.i = wanted
        elif attribute.HasField("t") and attribute.t.data_type == FLOAT:
            attribute.t.CopyFrom(_stored(attribute.t.name, numpy_helper.to_array(attribute.t), wanted))


def _drop_unread(model: onnx.ModelProto) -> None:
    read: set[str] = {name for node in model.graph.node for name in node.input}
    read |= {value.name for value in model.graph.output}
    left = [tensor for tensor in model.graph.initializer if tensor.name in read]
    del model.graph.initializer[:]
    model.graph.initializer.extend(left)


def check_lowered(path: str | Path, lowered: str | Path, precision: str) -> dict[str, int]:
    """Prove that a half precision file is its float32 file: the same nodes on the same tensors, the same weights rounded.

    The check reads the result independently of the pass: it follows casts back and compares the remaining nodes.
    It is the only proof where no engine on this machine runs the precision (bf16 on a CPU).

    Args:
        path: the float32 file.
        lowered: from :func:`lower_precision`.
        precision: ``"fp16"`` or ``"bf16"``.

    Returns:
        How many nodes and constants were compared.

    Raises:
        InvalidArgumentError: they differ; the message names the node.
    """
    before, after = onnx.load(path), onnx.load(lowered)
    constants = {t.name: t for t in before.graph.initializer}
    known = {node.output[0] for node in before.graph.node} | {value.name for value in before.graph.input}
    source: dict[str, str] = {}  # a tensor of the lowered file -> the tensor of the float32 file that it holds
    checked = 0
    for tensor in after.graph.initializer:
        owner = next((name for name in constants if tensor.name in (name, *_spellings(name))), None)
        if owner is None or not _is_rounded(constants[owner], tensor, precision):
            raise InvalidArgumentError(
                f"Constant `{tensor.name}` of `{Path(lowered).name}` must be that of the float32 file, rounded."
            )
        source[tensor.name] = owner
        checked += 1
    twins = iter(before.graph.node)
    for node in after.graph.node:
        read = [source.get(name, name) for name in node.input]
        if node.op_type == "Cast" and node.output[0] not in known - {v.name for v in before.graph.output}:
            source[node.output[0]] = read[0]
            if node.output[0] in known and read[0] != node.output[0]:
                raise InvalidArgumentError(
                    f"Output `{node.output[0]}` of `{Path(lowered).name}` must be that of the float32 file."
                )
            continue
        twin = next(twins, None)
        if twin is None or twin.op_type != node.op_type or list(twin.input) != read or not _same_settings(twin, node):
            raise InvalidArgumentError(
                f"Node {node.op_type} `{node.name}` of `{Path(lowered).name}` must be that of the float32 file."
            )
        source.update(zip(node.output, twin.output, strict=True))
    if (missing := next(twins, None)) is not None:
        raise InvalidArgumentError(
            f"Node {missing.op_type} `{missing.name}` must be in `{Path(lowered).name}`, but isn't."
        )
    return {"nodes": len(before.graph.node), "constants": checked}


def _spellings(name: str) -> list[str]:
    return [f"{name}_{TensorProto.DataType.Name(kind).lower()}" for kind in (*HALVES.values(), FLOAT)]


def _is_rounded(tensor: TensorProto, other: TensorProto, precision: str) -> bool:
    if tensor.data_type == other.data_type:
        return cast(bool, numpy_helper.to_array(tensor).tobytes() == numpy_helper.to_array(other).tobytes())
    half = _stored("x", numpy_helper.to_array(tensor), HALVES[precision])
    return cast(bool, numpy_helper.to_array(half).tobytes() == numpy_helper.to_array(other).tobytes())


def _same_settings(node: onnx.NodeProto, other: onnx.NodeProto) -> bool:
    """The same attributes, but for types."""
    typed = ("to", "dtype", "output_dtype", "value")

    def settings(n: onnx.NodeProto) -> dict[str, bytes]:
        return {a.name: a.SerializeToString(deterministic=True) for a in n.attribute if a.name not in typed}

    return settings(node) == settings(other)
