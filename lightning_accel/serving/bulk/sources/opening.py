"""Find data files, and open each as what it is."""

from collections.abc import Sequence
from pathlib import Path

from lightning_accel.errors import InvalidArgumentError, MissingFileError
from lightning_accel.serving.bulk.sources.arrays import ArraySource
from lightning_accel.serving.bulk.sources.base import Reading, Source
from lightning_accel.serving.bulk.sources.images import IMAGES, ImageSource
from lightning_accel.serving.bulk.sources.tables import CsvSource, ParquetSource

TABLES = (".csv", ".parquet")
ARRAYS = (".npy", ".npz")


def open_source(path: Path, name: str, reading: Reading) -> Source:
    """Open a file, or a folder of images."""
    kinds: dict[str, type[Source]] = {
        ".npz": ArraySource,
        ".npy": ArraySource,
        ".csv": CsvSource,
        ".parquet": ParquetSource,
    }
    kind = ImageSource if path.is_dir() or path.suffix.lower() in IMAGES else kinds[path.suffix.lower()]
    return kind(path, name, reading)


def files_of(data: Sequence[Path]) -> list[tuple[Path, str]]:
    """Data files and folders of images, with their names in the output; a folder of tables or arrays is its files, sorted.

    Raises:
        MissingFileError: a path isn't there.
        InvalidArgumentError: a file of another kind, a folder without data, or two of one name.
    """
    found: list[tuple[Path, str]] = []
    for path in (one.resolve() for one in data):  # a worker may have another working folder
        if not path.exists():
            raise MissingFileError(f"Argument `data` must be files that exist, but got {path}: nothing is there.")
        below = (
            sorted(f for f in path.rglob("*") if f.is_file() and not f.name.startswith(".")) if path.is_dir() else []
        )
        tables = [f for f in below if f.suffix.lower() in (*TABLES, *ARRAYS)]
        images = [f for f in below if f.suffix.lower() in IMAGES]
        if path.is_dir() and bool(tables) == bool(images):
            what = "both" if tables else "none"
            raise InvalidArgumentError(
                f"Argument `data` must be a folder of images, or of tables and arrays, but {path} holds {what}."
            )
        if path.is_file() and path.suffix.lower() not in (*TABLES, *ARRAYS, *IMAGES):
            known = ", ".join((*TABLES, *ARRAYS, *IMAGES))
            raise InvalidArgumentError(f"Argument `data` must be files of the kinds {known}, but got {path}.")
        found += [(f, f"{path.name}/{f.relative_to(path).as_posix()}") for f in tables] or [(path, path.name)]
    names = [name for _, name in found]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise InvalidArgumentError(
            f"Argument `data` must hold files of different names, which the output tells rows by, but got {twice} twice."
        )
    return found
