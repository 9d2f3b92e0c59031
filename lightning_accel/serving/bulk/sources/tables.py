"""Rows of Parquet and CSV files."""

import io
from abc import abstractmethod
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.optional import require
from lightning_accel.engines.base import TensorSpec
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.serving.bulk.sources.base import EXTRA, WHAT, Reading, Rows, Source


class TableSource(Source):
    """Columns of a table: one with the name of each input, or the numbers of one input ``(N, F)``."""

    def _rows(self, table: Any, start: int) -> Rows:
        kept = {name: table.column(name) for name in self.reading.keep}
        return Rows(self._checked(self._feeds(table)), self.name, np.arange(start, start + table.num_rows), kept)

    @property
    @abstractmethod
    def columns(self) -> list[str]:
        """Names of the table's columns."""

    def check(self) -> None:
        """Check the names of columns, and read the first row."""
        needed = [*self.reading.keep, *(self.reading.columns or ())]
        if missing := [name for name in needed if name not in self.columns]:
            raise InvalidArgumentError(
                f"Arguments `columns` and `keep` must name columns of {self.path}, of {self.columns}, but got {missing}."
            )
        super().check()

    def _feeds(self, table: Any) -> dict[str, np.ndarray]:
        names = [spec.name for spec in self.reading.inputs]
        if not self.reading.columns and all(self._is_whole(table, spec) for spec in self.reading.inputs):
            return {spec.name: self._column(table, spec) for spec in self.reading.inputs}
        (spec, *others) = self.reading.inputs
        chosen = self.reading.columns or tuple(name for name in self.columns if name not in self.reading.keep)
        width = spec.shape[1] if len(spec.shape) == 2 else None
        if others or len(spec.shape) != 2 or width not in (None, len(chosen)):
            raise InvalidArgumentError(
                f"Argument `data` must have a column for each of the inputs {names}, or, for one input (N, F), F columns of numbers, but "
                f"{self.path} has {self.columns}. Name the {'' if width is None else f'{width} '}columns with `columns`, and those that "
                "are no input with `keep`."
            )
        return {spec.name: np.stack([self._numbers(table, name) for name in chosen], axis=1)}

    def _is_whole(self, table: Any, spec: TensorSpec) -> bool:
        """Whether a column holds an input: a number in each row, or a list for a tensor."""
        if spec.name not in self.columns:
            return False
        nested = require("pyarrow", EXTRA, WHAT).types.is_nested(table.column(spec.name).type)
        return bool(nested == (len(spec.shape) > 1))

    def _numbers(self, table: Any, name: str) -> np.ndarray:
        column = table.column(name)
        if column.null_count:
            raise InvalidArgumentError(
                f"Argument `data` must hold a number in each row, but column `{name}` of {self.path} has empty cells. Fill or drop them."
            )
        array: np.ndarray = column.to_numpy()
        if array.dtype.kind not in "biuf":
            raise InvalidArgumentError(
                f"Argument `columns` must name columns of numbers, but `{name}` of {self.path} holds {column.type}. Copy it with `keep`."
            )
        return array

    def _column(self, table: Any, spec: TensorSpec) -> np.ndarray:
        """A column of numbers, or of lists of one length."""
        pyarrow = require("pyarrow", EXTRA, WHAT)
        column, sizes = table.column(spec.name).combine_chunks(), [table.num_rows]
        while pyarrow.types.is_nested(column.type):
            flat = column.flatten()
            width = len(flat) // max(len(column), 1)
            lengths = require("pyarrow.compute", EXTRA, WHAT).list_value_length(column)
            if column.null_count or any(n is not None and n != width for n in lengths.unique().to_pylist()):
                raise InvalidArgumentError(
                    f"Argument `data` must hold lists of one length for input `{spec.name}`, but in {self.path} their lengths differ."
                )
            sizes, column = [*sizes, width], flat
        if column.null_count:
            raise InvalidArgumentError(
                f"Argument `data` must hold numbers for input `{spec.name}`, but {self.path} has empty cells."
            )
        array = column.to_numpy(zero_copy_only=False)
        fixed = [size for size in spec.shape[1:] if size is not None]
        if len(sizes) == 2 and len(fixed) == len(spec.shape) - 1 and int(np.prod(fixed)) == sizes[1]:
            sizes = [sizes[0], *fixed]  # the tensor of a row as one list of numbers
        result: np.ndarray = array.reshape(sizes)
        return result


class ParquetSource(TableSource):
    """A Parquet file; row groups are read one by one."""

    def __init__(self, path: Path, name: str, reading: Reading) -> None:
        super().__init__(path, name, reading)
        pyarrow, parquet = require("pyarrow", EXTRA, WHAT), require("pyarrow.parquet", EXTRA, WHAT)
        try:
            self._file = parquet.ParquetFile(path)
        except (pyarrow.ArrowException, OSError) as error:
            raise InvalidArgumentError(f"Argument `data` must be a Parquet file, but got {path}: {error}") from error

    @property
    def rows(self) -> int:
        """Number of rows."""
        return int(self._file.metadata.num_rows)

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        return list(self._file.schema_arrow.names)

    def read(self, start: int, stop: int) -> Rows:
        """Rows from ``start`` to ``stop``."""
        pyarrow = require("pyarrow", EXTRA, WHAT)
        parts, first = [], 0
        for group in range(self._file.metadata.num_row_groups):
            count = self._file.metadata.row_group(group).num_rows
            low, high = max(start - first, 0), min(stop - first, count)
            if low < high:
                parts.append(self._file.read_row_group(group).slice(low, high - low))
            first += count
        return self._rows(pyarrow.concat_tables(parts), start)


class CsvSource(TableSource):
    """A CSV file with a header; each line is a row, so that cells can't hold line breaks."""

    def __init__(self, path: Path, name: str, reading: Reading) -> None:
        super().__init__(path, name, reading)
        with open(path, "rb") as file:
            self._header = file.readline()
            self._ends = _line_ends(file)
        if not self._header.strip():
            raise InvalidArgumentError(f"Argument `data` must be a CSV file with a header, but {path} is empty.")
        self._names: list[str] = self._parsed(self._header).column_names

    @property
    def rows(self) -> int:
        """Number of rows."""
        return len(self._ends) - 1

    @property
    def columns(self) -> list[str]:
        """Names of the table's columns."""
        return self._names

    def read(self, start: int, stop: int) -> Rows:
        """Rows from ``start`` to ``stop``."""
        with open(self.path, "rb") as file:
            file.seek(self._ends[start])
            lines = file.read(self._ends[stop] - self._ends[start])
        table = self._parsed(self._header + lines)
        if table.num_rows != stop - start:
            raise InvalidArgumentError(
                f"Argument `data` must have one line for each row, but lines {start + 2} to {stop + 1} of {self.path} hold "
                f"{table.num_rows} rows: a cell holds a line break, or a line is empty. Write Parquet."
            )
        return self._rows(table, start)

    def _parsed(self, text: bytes) -> Any:
        pyarrow, csv = require("pyarrow", EXTRA, WHAT), require("pyarrow.csv", EXTRA, WHAT)
        try:
            return csv.read_csv(io.BytesIO(text), read_options=csv.ReadOptions(use_threads=False))
        except pyarrow.ArrowException as error:
            raise InvalidArgumentError(
                f"Argument `data` must be a CSV file, but {self.path} can't be read: {error}"
            ) from error


def _line_ends(file: Any) -> np.ndarray:
    """Offset of the first line that follows, and of the end of each line."""
    start, ends = file.tell(), [np.array([file.tell()])]
    while block := file.read(2**24):
        breaks = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
        ends.append(breaks + start + 1)
        start += len(block)
    found = np.concatenate(ends)
    return found if found[-1] == start else np.append(found, start)  # a last line without a line break
