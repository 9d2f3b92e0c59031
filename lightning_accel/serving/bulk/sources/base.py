"""Rows of files as the inputs of a bundle: what every kind of file has in common."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError

EXTRA, WHAT = "predict", "`predict_files`"  # for messages about missing packages


@dataclass(frozen=True)
class Reading:
    """How columns and pixels become inputs.

    Args:
        inputs: of the bundle.
        columns: columns of the values of each row, in their order, for a bundle with one input ``(N, F)``.
        keep: columns that are copied to the output.
        pixel_scale: factor on the values of pixels, 0 to 255, for inputs in floating point.
    """

    inputs: tuple[TensorSpec, ...]
    columns: tuple[str, ...] = ()
    keep: tuple[str, ...] = ()
    pixel_scale: float | None = None


@dataclass(frozen=True)
class Rows:
    """Some rows of a source.

    Args:
        feeds: inputs by name, each ``(S, ...)``.
        files: where each row comes from: ``(S,)`` strings, or one for all.
        numbers: number of each row in its file, from 0: ``(S,)``.
        kept: columns that are copied, by name.
    """

    feeds: dict[str, np.ndarray]
    files: str | list[str]
    numbers: np.ndarray
    kept: dict[str, Any] = field(default_factory=dict)


class Source(ABC):
    """A file, or a folder of images, as rows.

    Args:
        path: of the file or folder.
        name: of it, in the output.
        reading: how rows become inputs.
    """

    def __init__(self, path: Path, name: str, reading: Reading) -> None:
        self.path, self.name, self.reading = path, name, reading

    @property
    @abstractmethod
    def rows(self) -> int:
        """Number of rows."""

    @abstractmethod
    def read(self, start: int, stop: int) -> Rows:
        """Rows from ``start`` to ``stop``.

        Raises:
            InvalidArgumentError: they don't fit the inputs.
        """

    def check(self) -> None:
        """Read the first row, so that what doesn't fit is known before anything is computed."""
        if self.rows:
            self.read(0, 1)

    def _checked(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The inputs in the bundle's types and shapes."""
        found = {}
        for spec in self.reading.inputs:
            array = _cast(feeds[spec.name], spec, self.path)
            try:
                spec.check(array)
            except ValueError as error:
                raise InvalidArgumentError(
                    f"Argument `data` must fit the bundle's inputs: in {self.path}, {error}"
                ) from error
            found[spec.name] = array
        return found


def _cast(array: np.ndarray, spec: TensorSpec, path: Path) -> np.ndarray:
    """Numbers of a file in the type of an input, where no value changes by more than rounding.

    Raises:
        InvalidArgumentError: they don't fit.
    """
    if array.dtype == spec.dtype:
        return np.ascontiguousarray(array)
    both_float = array.dtype.kind == "f" and spec.dtype.kind == "f"
    if both_float or (array.dtype.kind in "biu" and spec.dtype.kind == "f"):
        return np.ascontiguousarray(array, spec.dtype)
    cast = array.astype(spec.dtype) if array.dtype.kind in "biu" and spec.dtype.kind in "biu" else None
    if cast is None or not (np.array_equal(cast.astype(array.dtype), array) and np.array_equal(cast < 0, array < 0)):
        raise InvalidArgumentError(
            f"Argument `data` must hold values of {spec.dtype} for input `{spec.name}`, but {path} holds {array.dtype}"
            f"{' of a larger range' if cast is not None else ''}. Convert them before."
        )
    return cast


def check_no_columns(path: Path, reading: Reading) -> None:
    """Raise if columns are named for data that has none."""
    if reading.columns or reading.keep:
        raise InvalidArgumentError(
            f"Arguments `columns` and `keep` must be left out for data that has no columns, but got {[*reading.columns, *reading.keep]} "
            f"for {path}."
        )
