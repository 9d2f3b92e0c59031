"""Write bundles atomically: each is written to a temporary folder that then replaces the destination."""

import ctypes
import errno
import glob
import json
import os
import platform
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from lightning_accel import __version__
from lightning_accel.core.arguments import shown
from lightning_accel.engines.manifest import MANIFEST, SCHEMA, check_files, manifest_digest, read_manifest, sha256_of
from lightning_accel.engines.tensorrt.cuda import has_gpu
from lightning_accel.engines.tensorrt.library import EngineInfo, sidecar_of
from lightning_accel.errors import FilePermissionError, InvalidArgumentError

COMPARISON = "comparison.json"
_OWNER = f"{platform.node()}-"  # folders may be shared between machines, whose process numbers are their own


def expanded(dirpath: str | os.PathLike[str]) -> str:
    """The path with a leading ``~`` replaced by the home folder."""
    return os.path.expanduser(os.fspath(dirpath))


def check_destination(dirpath: str | Path, needed: int = 0) -> None:
    """Check before training that a bundle can be written.

    Args:
        dirpath: its folder.
        needed: bytes that bundle and checkpoint take at least.

    Raises:
        InvalidArgumentError: the path is a file, a folder with other content, a link to nothing, or too long; or the disk is too full.
        FilePermissionError: its parent can't be written to.
    """
    try:
        _check_destination(Path(dirpath), needed)
    except OSError as error:
        if isinstance(error, FilePermissionError):
            raise
        raise InvalidArgumentError(
            f"Argument `dirpath` must be the path of a folder, but got {shown(str(dirpath))}: {error.strerror}."
        ) from error


def _check_destination(path: Path, needed: int) -> None:
    if path.is_symlink() and not path.exists():
        raise InvalidArgumentError(
            f"Argument `dirpath` must be a folder, but got {str(path)!r}, a link to {os.readlink(path)!r}, where nothing is. Create that "
            "folder, or remove the link."
        )
    checkpoint = Path(f"{str(path).rstrip('/')}.ckpt")
    if checkpoint.is_dir():
        raise InvalidArgumentError(
            f"Argument `dirpath` must leave {str(checkpoint)!r} for the checkpoint, but got {str(path)!r}: that is a folder. Rename it, or "
            "choose another path."
        )
    if path.is_file():
        raise InvalidArgumentError(f"Argument `dirpath` must be a folder, but got the file {str(path)!r}.")
    if path.is_dir() and any(path.iterdir()) and not (path / MANIFEST).is_file():
        raise InvalidArgumentError(
            f"Argument `dirpath` must be a new folder or an earlier bundle, but got {str(path)!r}, which holds other files. "
            "A bundle replaces its folder whole: choose another one."
        )
    here = Path.cwd()
    if path.exists() and (path.resolve() == here or path.resolve() in here.parents):
        raise InvalidArgumentError(
            f"Argument `dirpath` must not hold the current folder, but got {str(path)!r}: a bundle replaces its folder whole."
        )
    parent = path.resolve().parent
    existing = next(p for p in (parent, *parent.parents) if p.exists())
    try:
        os.rmdir(
            tempfile.mkdtemp(prefix=_prefix(path), dir=existing)
        )  # as `staged` will, so that the name is not too long, either
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.ENAMETOOLONG):
            raise
        raise FilePermissionError(
            f"Argument `dirpath` must lie in a folder that can be written to, but got {str(path)!r}: {error.strerror}."
        ) from error
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise InvalidArgumentError(
            f"Argument `dirpath` must lie on a disk with at least {needed / 1e6:,.1f} MB free for checkpoint and bundle, but got "
            f"{str(path)!r}, where {free / 1e6:,.1f} MB are free."
        )


def _prefix(path: Path) -> str:
    """Beginning of the names of temporary folders beside a bundle."""
    return f".{path.name}.{_OWNER}{os.getpid()}."


def check_recordable(folder: str | Path) -> None:
    """Check before measuring that a comparison can be recorded in a bundle.

    Raises:
        InvalidArgumentError: the bundle can't be swapped with another folder without loss.
        FilePermissionError: the folder that it lies in can't be written to.
    """
    path, here = Path(folder).resolve(), Path.cwd()
    if path == here or path in here.parents:
        raise InvalidArgumentError(
            f"Argument `record` must be False (`--no-record`) for a bundle that holds the current folder, but got {path}: recording puts "
            "a new folder in its place. Run it from outside of the bundle."
        )
    if path.is_mount():
        raise InvalidArgumentError(
            f"Argument `record` must be False (`--no-record`) for a bundle that is a mount point, but got {path}: recording puts a new "
            "folder in its place. Mount the folder that it lies in."
        )
    try:
        check_destination(path)
    except PermissionError as error:
        raise FilePermissionError(
            f"Argument `record` must be False (`--no-record`) for a bundle in a folder that can't be written to, but got {path}."
        ) from error


@contextmanager
def staged(dirpath: str | Path) -> Iterator[Path]:
    """Yield a temporary folder that replaces ``dirpath`` after the block, and is deleted if the block raises.

    The two folders are swapped in one step (on Linux), so that a killed process leaves either the old or the new bundle.
    Temporary folders of killed processes are removed by the next one.
    """
    path = Path(dirpath).resolve()  # a link stays: what it leads to is replaced
    path.parent.mkdir(parents=True, exist_ok=True)
    _sweep(path)
    temporary = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if not path.exists():
            os.rename(temporary, path)
        elif not _exchange(temporary, path):
            old = Path(tempfile.mkdtemp(prefix=_prefix(path), dir=path.parent))
            os.rename(path, old / "bundle")
            os.rename(temporary, path)
            shutil.rmtree(old)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swap two folders in one step; returns whether the system and file system support it."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old C library
        return False
    here = -100  # AT_FDCWD: paths are relative to the current folder
    if rename(here, os.fsencode(first), here, os.fsencode(second), 2) == 0:  # 2: RENAME_EXCHANGE
        return True
    if ctypes.get_errno() in (errno.EINVAL, errno.ENOSYS):  # the file system can't
        return False
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), str(second))


def _sweep(path: Path) -> None:
    """Remove temporary folders beside the bundle whose processes on this machine have ended."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(_OWNER)}*"):
        number = left.name.removeprefix(f".{path.name}.{_OWNER}").split(".")[0]
        if number.isdigit() and int(number) != os.getpid() and not _runs(int(number)):
            shutil.rmtree(left, ignore_errors=True)


def _runs(process: int) -> bool:
    if os.name == "nt":  # where signal 0 is Ctrl+C; nothing is swept there
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def write_manifest(folder: Path, content: Mapping[str, Any]) -> None:
    """Write ``manifest.json`` with the SHA-256 and size of each file in the folder, and of itself."""
    files = {
        str(file.relative_to(folder)): {"sha256": sha256_of(file), "bytes": file.stat().st_size}
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file != folder / MANIFEST
    }
    manifest = {"schema": SCHEMA, "version": __version__, **content, "files": files}
    text = json.dumps({"sha256": manifest_digest(manifest), **manifest}, indent=2, allow_nan=False)
    temporary = folder / f".{MANIFEST}.{os.getpid()}.tmp"
    try:
        temporary.write_text(text + "\n")
        os.replace(temporary, folder / MANIFEST)
    finally:
        temporary.unlink(missing_ok=True)


def record_verification(folder: str | Path, result: Mapping[str, Any]) -> None:
    """Add a verification on this machine to a bundle's manifest, under ``verified_on``.

    Raises:
        InvalidArgumentError: the bundle changed after it was written.
    """
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    kept = {key: value for key, value in manifest.items() if key not in ("sha256", "schema", "version", "files")}
    write_manifest(Path(folder), {**kept, "verified_on": [*kept.get("verified_on", []), dict(result)]})


def record_comparison(folder: str | Path, comparison: Mapping[str, Any], default: Mapping[str, str] | None) -> None:
    """Store a comparison in a bundle as ``comparison.json``, and its decision in the manifest.

    A copy of the bundle with the same files is assembled beside it and replaces it in one step. Other files in
    the folder are kept, and are listed from then on.

    Args:
        folder: the bundle.
        comparison: content of the file; its ``decision``, if any, goes into the manifest.
        default: engine and file that ``load_runner`` uses from then on; ``None`` keeps the current ones.

    Raises:
        InvalidArgumentError: the bundle changed after it was written.
    """
    with _rewritten(folder) as (new, content):
        write_comparison(new, comparison)
        write_manifest(new, {**content, **decided(comparison, default)})


def record_decision(folder: str | Path, decision: Mapping[str, Any], default: Mapping[str, str]) -> None:
    """Store in a bundle's manifest which engine and file ``load_runner`` uses from then on, and why.

    Args:
        folder: the bundle.
        decision: JSON values, e.g. ``ship`` and ``why``.
        default: ``engine`` and ``file``.

    Raises:
        InvalidArgumentError: the bundle changed after it was written.
    """
    with _rewritten(folder) as (new, content):
        write_manifest(new, {**content, "decision": dict(decision), "default": dict(default)})


@contextmanager
def _rewritten(folder: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """A copy of a bundle without its manifest, which replaces it in one step, and the manifest's content."""
    folder = Path(folder).resolve()
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    content = {key: value for key, value in manifest.items() if key not in ("sha256", "schema", "version", "files")}
    with staged(folder) as new:
        for file in (file for file in folder.rglob("*") if file.is_file() and file != folder / MANIFEST):
            place = new / file.relative_to(folder)
            place.parent.mkdir(parents=True, exist_ok=True)
            _link_or_copy(file, place)
        yield new, content


def write_comparison(folder: Path, comparison: Mapping[str, Any]) -> None:
    """Write ``comparison.json`` into a folder that is not a bundle yet."""
    (folder / COMPARISON).unlink(missing_ok=True)  # it may be a link to the file in the bundle that is replaced
    (folder / COMPARISON).write_text(json.dumps(comparison, indent=2, allow_nan=False) + "\n")


def decided(comparison: Mapping[str, Any], default: Mapping[str, str] | None) -> dict[str, Any]:
    """Changes to a manifest by a decision."""
    decision = comparison.get("decision")
    changed: dict[str, Any] = {} if decision is None else {"decision": decision}
    return changed if default is None else {**changed, "default": dict(default)}


def _link_or_copy(source: Path, place: Path) -> None:
    try:
        os.link(source, place)
    except OSError:  # a file system without links, or a limit on them
        shutil.copy2(source, place)


def replace_engine(folder: str | Path, build: Callable[[Path, Path], EngineInfo]) -> tuple[EngineInfo, Path]:
    """Replace the TensorRT engine of a bundle by a newly built one, and update the manifest.

    Args:
        folder: the bundle.
        build: function of the ONNX file and the path of the engine to build.

    Returns:
        Facts about the new engine, and the path of the ONNX file.

    Raises:
        InvalidArgumentError: the bundle has no TensorRT engine, or changed after it was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    check_files(folder, manifest)
    line = manifest["engines"].get("tensorrt")
    if line is None:
        raise InvalidArgumentError(
            f"Argument `model` must be a bundle with an engine of tensorrt, but {folder} has {list(manifest['engines'])}."
        )
    source = folder / line["built_from"]
    place = folder / line["file"]
    with tempfile.TemporaryDirectory(prefix=".engine.", dir=folder) as scratch:
        built = build(source, Path(scratch) / place.name)
        os.replace(built.path, place)  # a crash from here on leaves files that the manifest refuses
    info = replace(built, path=place, onnx=Path(os.path.relpath(source, place.parent)).as_posix())
    sidecar_of(place).write_text(json.dumps(info.to_dict(), indent=2) + "\n")
    line = {**line, "library": info.library, "version": info.version, "status": info.status, "runs_here": has_gpu()}
    kept = {key: value for key, value in manifest.items() if key not in ("sha256", "schema", "version", "files")}
    write_manifest(folder, {**kept, "engines": {**manifest["engines"], "tensorrt": line}})
    return info, source
