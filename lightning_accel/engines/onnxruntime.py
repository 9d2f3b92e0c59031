"""ONNX Runtime engine; with graph optimizations off, the reference for the meaning of an ONNX file."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, cast

import numpy as np

from lightning_accel.core.optional import require
from lightning_accel.engines.base import Runner, TensorSpec
from lightning_accel.engines.registry import EngineSpec, import_error
from lightning_accel.errors import EngineError, InvalidArgumentError, MissingFileError

_DTYPES = {
    "tensor(float)": "float32",
    "tensor(double)": "float64",
    "tensor(float16)": "float16",
    "tensor(bool)": "bool",
    **{f"tensor({sign}int{bits})": f"{sign}int{bits}" for sign in ("", "u") for bits in (8, 16, 32, 64)},
}


ENGINE = EngineSpec(
    "onnxruntime",
    "lightning_accel.engines.onnxruntime:OnnxRuntimeRunner",
    requirements={"onnxruntime": "lightning-accel[runtime]", "onnxruntime-gpu": "lightning-accel[gpu]"},
    modules=("onnxruntime",),
    suffixes=(".onnx",),
    status="lightning_accel.engines.onnxruntime:statuses",
    probed=True,
    shows_integers=True,
    common=True,
)


class OnnxRuntimeRunner(Runner):
    """Run an ONNX file with ONNX Runtime.

    Args:
        path: the ``.onnx`` file.
        threads: threads inside an operator. Default: ONNX Runtime's choice, one for each core.
        providers: execution providers in order of preference, each a name or ``(name, options)``.
        emulate: turn graph optimizations off, so that each QuantizeLinear and DequantizeLinear runs as written, in
            float. These are the semantics of the file; the integer kernels of a CPU may saturate where it doesn't.
        io_binding: bind the memory of inputs and outputs, so that outputs of a provider on a GPU are copied once, at the end
            of the call.

    Raises:
        MissingFileError: no file at ``path``.
        InvalidArgumentError: a provider that this installation of ONNX Runtime doesn't have.
        EngineError: ONNX Runtime can't load the file, or a provider can't start here.
    """

    engine = "onnxruntime"

    def __init__(
        self,
        path: str | Path,
        *,
        threads: int | None = None,
        providers: Sequence[str | tuple[str, dict[str, Any]]] = ("CPUExecutionProvider",),
        emulate: bool = False,
        io_binding: bool = False,
    ) -> None:
        ort = require("onnxruntime", "runtime", "Engine `onnxruntime`")
        if not Path(path).is_file():
            raise MissingFileError(f"Argument `path` must be an ONNX file, but got {path}: nothing is there.")
        wanted = [provider if isinstance(provider, str) else provider[0] for provider in providers]
        available = ort.get_available_providers()
        if not wanted or not set(wanted) <= set(available):
            raise InvalidArgumentError(
                f"Argument `providers` must be among the available {available}, but got {wanted}."
            )
        options = ort.SessionOptions()
        # Spinning threads slow down other processes, including other variants of a benchmark.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.add_session_config_entry("session.inter_op.allow_spinning", "0")
        # By default ONNX Runtime rounds activations to int8 where only weights are integers; the precision must be that of
        # the file.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if threads is not None:
            options.intra_op_num_threads = threads
        if emulate:
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        try:
            session = ort.InferenceSession(str(path), options, providers=list(providers))
        except Exception as error:  # ONNX Runtime's exceptions have no other common base class
            raise EngineError(f"ONNX Runtime could not load `{Path(path).name}`: {error}") from error
        # ONNX Runtime replaces a provider with missing libraries by the CPU and only prints a warning.
        if lost := [name for name in wanted if name not in session.get_providers()]:
            raise EngineError(
                f"ONNX Runtime could not start {lost} here, only {session.get_providers()}. "
                "Install the provider's dependencies, or pass the available providers."
            )
        session.disable_fallback()
        self._session: Any = session
        self._io_binding = io_binding
        super().__init__(path, _specs(session.get_inputs()), _specs(session.get_outputs()))

    def _execute(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        session = self._session  # a session may run in several threads; this reference keeps it alive during the call
        self._check_open()
        if not self._io_binding:
            return cast("list[np.ndarray]", session.run(list(self.output_names), feeds))
        binding = session.io_binding()  # one for each call, since calls may overlap
        for name, array in feeds.items():
            binding.bind_cpu_input(name, array)
        for name in self.output_names:
            binding.bind_output(name)
        session.run_with_iobinding(binding)
        return cast("list[np.ndarray]", binding.copy_outputs_to_cpu())

    def _release(self) -> None:
        self._session = None


def statuses() -> dict[str, str]:
    """Status for ``doctor``: the execution providers of the installed ONNX Runtime."""
    if reason := import_error("onnxruntime"):
        return {"onnxruntime": reason}
    available = import_module("onnxruntime").get_available_providers()
    providers = [provider.removesuffix("ExecutionProvider") for provider in available]
    return {"onnxruntime": f"runs here ({', '.join(providers)})"}


def _specs(tensors: Sequence[Any]) -> list[TensorSpec]:
    specs = []
    for tensor in tensors:
        if tensor.type not in _DTYPES:
            raise EngineError(f"Tensor `{tensor.name}` must have a dtype that numpy has, but it is {tensor.type}.")
        shape = tuple(size if isinstance(size, int) else None for size in tensor.shape)
        specs.append(TensorSpec(tensor.name, np.dtype(_DTYPES[tensor.type]), shape))
    return specs
