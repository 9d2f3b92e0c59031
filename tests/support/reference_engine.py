"""An engine as another distribution would write it: ONNX's own reference implementation, which is numpy, as a runner."""

from pathlib import Path

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from lightning_accel.engines.base import Runner, TensorSpec
from lightning_accel.engines.registry import EngineSpec
from lightning_accel.errors import EngineError


class ReferenceRunner(Runner):
    engine = "reference"

    def __init__(self, path, *, threads=None):
        model = onnx.load(path)
        for opset in model.opset_import:  # of Q/DQ it has the definition of opset 19, which is 18's for int8
            opset.version = 19 if (opset.domain, opset.version) == ("", 18) else opset.version
        self._evaluator = ReferenceEvaluator(model)
        super().__init__(path, [_spec(v) for v in model.graph.input], [_spec(v) for v in model.graph.output])

    def _execute(self, feeds):
        self._check_open()
        return self._evaluator.run(list(self.output_names), feeds)

    def _release(self):
        self._evaluator = None


class WrongRunner(ReferenceRunner):
    """The same with a fault: one output is a tenth too large."""

    engine = "wrong"

    def _execute(self, feeds):
        return [1.1 * array for array in super()._execute(feeds)]


class WrongWholeRunner(ReferenceRunner):
    """The same, and only a whole network is wrong, as by an optimization across operators; outputs of parts have names with colons."""

    engine = "wrong whole"

    def _execute(self, feeds):
        arrays = super()._execute(feeds)
        return arrays if any("::" in name for name in self.output_names) else [array[:, ::-1] for array in arrays]


class UnloadableRunner(ReferenceRunner):
    """The same, and it can't load any file."""

    engine = "unloadable"

    def __init__(self, path, *, threads=None):
        raise EngineError("it has no such operator")


def _spec(value):
    tensor = value.type.tensor_type
    shape = tuple(size.dim_value if size.HasField("dim_value") else None for size in tensor.shape.dim)
    return TensorSpec(value.name, np.dtype(onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)), shape)


def build(onnx_file: Path, out: Path, precision: str):
    """An "engine file" is the ONNX file under another name."""
    out.write_bytes(Path(onnx_file).read_bytes())
    here = {"runs_here": True, "library": "reference", "version": onnx.__version__, "precision": precision}
    return {"status": "built here", "file": out.name, **here, "warnings": ["a warning of the builder"]}


def fails_to_build(onnx_file: Path, out: Path, precision: str):
    """A builder that leaves half a file."""
    out.write_bytes(b"half of it")
    raise EngineError("the builder ran out of memory")


def refuses(arithmetic):
    return "its activations are int8" if arithmetic.activations != "int8" else ""


_HERE = "tests.support.reference_engine"
ENGINE = EngineSpec(
    "reference",
    f"{_HERE}:ReferenceRunner",
    requirements={"onnx": "onnx"},
    modules=("onnx",),
    suffixes=(".reference",),
    refuses=f"{_HERE}:refuses",
)
WRONG = EngineSpec("wrong", f"{_HERE}:WrongRunner", modules=("onnx",))
WRONG_WHOLE = EngineSpec("wrong whole", f"{_HERE}:WrongWholeRunner", modules=("onnx",))
UNLOADABLE = EngineSpec("unloadable", f"{_HERE}:UnloadableRunner", modules=("onnx",))
UNBUILDABLE = EngineSpec(
    "unbuildable", f"{_HERE}:ReferenceRunner", source="built", build=f"{_HERE}:fails_to_build", modules=("onnx",)
)
BUILT = EngineSpec("compiled", f"{_HERE}:ReferenceRunner", source="built", build=f"{_HERE}:build", modules=("onnx",))
