"""Build engines from ONNX files with TensorRT 10, TensorRT 11 and TensorRT for RTX."""

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_accel.core.arguments import checked
from lightning_accel.core.optional import require
from lightning_accel.engines.manifest import sha256_of
from lightning_accel.engines.tensorrt.cuda import gpu_name, has_gpu
from lightning_accel.engines.tensorrt.library import (
    EngineInfo,
    Profile,
    collected_messages,
    explain,
    load_library,
    progress_monitor,
    sidecar_of,
)
from lightning_accel.engines.tensorrt.runner import TensorRTRunner
from lightning_accel.engines.tensorrt.sparsity import sparse_2_to_4
from lightning_accel.errors import EngineError, InvalidArgumentError, MissingFileError

__all__ = ["EngineInfo", "TensorRTRunner", "build_engine", "has_gpu"]

DEFAULT_BATCH = (1, 8, 64)
COMPATIBILITY = ("ampere_plus", "same_compute_capability")


@checked()
def build_engine(
    onnx_path: str | Path,
    engine_path: str | Path | None = None,
    *,
    library: str | None = None,
    profile: Mapping[str, Sequence[Sequence[int]]] | None = None,
    workspace_bytes: int | None = None,
    level: int | None = None,
    timing_cache: str | Path | None = None,
    sparse: bool | None = None,
    compatibility: str | None = None,
    progress: Callable[[str, float], None] | None = None,
) -> EngineInfo:
    """Build a TensorRT engine from an ONNX file.

    The network is strongly typed: each layer runs in the precision of the file (casts, QuantizeLinear and
    DequantizeLinear), on every version of TensorRT. TensorRT for RTX builds on machines without a GPU. The engine and its
    record ``<engine>.json`` are written only after a successful build.

    Args:
        onnx_path: the ONNX file.
        engine_path: destination of the engine. Default: ``<name>.<library>.engine`` beside the ONNX file.
        library: ``"tensorrt"`` or ``"tensorrt_rtx"``. Default: the first of the two that is installed.
        profile: ``{input: (smallest, optimal, largest)}`` shapes of dynamic inputs. Default for an input whose
            first dimension alone is dynamic: batches of 1, 8 and 64.
        workspace_bytes: memory a layer may use for intermediate results. Default: all of the GPU's.
        level: optimization level, 0 (builds fast) to 5 (runs fast). Default: TensorRT's, 3.
        timing_cache: file that keeps the timings of layers from one build to the next; created if missing.
            TensorRT for RTX has none.
        sparse: let TensorRT use kernels that skip zeros where weights are 2:4 sparse. Default: if any are.
        compatibility: further GPUs that can run the engine: ``"ampere_plus"`` or
            ``"same_compute_capability"``. Default: none. Not supported by TensorRT for RTX.
        progress: called with the phase of the build and its progress in [0, 1]; an exception stops the build.

    Raises:
        MissingPackageError: neither library is installed; the message names the extra.
        MissingFileError: no ONNX file.
        InvalidArgumentError: not a valid ONNX file, a profile that doesn't fit its inputs, or an option that the library doesn't support.
        EngineError: TensorRT can't parse or build it; the message holds its errors with the names of the nodes.

    Example:
        >>> build_engine("model.onnx", profile={"images": ((1, 3, 32, 32), (8, 3, 32, 32), (64, 3, 32, 32))})  # doctest: +SKIP
    """
    if level is not None and level not in range(6):
        raise InvalidArgumentError(f"Argument `level` must be an integer from 0 to 5 or None, but got {level!r}.")
    trt = load_library(library)
    library = str(trt.__name__)
    if timing_cache is not None and library == "tensorrt_rtx":
        raise InvalidArgumentError("Argument `timing_cache` must be None for `tensorrt_rtx`, which keeps no timings.")
    if compatibility not in (None, *COMPATIBILITY):
        raise InvalidArgumentError(
            f"Argument `compatibility` must be one of {list(COMPATIBILITY)} or None, but got {compatibility!r}."
        )
    if compatibility is not None and library == "tensorrt_rtx":
        raise InvalidArgumentError(
            "Argument `compatibility` must be None for `tensorrt_rtx`, whose engines fit every RTX GPU."
        )
    onnx_path = Path(onnx_path)
    model = _checked_model(onnx_path)
    precision, sparse_layers = _precision_of(model), sparse_2_to_4(model)[0]
    if sparse and not sparse_layers:
        raise InvalidArgumentError(
            f"Argument `sparse` must be False or None for `{onnx_path.name}`, none of whose weights are 2:4 sparse, but got True."
        )
    sparse = bool(sparse_layers) if sparse is None else sparse
    engine_path = Path(engine_path) if engine_path is not None else onnx_path.with_suffix(f".{library}.engine")

    started = time.perf_counter()
    warnings: list[str] = []
    with collected_messages(trt, warnings) as (logger, errors):
        try:
            builder = trt.Builder(logger)
        except (TypeError, RuntimeError) as error:  # raised by a library that needs a GPU, on a machine without one
            raise EngineError(f"{library} {trt.__version__} can't build here:\n{explain(errors)}") from error
        # TensorRT 11 has only strongly typed networks, and may remove the flag.
        flag = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        network = builder.create_network(0 if flag is None else 1 << int(flag))
        parser = trt.OnnxParser(network, logger)
        if not parser.parse_from_file(str(onnx_path)):
            nodes = [parser.get_error(index) for index in range(parser.num_errors)]
            lines = [f"node `{node.node_name()}` ({node.node_operator()}): {node.desc()}" for node in nodes]
            raise EngineError(f"{library} can't parse `{onnx_path.name}`:\n{explain(lines or errors)}")
        config = builder.create_builder_config()
        shapes = _profile_of([network.get_input(index) for index in range(network.num_inputs)], profile or {})
        if shapes:
            optimization = builder.create_optimization_profile()
            for name, (smallest, optimal, largest) in shapes.items():
                optimization.set_shape(name, smallest, optimal, largest)
            if config.add_optimization_profile(optimization) < 0:
                raise EngineError(f"{library} refused the profile {shapes}:\n{explain(errors)}")
        if workspace_bytes is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
        if level is not None:
            config.builder_optimization_level = level
        if sparse:
            config.set_flag(trt.BuilderFlag.SPARSE_WEIGHTS)
        if compatibility is not None:
            config.hardware_compatibility_level = getattr(trt.HardwareCompatibilityLevel, compatibility.upper())
        config.profiling_verbosity = (
            trt.ProfilingVerbosity.DETAILED
        )  # so that the inspector can name layers and kernels
        monitor = None if progress is None else progress_monitor(trt, progress)
        if monitor is not None:
            config.progress_monitor = monitor
        if timing_cache is not None:
            known = Path(timing_cache).read_bytes() if Path(timing_cache).exists() else b""
            config.set_timing_cache(config.create_timing_cache(known), False)
        plan = builder.build_serialized_network(network, config)
        if monitor is not None and monitor.stopped_by is not None:
            raise monitor.stopped_by
        if plan is None:
            raise EngineError(f"{library} {trt.__version__} can't build `{onnx_path.name}`:\n{explain(errors)}")
        if timing_cache is not None:
            _write(Path(timing_cache), config.get_timing_cache().serialize())
    seconds = time.perf_counter() - started

    engine_path.parent.mkdir(parents=True, exist_ok=True)
    _write(engine_path, plan)
    info = EngineInfo(
        path=engine_path,
        library=library,
        version=str(trt.__version__),
        onnx=Path(os.path.relpath(onnx_path, engine_path.parent)).as_posix(),
        onnx_sha256=sha256_of(onnx_path),
        sha256=sha256_of(engine_path),
        profile=shapes,
        seconds=seconds,
        bytes=engine_path.stat().st_size,
        precision=precision,
        gpu=gpu_name(),
        options={
            "workspace_bytes": workspace_bytes,
            "level": level,
            "timing_cache": None if timing_cache is None else Path(timing_cache).name,
            "sparse": sparse,
            "compatibility": compatibility,
        },
        sparse_layers=sparse_layers,
        warnings=list(dict.fromkeys(line.strip() for line in warnings)),
    )
    _write(sidecar_of(engine_path), (json.dumps(info.to_dict(), indent=2) + "\n").encode())
    return info


def _checked_model(path: Path) -> Any:
    """Read and check an ONNX file, including external weights."""
    onnx = require("onnx", "runtime", "`build_engine`")
    if not path.is_file():
        raise MissingFileError(f"Argument `onnx_path` must be an ONNX file, but got {path}: nothing is there.")
    try:
        # TensorRT's parser silently accepts some files that aren't ONNX.
        onnx.checker.check_model(str(path))
        return onnx.load(str(path))
    except Exception as error:  # a damaged file raises protobuf's and the checker's own errors
        raise InvalidArgumentError(
            f"Argument `onnx_path` must be a valid ONNX file, but got {path.name}: {error}"
        ) from error


def _precision_of(model: Any) -> str:
    """Precision of a model: of its integers if it has Q/DQ nodes, otherwise of its weights."""
    types, graph = require("onnx", "runtime", "`build_engine`").TensorProto.DataType, model.graph
    constants = (attribute.t for node in graph.node for attribute in node.attribute if attribute.HasField("t"))
    kinds = {types.Name(tensor.data_type) for tensor in (*graph.initializer, *constants)}
    if any(node.op_type in ("QuantizeLinear", "DequantizeLinear") for node in graph.node):
        return next((name for kind, name in (("FLOAT8E4M3FN", "fp8"), ("INT4", "int4")) if kind in kinds), "int8")
    return next((name for kind, name in (("FLOAT16", "fp16"), ("BFLOAT16", "bf16")) if kind in kinds), "fp32")


def _profile_of(inputs: Sequence[Any], given: Mapping[str, Sequence[Sequence[int]]]) -> Profile:
    """Complete and check the shapes of the dynamic inputs."""
    dynamic = {tensor.name: tuple(tensor.shape) for tensor in inputs if -1 in tuple(tensor.shape)}
    if unknown := [name for name in given if name not in dynamic]:
        raise InvalidArgumentError(
            f"Argument `profile` must name dynamic inputs, of {sorted(dynamic)}, but got {unknown}."
        )
    profile: Profile = {}
    for name, shape in dynamic.items():
        if name not in given:
            if -1 in shape[1:]:
                axes = [axis for axis, size in enumerate(shape) if size == -1]
                raise InvalidArgumentError(
                    f"Argument `profile` must give the shapes of input `{name}`, whose axes {axes} are dynamic: "
                    f'profile={{"{name}": (smallest, optimal, largest)}}, each like {shape}.'
                )
            shapes = [(batch, *shape[1:]) for batch in DEFAULT_BATCH]
        else:
            shapes = [tuple(candidate) for candidate in given[name]]
        fits = len(shapes) == 3 and all(
            len(candidate) == len(shape) and all(type(size) is int for size in candidate) for candidate in shapes
        )
        if fits:
            for want, *sizes in zip(shape, *shapes, strict=True):
                fits &= 1 <= sizes[0] <= sizes[1] <= sizes[2] and (want == -1 or set(sizes) == {want})
        if not fits:
            raise InvalidArgumentError(
                f"Argument `profile` must give input `{name}` of shape {shape} three such shapes, smallest <= optimal "
                f"<= largest, but got {given.get(name)}."
            )
        profile[name] = (shapes[0], shapes[1], shapes[2])
    return profile


def _write(path: Path, data: Any) -> None:
    """Write a file atomically: a crash leaves the old file or the new one."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
