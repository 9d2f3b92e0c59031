"""Read arrays from files of others: no Python objects, and no more memory than the file can fill."""

import os
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.lib import format as npy

from lightning_accel.errors import InvalidArgumentError

_DAMAGED = (ValueError, EOFError, OSError, KeyError, NotImplementedError, zipfile.BadZipFile)  # what readers raise


def read_arrays(path: str | Path, argument: str) -> np.ndarray | dict[str, np.ndarray]:
    """Read a ``.npy`` or ``.npz`` file.

    Args:
        path: an existing file.
        argument: what names the file, for the message: ``"--data"``.

    Returns:
        The array of a ``.npy`` file, the arrays of a ``.npz`` file by name.

    Raises:
        InvalidArgumentError: another kind of file, one that holds Python objects, an array whose shape claims other bytes than the file
            has, or more bytes than this machine has memory.
    """
    path = Path(path)
    try:
        if not zipfile.is_zipfile(path):
            with open(path, "rb") as file:
                _check_header(file, path.stat().st_size)
            return _array(np.load(path, allow_pickle=False))
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
            if (size := sum(member.file_size for member in members)) > _memory():
                raise ValueError(f"it holds {size:,} bytes, more than this machine has memory")
            for member in members:
                with archive.open(member) as file:
                    _check_header(file, member.file_size)
        with np.load(path, allow_pickle=False) as arrays:
            return {name: _array(arrays[name]) for name in arrays}
    except _DAMAGED as error:
        raise InvalidArgumentError(
            f"Argument `{argument}` must be a .npz or .npy file of plain arrays, but got {path}: {error}"
        ) from error


def read_named(path: str | Path, argument: str) -> dict[str, np.ndarray]:
    """Read a ``.npz`` file, see :func:`read_arrays`.

    Raises:
        InvalidArgumentError: another kind of file.
    """
    found = read_arrays(path, argument)
    if not isinstance(found, Mapping):
        raise InvalidArgumentError(f"Argument `{argument}` must be a .npz file, but got the one array {path}.")
    return found


def _check_header(file: IO[bytes], size: int) -> None:
    """Compare the size of a file in NumPy's format with the shape in its header.

    Raises:
        ValueError: they differ, or the array holds Python objects.
    """
    version = npy.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        return  # structured arrays, which NumPy checks itself; their names make a header of another form
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(file)
    if dtype.hasobject:
        raise ValueError("it holds Python objects, which aren't loaded")
    claimed, held = dtype.itemsize * _product(shape), size - file.tell()
    if claimed != held:
        raise ValueError(
            f"an array of shape {shape} and type {dtype} has {claimed:,} bytes, but the file holds {held:,}"
        )


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for length in shape:  # Python's integers don't overflow
        total *= length
    return total


def _memory() -> float:
    """Bytes of this machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not every system tells
        return float("inf")


def _array(value: Any) -> np.ndarray:
    """The value if it is an array; raw bytes of a member that isn't one are refused."""
    if not isinstance(value, np.ndarray):
        raise ValueError("a member is no array")
    return value
