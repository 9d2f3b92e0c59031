"""Rows of ``.npz`` and ``.npy`` files."""

from pathlib import Path

import numpy as np

from lightning_accel.core.arrays import read_arrays
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.sources.base import Reading, Rows, Source, check_no_columns


class ArraySource(Source):
    """A ``.npz`` file with an array for each input, or a ``.npy`` file for the only input."""

    def __init__(self, path: Path, name: str, reading: Reading) -> None:
        super().__init__(path, name, reading)
        check_no_columns(path, reading)
        found = read_arrays(path, "data")
        names = [spec.name for spec in reading.inputs]
        if isinstance(found, np.ndarray):
            if len(names) > 1:
                raise InvalidArgumentError(
                    f"Argument `data` must hold an array for each of the inputs {names}, but got the one array {path}. Write a .npz file."
                )
            found = {names[0]: found}
        if missing := [name for name in names if name not in found]:
            raise InvalidArgumentError(
                f"Argument `data` must hold the inputs {names}, but {path} holds {sorted(found)}, and none for {missing}."
            )
        self._arrays = {name: found[name] for name in names}
        lengths = {name: array.shape[:1] for name, array in self._arrays.items()}
        if len(set(lengths.values())) > 1 or () in lengths.values():
            raise InvalidArgumentError(
                f"Argument `data` must hold as many rows of each input, but {path} has arrays of shapes "
                f"{ {name: array.shape for name, array in self._arrays.items()} }."
            )

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(next(iter(self._arrays.values())))

    def read(self, start: int, stop: int) -> Rows:
        """Rows from ``start`` to ``stop``."""
        feeds = {name: array[start:stop] for name, array in self._arrays.items()}
        return Rows(self._checked(feeds), self.name, np.arange(start, stop))
