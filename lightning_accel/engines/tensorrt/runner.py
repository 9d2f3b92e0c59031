"""Run TensorRT engines on an NVIDIA GPU through the CUDA driver."""

from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.engines.base import Runner, TensorSpec
from lightning_accel.engines.batches import run_split, split_sizes
from lightning_accel.engines.manifest import sha256_of
from lightning_accel.engines.tensorrt.cuda import DeviceArray, Graph, Stream, gpu_name, has_gpu, make_current
from lightning_accel.engines.tensorrt.layers import describe_layers
from lightning_accel.engines.tensorrt.library import (
    check_machine,
    check_source,
    collected_messages,
    explain,
    load_library,
    read_info,
)
from lightning_accel.errors import EngineError, InvalidArgumentError, MissingFileError


class TensorRTRunner(Runner):
    """Run an engine built by :func:`build_engine` on the first NVIDIA GPU.

    This class has not been run on a GPU by its authors yet: engines are built and their records checked in the
    tests, execution is not.

    Args:
        path: the engine file, with its record ``<engine>.json`` beside it.
        threads: must be ``None``; the GPU does the work.
        cuda_graph: record the kernels of each shape as a CUDA graph; faster for short kernels.

    Raises:
        MissingFileError: the engine or its record is missing.
        InvalidArgumentError: the engine isn't the one of its record, or ``threads`` is given.
        EngineError: no NVIDIA GPU, another version of TensorRT than the one that built it, or an engine that this
            GPU can't run.
    """

    engine = "tensorrt"

    def __init__(self, path: str | Path, *, threads: int | None = None, cuda_graph: bool = False) -> None:
        if threads is not None:
            raise InvalidArgumentError(f"Argument `threads` must be None for engine `tensorrt`, but got {threads!r}.")
        path = Path(path)
        if not path.is_file():
            raise MissingFileError(f"Argument `path` must be an engine file, but got {path}: nothing is there.")
        self.info = info = read_info(path)
        if (found := sha256_of(path)) != info.sha256:
            raise InvalidArgumentError(
                f"`{path.name}` must have the SHA-256 in its record, {info.sha256}, but got {found}."
            )
        check_source(info)
        if not has_gpu():
            raise EngineError(
                f"`{path.name}` needs an NVIDIA GPU and its driver to run, and this machine has none: "
                "built here, not run."
            )
        trt = load_library(info.library)
        check_machine(info, str(trt.__version__), gpu_name())
        make_current()
        with collected_messages(trt) as (logger, errors):
            self._runtime = trt.Runtime(logger)
            self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
            self._context: Any = self._engine.create_execution_context() if self._engine is not None else None
            if self._context is None:
                raise EngineError(f"{info.library} can't load `{path.name}` on this GPU:\n{explain(errors)}")
        specs = {
            name: self._spec(trt, name)
            for name in map(self._engine.get_tensor_name, range(self._engine.num_io_tensors))
        }
        inputs = [name for name in specs if self._engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        self._buffers = {name: DeviceArray() for name in specs}
        self._stream = Stream()
        self._with_graphs = cuda_graph
        self._graphs: dict[tuple[Any, ...], Graph] = {}
        super().__init__(path, [specs[n] for n in inputs], [specs[n] for n in specs if n not in inputs])

    def _spec(self, trt: Any, name: str) -> TensorSpec:
        if self._engine.get_tensor_location(name) != trt.TensorLocation.DEVICE:
            raise EngineError(f"Tensor `{name}` is a shape tensor on the CPU, which this runner doesn't support.")
        dtype = np.dtype(trt.nptype(self._engine.get_tensor_dtype(name)))
        return TensorSpec(name, dtype, tuple(None if n < 0 else n for n in self._engine.get_tensor_shape(name)))

    def _execute(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        with self._lock:  # a context runs one call at a time
            self._check_open()
            make_current()  # the context is current for a thread, and each call may come from another
            batches = {n: (p[0][0], p[2][0]) for n, p in self.info.profile.items() if n in feeds and p[0][0] != p[2][0]}
            totals = {len(feeds[name]) for name in batches}
            smallest = max((low for low, _ in batches.values()), default=0)
            largest = min((high for _, high in batches.values()), default=0)
            if len(totals) != 1 or max(totals) <= largest:
                return self._call(feeds)
            return run_split(self._call, feeds, split_sizes(totals.pop(), smallest, largest), list(batches))

    def _call(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """One call within the profile."""
        for name, array in feeds.items():
            if not self._context.set_input_shape(name, array.shape):
                raise InvalidArgumentError(
                    f"Argument `feeds` must keep input `{name}` within the engine's profile "
                    f"{self.info.profile.get(name)}, but got shape {array.shape}."
                )
            self._context.set_tensor_address(name, self._buffers[name].upload(array))
        shapes = {spec.name: tuple(self._context.get_tensor_shape(spec.name)) for spec in self.outputs}
        for spec in self.outputs:
            if min(shapes[spec.name], default=0) < 0:
                raise EngineError(f"Output `{spec.name}` has a data-dependent shape, which isn't supported.")
            size = int(np.prod(shapes[spec.name], dtype=np.int64)) * spec.dtype.itemsize
            self._context.set_tensor_address(spec.name, self._buffers[spec.name].reserve(max(size, 1)))
        self._launch(tuple(array.shape for array in feeds.values()))
        self._stream.synchronize()
        return [self._buffers[spec.name].download(shapes[spec.name], spec.dtype) for spec in self.outputs]

    def _launch(self, shapes: tuple[tuple[int, ...], ...]) -> None:
        """Enqueue the kernels one by one or, from the second call with a shape on, as a CUDA graph."""
        if not self._with_graphs:
            self._enqueue()
            return
        addresses = tuple(buffer.reserve(1) for buffer in self._buffers.values())  # a graph stores the addresses
        key = (shapes, addresses)
        if key in self._graphs:
            self._graphs[key].launch(self._stream)
            return
        self._enqueue()  # the first call with new shapes includes setup, which can't be recorded
        self._graphs[key] = Graph(self._stream, self._enqueue)

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(self._stream.handle):
            raise EngineError(f"TensorRT could not run `{self.path.name}`.")

    def layers(self) -> list[dict[str, Any]]:
        """Layers from TensorRT's inspector: name, precision, kernel, and modules.

        Names of nodes contain the path of their module, and names of layers those of the fused nodes.
        """
        with self._lock:
            self._check_open()
            trt = load_library(self.info.library)
            inspector = self._engine.create_engine_inspector()
            text = inspector.get_engine_information(trt.LayerInformationFormat.JSON)
        return describe_layers(text, self.info.sparse_layers)

    def _release(self) -> None:
        make_current()
        for graph in self._graphs.values():
            graph.destroy()
        for buffer in self._buffers.values():
            buffer.free()
        self._stream.destroy()
        self._context = self._engine = self._runtime = None  # in this order
