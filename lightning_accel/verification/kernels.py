"""Compare an engine with each quantized region of a file, in steps of the quantization.

Engines fuse everything between two quantizations into one integer kernel. In a deep network, whose roundings spread, the outputs of a
correct and a wrong kernel can differ by the same amount. So each region, from integers to integers, is compared alone, in two ways:

1. *Isolated*: the file is cut where its tensors are integers. Each region runs on the engine, fed the values that the file has there.
2. *In place*: the engine runs the whole network and shows its quantized tensors; each region of the file, run as it is written, is
   fed the values that the engine has there. This finds errors of optimizations across regions.

No torch needed.
"""

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from lightning_accel.engines.base import Runner, load_runner
from lightning_accel.engines.registry import engine_named
from lightning_accel.onnx.file import reads
from lightning_accel.verification.layout import Layout
from lightning_accel.verification.segments import run_as_written

DRIFT = 0.25  # steps: average by which values that are rounded may be moved; rounding moves them both ways, cutting off by a half
_ROUNDED = 1e-3  # steps: a value nearer to an integer isn't rounded, nor is one beyond the largest integer
FLOATS = 1e-3  # of a tensor's range: integer kernels round biases to the product of two scales
_FEW, _MANY = 2, 8  # samples: of a network whose tensors take much memory, and of others
_MUCH = 2**28  # bytes


@dataclass(frozen=True)
class KernelCheck:
    """Comparison of an engine's kernels with the file, region by region.

    Args:
        engine: engine that ran the regions.
        regions: tensors that were compared: those that are quantized, and floating-point ones at the borders.
        largest_step: largest difference of an integer, in steps; 1 is a rounding that went the other way.
        flipped: largest share of a tensor's integers that differ.
        farthest: largest distance, in steps, from the edge between two integers of a value that was rounded the other way.
        largest_float: largest error of a floating-point tensor, as a share of its range.
        diverging: the first region whose results differ, in one sentence; empty if none.
        edges: by quantized tensor, the farthest such distance that was seen in it.
        sizes: by quantized tensor, how many values were looked at.
    """

    engine: str
    regions: int
    largest_step: int
    flipped: float
    farthest: float
    largest_float: float
    diverging: str = ""
    edges: dict[str, float] = field(default_factory=dict, repr=False)
    sizes: dict[str, int] = field(default_factory=dict, repr=False)

    @property
    def noise(self) -> dict[str, float]:
        """Distance from a rounding edge, by quantized tensor, within which this engine may round the other way.

        In a small tensor hardly any value lies near an edge. There the engine's typical distance is used, unless the values
        rule it out: of ``n``, ``n * a / 2`` are rounded the other way within a distance ``a``, and by Poisson's
        law none is, where 3 are expected, once in 20 times.
        """
        seen = [edge for edge in self.edges.values() if edge > 0.0]
        usual = float(np.quantile(seen, 0.75)) if seen else 0.0
        return {name: max(edge, min(usual, 6.0 / self.sizes[name])) for name, edge in self.edges.items()}

    def joined(self, other: "KernelCheck") -> "KernelCheck":
        """Merge both checks of one engine."""
        return KernelCheck(
            self.engine,
            self.regions,
            max(self.largest_step, other.largest_step),
            max(self.flipped, other.flipped),
            max(self.farthest, other.farthest),
            max(self.largest_float, other.largest_float),
            self.diverging or other.diverging,
            {name: max(edge, other.edges.get(name, 0.0)) for name, edge in self.edges.items()},
            self.sizes,
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a report."""
        values = asdict(self)
        del values["edges"], values["sizes"]
        return values


def check_kernels(
    path: str | Path, engine: str, samples: Mapping[str, np.ndarray], layout: Layout | None = None, **options: Any
) -> KernelCheck:
    """Compare every quantized region of a file with an engine, isolated and in place.

    Args:
        path: the ONNX file with Q/DQ nodes; a file without any has no region to compare but its outputs.
        engine: ``"onnxruntime"`` or ``"openvino"``.
        samples: inputs by name, each ``(S, ...)``; at most 8 samples are used.
        layout: how samples become the inputs of a call; ``None``: they are.
        options: for :func:`~lightning_accel.engines.base.load_runner`.

    Raises:
        RunError: the engine can't load or run the regions.
    """
    model = onnx.load(path)
    cut = _Cut(model, floats=True)
    values = cut.run(samples, layout or Layout.of_samples(samples))
    with tempfile.TemporaryDirectory() as folder:
        alone = _isolated(engine, cut, values, Path(folder) / "regions.onnx", options)
        if alone.diverging or not cut.pairs:
            return alone
        placed = _Cut(model, floats=False)
        feeds = {value.name: values[value.name] for value in model.graph.input}
        return alone.joined(_in_place(engine, placed, feeds, Path(folder), options))


def _isolated(
    engine: str, cut: "_Cut", values: Mapping[str, np.ndarray], file: Path, options: Mapping[str, Any]
) -> KernelCheck:
    inputs = cut.write(file, values, quantized=True)
    with load_runner(file, engine, **options) as runner:
        found = dict(zip(cut.ends, _run(runner, inputs), strict=True))
    return _judged(engine, cut, values, found, "fed the file's values")


def _in_place(
    engine: str, cut: "_Cut", feeds: Mapping[str, np.ndarray], folder: Path, options: Mapping[str, Any]
) -> KernelCheck:
    integers = engine_named(engine).shows_integers
    cut.show(folder / "whole.onnx", integers)
    with load_runner(folder / "whole.onnx", engine, **options) as runner:
        found = dict(zip(cut.shows, _run(runner, feeds), strict=True))
    found |= {name: cut.dequantized(name, found[name]) for name in cut.pairs if integers and name not in cut.shown}
    inputs = cut.write(folder / "regions.onnx", {**feeds, **found}, quantized=False)
    with load_runner(folder / "regions.onnx", "onnxruntime", emulate=True) as runner:
        outputs = _run(runner, inputs)
    values = {**inputs, **dict(zip([*cut.ends, *cut.before(inputs)], outputs, strict=True))}
    return _judged(engine, cut, values, found, "in its place in the network")


def _run(runner: Runner, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Run a file and return outputs by position, since an engine may use another name for one; unused inputs are dropped."""
    return list(runner.run({name: inputs[name] for name in runner.input_names}).values())


class _Cut:
    """A file cut at its quantized tensors.

    Args:
        model: the file.
        floats: cut it at floating-point tensors that several nodes read, too.
    """

    def __init__(self, model: onnx.ModelProto, *, floats: bool) -> None:
        self.model, self.nodes = model, list(model.graph.node)
        self.constants = {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
        self.producer = {name: node for node in self.nodes for name in node.output if name}
        self.shown = [value.name for value in model.graph.output]
        counts: dict[str, int] = {}
        for node in self.nodes:
            for name in set(reads(node)):
                counts[name] = counts.get(name, 0) + 1
        # name of the dequantized tensor -> its QuantizeLinear and DequantizeLinear
        self.pairs = {
            node.output[0]: (self.producer[node.input[0]], node)
            for node in self.nodes
            if node.op_type == "DequantizeLinear" and self._quantizes(self.producer.get(node.input[0]))
        }
        self.types = {v.name: v.type.tensor_type for v in onnx.shape_inference.infer_shapes(model).graph.value_info}
        kinds = {name: kind.elem_type for name, kind in self.types.items()}
        self.floats = [
            name
            for name, node in self.producer.items()
            if floats
            and node.op_type not in ("QuantizeLinear", "DequantizeLinear")
            and kinds.get(name) == TensorProto.FLOAT
            and counts.get(name, 0) > 1
            and any(read not in self.constants for read in reads(node))
        ]
        self.ends = [
            *self.pairs,
            *self.floats,
            *(name for name in self.shown if name not in (*self.pairs, *self.floats)),
        ]

    def _quantizes(self, node: NodeProto | None) -> bool:
        return (
            node is not None
            and node.op_type == "QuantizeLinear"
            and np.size(self.constants.get(node.input[1], ())) == 1
        )

    def run(self, samples: Mapping[str, np.ndarray], layout: Layout) -> dict[str, np.ndarray]:
        """The file as written: values at the cuts, and before each quantization."""
        count = len(next(iter(samples.values())))
        few = self._run(layout.first(samples, _FEW))
        if not layout.axes or count <= _FEW or sum(array.nbytes for array in few.values()) / _FEW * _MANY > _MUCH:
            return few
        return self._run(layout.first(samples, _MANY))

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        before = [quantize.input[0] for quantize, _ in self.pairs.values()]
        names = [name for name in dict.fromkeys([*before, *self.ends]) if name not in feeds]
        whole = onnx.ModelProto()
        whole.CopyFrom(self.model)
        whole.graph.output.extend(helper.make_empty_tensor_value_info(n) for n in names if n not in self.shown)
        return {**feeds, **dict(zip(names, run_as_written(whole, names, feeds), strict=True))}

    @property
    def shows(self) -> list[str]:
        """Outputs of the whole network with its quantized tensors shown."""
        return [*self.shown, *(name for name in self.pairs if name not in self.shown)]

    def show(self, path: Path, integers: bool) -> None:
        """Write the whole network, its quantized tensors among its outputs, as integers or dequantized."""
        whole = onnx.ModelProto()
        whole.CopyFrom(self.model)
        added = self.shows[len(self.shown) :]
        if integers:  # tensors that are dequantized twice are shown once, under the names of both
            for name in added:
                whole.graph.node.append(
                    helper.make_node("Identity", [self.pairs[name][1].input[0]], [f"{name}::shown"])
                )
            whole.graph.output.extend(helper.make_empty_tensor_value_info(f"{name}::shown") for name in added)
        else:
            whole.graph.output.extend(helper.make_tensor_value_info(n, TensorProto.FLOAT, None) for n in added)
        onnx.save(whole, path)

    def dequantized(self, name: str, integers: np.ndarray) -> np.ndarray:
        """Dequantize integers."""
        _, scale, *rest = self.pairs[name][1].input
        zero_point = self.constants[rest[0]].astype(np.int32) if rest else np.int32(0)
        result: np.ndarray = (
            (integers.astype(np.int32) - zero_point).astype(np.float32) * self.constants[scale]
        ).astype(np.float32)
        return result

    def before(self, inputs: Mapping[str, np.ndarray]) -> list[str]:
        """Tensors before each quantization that are neither inputs nor outputs."""
        names = dict.fromkeys(quantize.input[0] for quantize, _ in self.pairs.values())
        return [name for name in names if name not in inputs and name not in self.ends]

    def write(self, path: Path, values: Mapping[str, np.ndarray], *, quantized: bool) -> dict[str, np.ndarray]:
        """Write the file with every cut made: tensors read there become inputs, and computed ones outputs.

        Args:
            path: file to write.
            values: at the cuts.
            quantized: inputs are quantized in front of each region, as they are in the file; else they are taken as they are, and
                what stands before each quantization is shown, too.

        Returns:
            The values of its inputs.
        """
        # Inputs have new names, since outputs at the cuts keep the old ones with a suffix.
        inputs = {value.name: values[value.name] for value in self.model.graph.input}
        shapes = {value.name: _shape(value.type.tensor_type) for value in self.model.graph.input}
        first: list[NodeProto] = []
        for name, (quantize, back) in self.pairs.items():
            if not quantized:
                inputs[name], shapes[name] = values[name], self._shape(name, values[name])
                continue
            inputs[f"{name}::in"] = values[name]
            shapes[f"{name}::in"] = self._shape(name, values[name])
            first.append(helper.make_node("QuantizeLinear", [f"{name}::in", *quantize.input[1:]], [f"{name}::q"]))
            first.append(helper.make_node("DequantizeLinear", [f"{name}::q", *back.input[1:]], [name]))
        inputs |= {name: values[name] for name in self.floats}
        shapes |= {name: self._shape(name, values[name]) for name in self.floats}
        nodes = [*first]
        cut = {*self.pairs, *self.floats}
        for node in self.nodes:
            copy = NodeProto()
            copy.CopyFrom(node)
            for i, name in enumerate(node.output):
                if name in cut:
                    copy.output[i] = f"{name}::out"
            nodes.append(copy)
        graph = helper.make_graph(
            nodes,
            "regions",
            [
                helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(array.dtype), shapes[n])
                for n, array in inputs.items()
            ],
            [
                helper.make_tensor_value_info(
                    f"{n}::out" if n in cut else n, helper.np_dtype_to_tensor_dtype(values[n].dtype), None
                )
                for n in self.ends
            ]
            + [
                helper.make_tensor_value_info(n, TensorProto.FLOAT, None)
                for n in ([] if quantized else self.before(inputs))
            ],
            list(self.model.graph.initializer),
        )
        model = helper.make_model(
            graph,
            opset_imports=self.model.opset_import,
            ir_version=self.model.ir_version,
            functions=self.model.functions,
        )
        onnx.save(model, path)
        return inputs

    def _shape(self, name: str, value: np.ndarray) -> list[int | str | None]:
        """The shape as in the file: with a dynamic batch, engines choose other kernels."""
        kind = self.types.get(name)
        known = kind is not None and kind.HasField("shape") and len(kind.shape.dim) == value.ndim
        return _shape(kind) if known else [None] * value.ndim

    def describe(self, name: str) -> str:
        """The nodes of a region, from its end to the cuts before it."""
        start = self.pairs[name][0].input[0] if name in self.pairs else name
        found, waiting = list[str](), [start]
        cut = {*self.pairs, *self.floats} - {name}
        while waiting and len(found) < 6:
            node = self.producer.get(waiting.pop(0))
            if node is None or node.output[0] in cut or node.op_type == "DequantizeLinear":
                continue
            found.append(f"{node.op_type} `{node.name}`")
            waiting += [n for n in node.input if n not in self.constants]
        return " -> ".join(reversed(found)) or f"QuantizeLinear of `{start}`"


def _shape(kind: onnx.TypeProto.Tensor) -> list[int | str | None]:
    return [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in kind.shape.dim]


def _judged(
    engine: str, cut: _Cut, values: Mapping[str, np.ndarray], found: Mapping[str, np.ndarray], how: str
) -> KernelCheck:
    largest_step, flipped, farthest, largest_float, diverging = 0, 0.0, 0.0, 0.0, ""
    edges, sizes = dict[str, float](), dict[str, int]()
    for name in cut.ends:
        want, got = values[name], found[name]
        wrong = ""
        if want.shape != got.shape:
            wrong = f"its shape is {got.shape} instead of {want.shape}"
        elif name in cut.pairs:
            quantize = cut.pairs[name][0]
            scale = cut.constants[quantize.input[1]].astype(np.float32).reshape(())
            if not np.isfinite(got).all():
                step, share, edge, drift = 2**31, 1.0, 0.5, float("inf")
            else:
                step, share, edge, drift = _steps(want / scale, got / scale, values[quantize.input[0]] / scale)
            largest_step, flipped, farthest = max(largest_step, step), max(flipped, share), max(farthest, edge)
            edges[name], sizes[name] = edge, want.size
            if step > 1:
                wrong = f"its integers are off by up to {step} steps ({share:.1%} of them differ)"
            elif abs(drift) > DRIFT:
                wrong = f"its integers are moved by {drift:+.2f} steps on average"
        elif np.issubdtype(want.dtype, np.floating):
            error = _share(want, got)
            largest_float = max(largest_float, error)
            if not error <= FLOATS:
                wrong = f"it is off by {error:.1e} of its range"
        if wrong and not diverging:
            diverging = f"First diverging kernel: {cut.describe(name)}, {how}: {wrong}."
    return KernelCheck(engine, len(cut.ends), largest_step, flipped, farthest, largest_float, diverging, edges, sizes)


def _steps(want: np.ndarray, got: np.ndarray, exact: np.ndarray) -> tuple[int, float, float, float]:
    """Largest difference, share of differences, how far from an edge they lie, and their average; all in steps."""
    moved = np.rint(got) - np.rint(want)
    differs = moved != 0
    if not differs.any():
        return 0, 0.0, 0.0, 0.0
    values = np.broadcast_to(exact, moved.shape).astype(np.float64)
    edge = float(np.abs(values - np.floor(values) - 0.5)[differs].max())
    between = (np.abs(values - np.rint(values)) > _ROUNDED) & (np.abs(values - np.rint(want)) <= 0.5 + _ROUNDED)
    return int(np.abs(moved).max()), float(differs.mean()), edge, float(moved[differs | between].mean())


def _share(want: np.ndarray, got: np.ndarray) -> float:
    a, b = want.astype(np.float64), got.astype(np.float64)
    with np.errstate(invalid="ignore"):
        off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
    finite = a[np.isfinite(a)]
    span = max(
        float(finite.max(initial=0.0) - finite.min(initial=0.0)), float(np.abs(finite).max(initial=0.0)) * 1e-3, 1e-30
    )
    worst = float(off.max(initial=0.0)) / span
    return worst if np.isfinite(worst) else float("inf")
