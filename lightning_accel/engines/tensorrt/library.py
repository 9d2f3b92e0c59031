"""Import TensorRT, read its messages, and store a record beside each engine file."""

import functools
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from lightning_accel.core.optional import require
from lightning_accel.engines.manifest import sha256_of
from lightning_accel.errors import EngineError, InvalidArgumentError, MissingFileError

LIBRARIES = {"tensorrt": "gpu", "tensorrt_rtx": "tensorrt-rtx"}
_LOCK = threading.Lock()  # TensorRT has one logger for the whole process; one caller at a time reads from it

Profile = dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]]


@dataclass(frozen=True)
class EngineInfo:
    """Record of an engine file; written beside it as ``<engine file>.json``.

    Attributes:
        path: the engine file. Its record holds only the name, so a bundle can be moved.
        library: ``"tensorrt"`` or ``"tensorrt_rtx"``.
        version: version of the library. An engine runs on exactly that version.
        onnx: path of its ONNX file, relative to the engine.
        onnx_sha256: SHA-256 of that file.
        sha256: SHA-256 of the engine file.
        profile: smallest, optimal and largest shape of each dynamic input.
        seconds: how long parsing and building took.
        bytes: size of the engine file.
        precision: ``"int8"``, ``"fp8"``, ``"int4"``, ``"fp16"``, ``"bf16"`` or ``"fp32"``, read from the ONNX file.
        gpu: name of the GPU of the machine that built it; ``None`` without one.
        options: further options of the build: workspace, level, timing cache, sparse weights, compatibility.
        sparse_layers: names of the nodes whose weights are 2:4 sparse.
        warnings: TensorRT's warnings, without duplicates.
        ran: whether the engine has been run on this machine; building doesn't run it.
    """

    path: Path
    library: str
    version: str
    onnx: str
    onnx_sha256: str
    sha256: str
    profile: Profile
    seconds: float
    bytes: int
    precision: str
    gpu: str | None
    options: dict[str, Any] = field(default_factory=dict)
    sparse_layers: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    ran: bool = False

    @property
    def status(self) -> str:
        """``"run"`` or ``"built here, not run"``."""
        return "run" if self.ran else "built here, not run"

    def to_dict(self) -> dict[str, Any]:
        """Return the record as JSON values."""
        return {**asdict(self), "path": self.path.name}


def sidecar_of(path: str | Path) -> Path:
    """Path of the record of an engine file."""
    return Path(f"{path}.json")


def read_info(path: str | Path) -> EngineInfo:
    """Read the record of an engine file.

    Raises:
        MissingFileError: the engine has no record beside it.
        InvalidArgumentError: the record is damaged.
    """
    sidecar = sidecar_of(path)
    if not sidecar.is_file():
        raise MissingFileError(
            f"Argument `path` must be an engine with its record `{sidecar.name}` beside it, but it is missing. "
            "Copy both files, or build the engine again with `build_engine`."
        )
    try:
        record = json.loads(sidecar.read_text(encoding="utf-8"))
        record["path"] = Path(path)
        record["profile"] = {
            name: tuple(tuple(shape) for shape in shapes) for name, shapes in record["profile"].items()
        }
        return EngineInfo(**{entry.name: record[entry.name] for entry in fields(EngineInfo)})
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgumentError(
            f"`{sidecar.name}` must be the record of an engine, but it is damaged: {error!r}."
        ) from error


def check_source(info: EngineInfo) -> None:
    """Raise if the ONNX file of an engine changed after the build; a missing file is not checked.

    Raises:
        InvalidArgumentError: the file changed.
    """
    source = info.path.parent / info.onnx
    if source.is_file() and (found := sha256_of(source)) != info.onnx_sha256:
        raise InvalidArgumentError(
            f"`{info.path.name}` must be built from `{info.onnx}` as it is, but it was built from another version of it (SHA-256 "
            f"{info.onnx_sha256}, now {found}): build it again with `lightning-accel build`."
        )


def check_machine(info: EngineInfo, version: str, gpu: str | None) -> None:
    """Raise if an engine was built for another library version or GPU.

    Args:
        info: its record.
        version: of the library that is installed here.
        gpu: name of the GPU here.

    Raises:
        EngineError: it can't run here; the message says why.
    """
    again = "build it again from the ONNX file with `lightning-accel build`"
    if version != info.version:
        raise EngineError(
            f"`{info.path.name}` needs {info.library} {info.version}, but {version} is installed. An engine runs on the "
            f"version that built it: {again}."
        )
    # Engines of TensorRT for RTX run on every RTX GPU; standard ones on the GPU of the build, unless `compatibility` is set.
    fixed = info.library == "tensorrt" and not info.options.get("compatibility")
    if fixed and info.gpu is not None and gpu != info.gpu:
        raise EngineError(
            f"`{info.path.name}` needs the GPU that it was built on, {info.gpu}, but this is {gpu}: {again}."
        )


def load_library(library: str | None) -> Any:
    """Import TensorRT.

    Args:
        library: ``"tensorrt"`` or ``"tensorrt_rtx"``. ``None`` imports the first installed one.

    Raises:
        InvalidArgumentError: another name.
        MissingPackageError: it is not installed; the message names the extra.
    """
    if library is None:
        try:
            return import_module("tensorrt")
        except ModuleNotFoundError:
            library = "tensorrt_rtx"
    if library not in LIBRARIES:
        raise InvalidArgumentError(
            f"Argument `library` must be one of {sorted(LIBRARIES)} or None, but got {library!r}."
        )
    return require(library, LIBRARIES[library], "Engine `tensorrt`")


@contextmanager
def collected_messages(trt: Any, warnings: list[str] | None = None) -> Iterator[tuple[Any, list[str]]]:
    """Context of TensorRT's logger and a list that collects its errors; warnings are added to the given list.

    TensorRT returns ``None`` on failure and passes the reason to the logger only.
    """
    with _LOCK:
        logger = _logger(trt)
        errors: list[str] = []
        logger.errors, logger.warnings = errors, [] if warnings is None else warnings
        yield logger, errors


def explain(errors: list[str]) -> str:
    """Join TensorRT's distinct error lines, without the follow-up errors of a missing GPU."""
    unique = list(dict.fromkeys(line.strip() for line in errors))
    causes = [line for line in unique if "catchCudaError" not in line]
    return "\n".join(f"  {line}" for line in causes or unique) or "  TensorRT gave no reason"


@functools.cache
def _logger(trt: Any) -> Any:
    class Logger(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []
            self.warnings: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity in (trt.ILogger.Severity.ERROR, trt.ILogger.Severity.INTERNAL_ERROR):
                self.errors.append(message)
            elif severity == trt.ILogger.Severity.WARNING:
                self.warnings.append(message)

    return Logger()


def progress_monitor(trt: Any, progress: Callable[[str, float], None]) -> Any:
    """Create a TensorRT progress monitor that calls ``progress`` with the phase of a build and its progress in [0, 1].

    An exception in ``progress``, a KeyboardInterrupt included, stops the build and is kept in ``stopped_by``.
    """

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.stopped_by: BaseException | None = None

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            self.steps[phase] = max(steps, 1)
            self._tell(phase, 0.0)

        def step_complete(self, phase: str, step: int) -> bool:
            self._tell(phase, min((step + 1) / self.steps.get(phase, 1), 1.0))
            return self.stopped_by is None

        def phase_finish(self, phase: str) -> None:
            self._tell(phase, 1.0)

        def _tell(self, phase: str, share: float) -> None:
            if self.stopped_by is None:
                try:
                    progress(phase, share)
                except BaseException as error:  # exceptions can't propagate through TensorRT
                    self.stopped_by = error

    return Monitor()
