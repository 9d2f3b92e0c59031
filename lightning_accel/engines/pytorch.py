"""PyTorch engine for ``torch.export`` programs; the only engine that imports torch."""

import json
import warnings
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.optional import require
from lightning_accel.engines.base import Runner, TensorSpec
from lightning_accel.engines.pt2_archive import refuse_pickles
from lightning_accel.engines.registry import EngineSpec
from lightning_accel.errors import EngineError, MissingFileError

NAMES_FILE = "names.json"


ENGINE = EngineSpec(
    "pytorch",
    "lightning_accel.engines.pytorch:PyTorchRunner",
    requirements={"torch": "lightning-accel[cpu]"},
    modules=("torch",),
    suffixes=(".pt2",),
    source="program",
    precisions=("fp32", "int8"),
    status="lightning_accel.engines.pytorch:statuses",
)


class PyTorchRunner(Runner):
    """Run a program saved with ``torch.export.save`` on the CPU.

    Inputs and outputs are named as in the program's graph. To use the names of the ONNX file, store them in the program:
    ``torch.export.save(program, path, extra_files={"names.json": '{"inputs": ["images"], "outputs": ["logits"]}'})``.

    Args:
        path: the ``.pt2`` file.
        threads: threads inside an operator while this runner runs. Default: torch's setting.

    Raises:
        MissingFileError: no file at ``path``.
        EngineError: torch can't load the file, it holds pickled objects, or its stored names don't match the program.
    """

    engine = "pytorch"

    def __init__(self, path: str | Path, *, threads: int | None = None) -> None:
        torch = require("torch", "cpu", "Engine `pytorch`")
        if not Path(path).is_file():
            raise MissingFileError(f"Argument `path` must be a model.pt2 file, but got {path}: nothing is there.")
        refuse_pickles(Path(path), torch)
        for name in ("torch.ao.quantization.fx._decomposed", "lightning_accel.quantization.arithmetic.dynamic_linear"):
            import_module(name)  # registers the operators of quantized programs
        extra = {NAMES_FILE: ""}
        try:
            with (
                warnings.catch_warnings()
            ):  # older versions tell that they read constants from memory that isn't theirs
                warnings.filterwarnings("ignore", "The given buffer is not writable")
                program = torch.export.load(str(path), extra_files=extra)
        except Exception as error:  # torch raises unrelated types
            raise EngineError(f"PyTorch could not load `{Path(path).name}`: {error}") from error
        values = {node.name: node.meta.get("val") for node in program.graph.nodes}
        signature = program.graph_signature
        inputs, outputs = list(signature.user_inputs), list(signature.user_outputs)
        if unsupported := [name for name in inputs + outputs if not isinstance(values.get(name), torch.Tensor)]:
            raise EngineError(f"All inputs and outputs of `{Path(path).name}` must be tensors, but not: {unsupported}.")
        names = json.loads(extra[NAMES_FILE]) if extra[NAMES_FILE] else {"inputs": inputs, "outputs": outputs}
        if len(names["inputs"]) != len(inputs) or len(names["outputs"]) != len(outputs):
            raise EngineError(f"`{NAMES_FILE}` in `{Path(path).name}` must name {inputs} and {outputs}: got {names}.")
        self._threads = threads
        self._module: Any = program.module()
        self._in_spec = program.call_spec.in_spec
        super().__init__(
            path,
            [_spec(name, values[node]) for name, node in zip(names["inputs"], inputs, strict=True)],
            [_spec(name, values[node]) for name, node in zip(names["outputs"], outputs, strict=True)],
        )

    def _execute(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        import torch
        from torch.utils._pytree import tree_leaves, tree_unflatten

        # torch warns about views of read-only arrays
        tensors = [torch.from_numpy(array if array.flags.writeable else array.copy()) for array in feeds.values()]
        args, kwargs = tree_unflatten(tensors, self._in_spec)
        with self._lock:  # the number of threads is a setting of the whole process
            self._check_open()
            before = torch.get_num_threads()
            try:
                if self._threads is not None:
                    torch.set_num_threads(self._threads)
                with torch.inference_mode():
                    return [_to_numpy(leaf) for leaf in tree_leaves(self._module(*args, **kwargs))]
            finally:
                if self._threads is not None:
                    torch.set_num_threads(before)

    def _release(self) -> None:
        self._module = None


def statuses() -> dict[str, str]:
    """Status for ``doctor``, found without importing torch, which takes seconds."""
    return {"pytorch": "runs here (CPU)" if ENGINE.installed() else "not installed"}


def _spec(name: str, value: Any) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    if dtype == "bfloat16":
        raise EngineError(
            f"Tensor `{name}` must have a dtype that numpy has, but it is bfloat16: cast it in `forward`."
        )
    return TensorSpec(name, np.dtype(dtype), tuple(size if isinstance(size, int) else None for size in value.shape))


def _to_numpy(tensor: Any) -> np.ndarray:
    # An output may be a view of an input or of a buffer; a later call must not change what was returned.
    result: np.ndarray = tensor.detach().cpu().numpy().copy()
    return result
