"""Measure whether an engine's integer kernels reproduce a Q/DQ file on this machine.

Errors depend on the engine's version and on the CPU, which determines the kernels. They are measured on small files with known
exact results, and cached by engine, version and CPU in the user's cache folder.
"""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.cpu import cpu_fields, cpu_name
from lightning_accel.engines.arithmetic import Arithmetic
from lightning_accel.engines.base import load_runner
from lightning_accel.engines.registry import engine_named, probed_engines
from lightning_accel.errors import InvalidArgumentError

FORMS = (
    "convolution",
    "depthwise convolution",
    "grouped convolution",
    "transposed convolution",
    "linear",
    "linear with scaled inputs",
    "dynamic linear",
    "matmul",
    "matmul also read in float",
    "attention",
    "sum",
    "pooling",
    "embedding",
    "concatenation",
    "concatenation also read in float",
    "tiny scales",
)
_SCHEMA = 1  # incremented when the probe files change, which invalidates cached findings
_ONE_STEP = 1.01  # two correct summation orders may round to neighbouring integers
# They select the kernels of oneDNN, which OpenVINO uses.
_ISA_VARIABLES = ("ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA", "ONEDNN_DEFAULT_FPMATH_MODE")

Run = Callable[[Path, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class KernelFinding:
    """Accuracy of an engine for one form.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.
        version: of the engine.
        form: one of :data:`FORMS`.
        arithmetic: of the file.
        error: largest difference from the exact result, in steps of the output's quantization; ``None`` without a result.
        reason: why there is no result.
    """

    engine: str
    version: str
    form: str
    arithmetic: Arithmetic
    error: float | None
    reason: str = ""

    @property
    def exact(self) -> bool:
        """Whether the error is at most one rounding."""
        return self.error is not None and self.error <= _ONE_STEP

    def __str__(self) -> str:
        if self.exact:
            return "exact"
        return f"WRONG by up to {self.error:.3g} steps" if self.error is not None else f"not run: {self.reason}"

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return {**asdict(self), "exact": self.exact}


def probe_kernels(engine: str, form: str, arithmetic: Arithmetic, *, run: Run | None = None) -> KernelFinding:
    """Measure the error of an engine's kernels for a form of integer arithmetic on this machine, or read it from the cache.

    Args:
        engine: ``"onnxruntime"`` or ``"openvino"``.
        form: one of :data:`FORMS`.
        arithmetic: activations, weights, and what is quantized.
        run: replaces the engine; called with the path of a file and its inputs. Its findings are not cached.

    Raises:
        InvalidArgumentError: an unknown engine or form.
        MissingPackageError: the engine isn't installed; the message names the extra.

    Example:
        >>> probe_kernels("openvino", "concatenation", Arithmetic("int8", 63)).exact  # doctest: +SKIP
        True
    """
    if engine not in probed_engines():
        raise InvalidArgumentError(f"Argument `engine` must be one of {probed_engines()}, but got {engine!r}.")
    if form not in FORMS:
        raise InvalidArgumentError(f"Argument `form` must be one of {FORMS}, but got {form!r}.")
    if run is not None:
        return _measure(engine, form, arithmetic, run)
    place = cache_file(engine)
    known = _remembered(place)
    key = json.dumps([form, *asdict(arithmetic).values()])
    if key not in known:
        found = _measure(engine, form, arithmetic, _engine(engine))
        known[key] = (found.error, found.reason)
        _remember(place, {key: known[key]})
    error, reason = known[key]
    return KernelFinding(engine, engine_version(engine), form, arithmetic, error, reason)


def engine_version(engine: str) -> str:
    """Version of an engine's package; empty if it isn't installed."""
    return engine_named(engine).version()


def cache_file(engine: str) -> Path:
    """Path of the cached findings of an engine, by engine, version, CPU and CPU flags."""
    fields = cpu_fields()
    machine = [platform.system(), platform.machine(), cpu_name(), fields.get("flags") or fields.get("Features") or ""]
    machine += [os.environ.get(name, "") for name in _ISA_VARIABLES]
    digest = hashlib.sha256(json.dumps([_SCHEMA, *machine]).encode()).hexdigest()[:16]
    folder = os.environ.get("XDG_CACHE_HOME", "")  # relative paths are invalid, by its specification
    base = Path(folder) if Path(folder).is_absolute() else Path("~/.cache").expanduser()
    return base / "lightning-accel" / "kernels" / f"{engine}-{engine_version(engine)}-{digest}.json"


_Known = dict[str, tuple[float | None, str]]  # form and arithmetic as JSON -> error and reason
_MEMORY: dict[Path, _Known] = {}


def _remembered(place: Path) -> _Known:
    if place not in _MEMORY:
        _MEMORY[place] = _read(place)
    return _MEMORY[place]


def _read(place: Path) -> _Known:
    """Read cached findings; empty for a missing or damaged file, so that they are measured again."""
    try:
        values = json.loads(place.read_text(encoding="utf-8"))
        return {key: _entry(*value) for key, value in values.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def _entry(error: Any, reason: Any) -> tuple[float | None, str]:
    if not isinstance(reason, str) or not (error is None or (isinstance(error, int | float) and error >= 0)):
        raise ValueError("not an error and a reason")
    return None if error is None else float(error), reason


def _remember(place: Path, new: _Known) -> None:
    """Add findings to the file atomically. Of two concurrent writers one may lose a finding, which is then measured again."""
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({**_read(place), **new}, indent=1) + "\n", encoding="utf-8")
        os.replace(temporary, place)
    except OSError:  # full or read-only disk: the next process measures again
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _engine(engine: str) -> Run:
    def run(path: Path, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        with load_runner(path, engine, threads=1) as runner:
            return runner.run(feeds)

    return run


def _measure(engine: str, form: str, arithmetic: Arithmetic, run: Run) -> KernelFinding:
    import onnx

    from lightning_accel.engines.kernel_forms import kernel_file

    about = (engine, engine_version(engine), form, arithmetic)
    file = kernel_file(form, arithmetic)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "probe.onnx"
        onnx.save(file.model(), path)
        try:
            got = run(path, file.feeds)
        except ImportError:
            raise
        except Exception as error:  # engines raise unrelated types
            return KernelFinding(*about, None, str(error).partition("\n")[0])
    errors = [float(np.abs(got[e.name] - e.real).max() / e.step) for e in file.expected]
    if not np.isfinite(errors).all():
        return KernelFinding(*about, None, "its result is not finite")
    return KernelFinding(*about, round(max(errors), 4))
