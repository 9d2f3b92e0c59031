"""Runner: the interface of all engines, from named numpy arrays to named numpy arrays."""

import inspect
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, NoReturn, Self

import numpy as np

from lightning_accel.core.arguments import NOT_EMPTY, at_least, checked
from lightning_accel.engines.manifest import resolve_bundle
from lightning_accel.engines.registry import engine_named, engine_names, suffixes
from lightning_accel.errors import EngineError, InvalidArgumentError, InvalidArgumentTypeError, MissingFileError


@dataclass(frozen=True)
class TensorSpec:
    """Name, dtype and shape of one input or output; ``None`` in ``shape`` is a dynamic dimension."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int | None, ...]

    def check(self, value: Any) -> None:
        """Raise unless ``value`` is an array of this dtype, rank and fixed dimensions.

        Raises:
            InvalidArgumentTypeError: not a numpy array, or of another dtype. Nothing is cast: a silent cast between floats and
                integers, or from float64 to float32, hides a preprocessing mistake.
            InvalidArgumentError: another rank, or another size in a fixed dimension.
        """
        if not isinstance(value, np.ndarray):
            raise InvalidArgumentTypeError(
                f"Argument `feeds` must give input `{self.name}` as a numpy array, but got {type(value).__name__}."
            )
        if value.dtype != self.dtype:
            raise InvalidArgumentTypeError(
                f"Argument `feeds` must give input `{self.name}` as {self.dtype}, but got {value.dtype}. "
                f"Convert it if this is intended: `.astype(np.{self.dtype})`."
            )
        shape = "(" + ", ".join("any" if size is None else str(size) for size in self.shape) + ")"
        if value.ndim != len(self.shape):
            raise InvalidArgumentError(
                f"Argument `feeds` must give input `{self.name}` with {len(self.shape)} dimensions {shape}, "
                f"but got {value.ndim}: {value.shape}."
            )
        if any(want is not None and want != got for want, got in zip(self.shape, value.shape, strict=True)):
            raise InvalidArgumentError(
                f"Argument `feeds` must give input `{self.name}` in shape {shape}, but got {value.shape}."
            )


class Runner(ABC):
    """A network ready to run on one engine.

    Use it as a context manager or call :meth:`close`; it may be called from several threads.

    Example:
        >>> with load_runner("artifacts") as runner:  # doctest: +SKIP
        ...     logits = runner(images)  # images: float32 (N, 3, 32, 32)
        ...     logits = runner.run({"images": images})["logits"]
    """

    engine: ClassVar[str]
    check_finite = False  # set by `load_runner`

    def __init__(self, path: str | Path, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]) -> None:
        self.path = Path(path)
        self.inputs = tuple(inputs)
        self.outputs = tuple(outputs)
        self._lock = threading.Lock()  # for engines without concurrent calls
        self._closed = False

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of the inputs, in the order of the file."""
        return tuple(spec.name for spec in self.inputs)

    @property
    def output_names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of the file."""
        return tuple(spec.name for spec in self.outputs)

    def run(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run the network once.

        Args:
            feeds: one array for each name in :attr:`input_names`.

        Raises:
            InvalidArgumentTypeError: an array of another dtype; nothing is cast.
            InvalidArgumentError: an input missing or unknown, or an array of another shape.
            InvalidArgumentError: with ``check_finite``, an input holds NaN or infinity.
            EngineError: the runner is closed; with ``check_finite``, an output holds NaN or infinity.
        """
        names = self.input_names
        if missing := [name for name in names if name not in feeds]:
            raise InvalidArgumentError(
                f"Argument `feeds` must have the inputs {list(names)}, but got none for {missing}."
            )
        if unknown := [name for name in feeds if name not in names]:
            raise InvalidArgumentError(
                f"Argument `feeds` must have only the inputs {list(names)}, but got also {unknown}."
            )
        for spec in self.inputs:
            spec.check(feeds[spec.name])
            if self.check_finite and (found := _not_finite(feeds[spec.name])):
                raise InvalidArgumentError(
                    f"Argument `feeds` must hold finite numbers, but got {found} in input `{spec.name}`. Int8 turns them into ordinary "
                    "numbers: clean the input."
                )
        arrays = self._execute({name: np.ascontiguousarray(feeds[name]).reshape(feeds[name].shape) for name in names})
        outputs = dict(zip(self.output_names, arrays, strict=True))
        for name, array in outputs.items():
            if self.check_finite and (found := _not_finite(array)):
                raise EngineError(f"Output `{name}` of `{self.path.name}` has {found}, although the inputs are finite.")
        return outputs

    def __call__(self, *arrays: np.ndarray, **named: np.ndarray) -> Any:
        """Run with arrays by position, in the order of :attr:`input_names`, or by name.

        Returns:
            The array of a network with one output, otherwise a dict of all outputs.

        Raises:
            InvalidArgumentTypeError: more arrays than inputs, or an input given twice.
        """
        if len(arrays) > len(self.inputs):
            raise InvalidArgumentTypeError(
                f"Argument `arrays` must hold at most {len(self.inputs)} arrays {list(self.input_names)}, "
                f"but got {len(arrays)}."
            )
        feeds = dict(zip(self.input_names, arrays, strict=False))
        if twice := sorted(feeds.keys() & named.keys()):
            raise InvalidArgumentTypeError(
                f"Argument `named` must not repeat inputs given by position, but got {twice}."
            )
        outputs = self.run({**feeds, **named})
        return next(iter(outputs.values())) if len(outputs) == 1 else outputs

    def warm_up(self, feeds: Mapping[str, np.ndarray] | None = None, *, calls: int = 3) -> None:
        """Run the network a few times, so that kernels and memory are selected before the first real call.

        Args:
            feeds: inputs as in :meth:`run`; default: zeros of one sample, for inputs whose other dimensions are fixed.
            calls: number of runs.

        Raises:
            InvalidArgumentError: no feeds for inputs with dynamic dimensions, or ``calls`` is below 1.
        """
        if calls < 1:
            raise InvalidArgumentError(f"Argument `calls` must be at least 1, but got {calls}.")
        if feeds is None:
            if unclear := [spec.name for spec in self.inputs if None in spec.shape[1:]]:
                raise InvalidArgumentError(
                    f"Argument `feeds` must be given for the inputs {unclear}, whose shapes are open."
                )
            feeds = {s.name: np.zeros([1 if n is None else n for n in s.shape], s.dtype) for s in self.inputs}
        for _ in range(calls):
            self.run(feeds)

    def close(self) -> None:
        """Release the engine's memory after running calls have finished; a second call has no effect."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._release()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __reduce__(self) -> NoReturn:
        raise InvalidArgumentTypeError(
            f"A runner must be loaded in the process that runs it, but got {self!r} to copy or pickle: pass its path, and call "
            "`load_runner` there."
        )

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.path.name!r}, inputs={self.input_names}, outputs={self.output_names})"

    def _check_open(self) -> None:
        """Raise if closed. Engines call it once they hold their lock or their own reference to the engine."""
        if self._closed:
            raise EngineError(f"The runner of `{self.path.name}` is closed: load it again with `load_runner`.")

    @abstractmethod
    def _execute(self, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        """Return the outputs in order; ``feeds`` are checked, contiguous and in the order of the inputs."""

    @abstractmethod
    def _release(self) -> None:
        """Release the engine's memory."""


def _not_finite(array: np.ndarray) -> str:
    """How many values of an array are NaN or infinite, in words; empty if none is."""
    if array.dtype.kind not in "fc" or np.isfinite(array).all():
        return ""
    return f"{int(np.isnan(array).sum())} NaN and {int(np.isinf(array).sum())} infinite values"


@checked(path=NOT_EMPTY, threads=at_least(1))
def load_runner(
    path: str | Path,
    engine: str | None = None,
    *,
    threads: int | None = None,
    check_finite: bool = False,
    **options: Any,
) -> Runner:
    """Load a network to run it: numpy in, numpy out, without torch unless the engine is PyTorch.

    Args:
        path: a bundle (a directory with ``manifest.json``), or one file: ``.onnx``, ``.engine``, ``.xml``, ``.pt2``.
        engine: ``"onnxruntime"``, ``"openvino"``, ``"tensorrt"``, ``"pytorch"`` or another registered engine. Default: the one that
            the bundle's manifest names, or the one that the file's suffix belongs to.
        threads: CPU threads of the engine. Default: the engine's own choice.
        check_finite: raise an error if an input or an output holds NaN or infinity. An int8 network turns NaN into an ordinary
            number, so that its outputs don't show it.
        options: further arguments of the engine's runner, e.g. ``providers=("CUDAExecutionProvider",)``.

    Raises:
        MissingFileError: nothing at ``path``.
        InvalidArgumentError: unknown engine, a damaged or newer bundle, or a file that isn't the one in the manifest.
        MissingPackageError: the engine is not installed; the message names the extra.

    Example:
        >>> runner = load_runner("artifacts")  # doctest: +SKIP
        >>> runner(images).shape  # doctest: +SKIP
        (32, 10)
    """
    path = Path(path)
    if engine is not None:
        engine_named(engine)
    if not path.exists():
        raise MissingFileError(f"Argument `path` must be a bundle or a model file, but got {path}: nothing is there.")
    if path.is_dir():
        engine, path = resolve_bundle(path, engine)
        if engine not in engine_names():
            raise InvalidArgumentError(
                f"The bundle's default engine must be one of {sorted(engine_names())}, but it is {engine!r}."
            )
    elif engine is None:
        engine = suffixes().get(path.suffix)
        if engine is None:
            raise InvalidArgumentError(
                f"Argument `path` must end in one of {sorted(suffixes())}, but got {path.name!r}."
            )
    runner: type[Runner] = engine_named(engine).load_runner_class()
    accepted = [name for name in inspect.signature(runner).parameters if name not in ("path", "threads")]
    if unknown := [name for name in options if name not in accepted]:
        raise InvalidArgumentTypeError(
            f"Argument `options` must be among those of engine `{engine}`, {accepted}, but got {unknown}."
        )
    loaded = runner(path, threads=threads, **options)  # type: ignore[call-arg]  # each engine has its own options
    loaded.check_finite = check_finite
    return loaded
