"""Write the results of some rows as one Parquet file, at once or not at all."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from lightning_accel.core.optional import require
from lightning_accel.serving.bulk.sources.base import Rows

SOURCE, ROW = "source", "row"  # columns of the output that say which row of which file it is of


def part_path(out: Path, index: int) -> Path:
    """File of a part."""
    return out / f"part-{index:06d}.parquet"


def write_part(out: Path, index: int, rows: Rows, outputs: dict[str, np.ndarray]) -> None:
    """Write a part: columns ``source`` and ``row``, the kept ones, and one for each output, lists for tensors.

    Args:
        out: the folder.
        index: number of the part.
        rows: the rows.
        outputs: results by name, each ``(S, ...)``.
    """
    pyarrow, parquet = (
        require("pyarrow", "predict", "`predict_files`"),
        require("pyarrow.parquet", "predict", "`predict_files`"),
    )
    count = len(rows.numbers)
    files = rows.files if isinstance(rows.files, list) else [rows.files] * count
    columns: dict[str, Any] = {
        SOURCE: pyarrow.array(files, pyarrow.string()),
        ROW: pyarrow.array(rows.numbers, pyarrow.int64()),
        **rows.kept,
        **{name: _column(array) for name, array in outputs.items()},
    }
    temporary = out / f".{part_path(out, index).name}.{os.getpid()}.tmp"
    try:
        parquet.write_table(pyarrow.table(columns), temporary)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, part_path(out, index))
    finally:
        temporary.unlink(missing_ok=True)


def _column(array: np.ndarray) -> Any:
    """An array ``(S, ...)`` as a column of numbers, or of lists of one length."""
    pyarrow = require("pyarrow", "predict", "`predict_files`")
    column = pyarrow.array(np.ascontiguousarray(array).reshape(-1))
    for size in reversed(array.shape[1:]):
        column = pyarrow.FixedSizeListArray.from_arrays(column, size)
    return column
