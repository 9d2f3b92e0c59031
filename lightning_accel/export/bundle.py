"""Bundle: the folder that ships. Written beside its place and moved there whole, so there is never half of one."""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lightning_accel import __version__
from lightning_accel.engines.manifest import MANIFEST, SCHEMA, sha256_of


def check_destination(dirpath: str | Path) -> None:
    """Check that a bundle could be written: before training, not after.

    Raises:
        ValueError: the path is a file, or a folder that holds something else.
        PermissionError: its parent can't be written to.
    """
    path = Path(dirpath)
    if path.is_file():
        raise ValueError(f"Argument `dirpath` must be a folder, but got the file {str(path)!r}.")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise ValueError(
            f"Argument `dirpath` must be a new folder or an earlier bundle, but got {str(path)!r}, which holds other files. "
            "A bundle replaces its folder whole: choose another one."
        )
    try:
        existing = next(p for p in (path.parent, *path.parent.parents) if p.exists())
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise PermissionError(
            f"Argument `dirpath` must lie in a folder that can be written to, but got {str(path)!r}: {error.strerror}."
        ) from error


@contextmanager
def staged(dirpath: str | Path) -> Iterator[Path]:
    """A temporary folder that takes the place of ``dirpath`` when the block ends well, and disappears when it doesn't."""
    path = Path(dirpath)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent))
            os.rename(path, old / "bundle")
        os.rename(temporary, path)
        if old is not None:
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` with the SHA-256 and size of each file in the folder."""
    files = {
        str(file.relative_to(folder)): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name != MANIFEST
    }
    manifest = {"schema": SCHEMA, "version": __version__, **content, "files": files}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n")
