"""Memory-mapped file of rows, each with a checksum."""

import os
import zlib
from pathlib import Path

import numpy as np

_CHECKSUM = 4  # bytes of the checksum before each row
_CHUNK = 65536  # rows per read


class RowFile:
    """Fixed-size rows on disk, shared by all processes that open it.

    A row is valid if its checksum matches its bytes *and its number*; rows that were never or partially written, damaged or
    misplaced are invalid.

    Args:
        path: file; created or resized if needed.
        rows: number of rows.
        row_bytes: bytes in a row.

    Raises:
        OSError: the disk has no space for all rows, which is reserved at once.

    Example:
        >>> file = RowFile("logits.rows", rows=3, row_bytes=2)
        >>> file.write(np.array([1]), np.array([[7, 8]], dtype=np.uint8))
        >>> file.valid().tolist()
        [False, True, False]
    """

    def __init__(self, path: str | Path, rows: int, row_bytes: int) -> None:
        self.path = Path(path)
        shape = (rows, _CHECKSUM + row_bytes)
        size = shape[0] * shape[1]
        with open(self.path, "ab"):
            pass
        with open(self.path, "r+b") as file:
            if self.path.stat().st_size != size:
                file.truncate(size)
            if size and hasattr(os, "posix_fallocate"):
                # Rows are written through a memory map: without space for one, the system would kill the process (SIGBUS).
                os.posix_fallocate(file.fileno(), 0, size)
        self._rows: np.memmap = np.memmap(self.path, np.uint8, "r+", shape=shape)

    def write(self, index: np.ndarray, rows: np.ndarray) -> None:
        """Write rows.

        Args:
            index: ``(N,)``, row numbers.
            rows: ``(N, row_bytes)``, uint8.
        """
        sums = np.array([_checksum(i, row) for i, row in zip(index.tolist(), rows, strict=True)], dtype="<u4")
        self._rows[index] = np.concatenate([sums.view(np.uint8).reshape(-1, _CHECKSUM), rows], axis=1)

    def read(self, index: np.ndarray) -> np.ndarray:
        """Rows ``(N, row_bytes)``, uint8, without validation; see :meth:`valid`."""
        return np.asarray(self._rows)[index, _CHECKSUM:]  # several times faster than indexing a memmap

    def valid(self) -> np.ndarray:
        """Mask of valid rows: ``(rows,)``, bool."""
        found = np.zeros(len(self._rows), dtype=bool)
        for start in range(0, len(self._rows), _CHUNK):
            chunk = np.asarray(self._rows[start : start + _CHUNK])
            sums = chunk[:, :_CHECKSUM].copy().view("<u4")[:, 0].tolist()
            found[start : start + _CHUNK] = [
                _checksum(start + i, chunk[i, _CHECKSUM:]) == s for i, s in enumerate(sums)
            ]
        return found

    def flush(self) -> None:
        """Flush all data to disk."""
        self._rows.flush()


def _checksum(number: int, row: np.ndarray) -> int:
    return zlib.crc32(row.tobytes(), zlib.crc32(number.to_bytes(8, "little")))
