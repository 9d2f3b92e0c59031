"""Read the manifest of a bundle and check its files against their checksums."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path, PureWindowsPath
from typing import Any

from lightning_accel.errors import InvalidArgumentError, MissingFileError

MANIFEST = "manifest.json"
SCHEMA = 1


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits, computed in chunks, so that large files need little memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest_digest(manifest: Mapping[str, Any]) -> str:
    """SHA-256 of a manifest's content without its own field ``sha256``, written as sorted JSON without blanks.

    It detects damage, not manipulation; that needs a signature.
    """
    content = {key: value for key, value in manifest.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(content, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Read and check ``manifest.json`` of a bundle.

    Args:
        folder: the bundle's directory.

    Raises:
        MissingFileError: the directory has no manifest.
        InvalidArgumentError: not JSON, fields missing or of the wrong type, changed since it was written, or written by a newer
            version of this library.
    """
    path = Path(folder) / MANIFEST
    if not path.is_file():
        raise MissingFileError(f"Argument `path` must be a bundle with a {MANIFEST}, but got {folder}: it has none.")
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InvalidArgumentError(
            f"{path} must be JSON, but it can't be read: {error}. Export the bundle again."
        ) from error
    schema = manifest.get("schema") if isinstance(manifest, dict) else None
    if isinstance(schema, bool) or not isinstance(schema, int) or schema < 1:
        raise InvalidArgumentError(f"{path} must name its schema as an integer of at least 1, but got {schema!r}.")
    if schema > SCHEMA:
        raise InvalidArgumentError(
            f"{path} must have a schema of at most {SCHEMA}, but got {schema}. "
            "It was written by a newer version of this library: pip install --upgrade lightning-accel"
        )
    if manifest.get("sha256") != manifest_digest(manifest):
        raise InvalidArgumentError(
            f"{path} must have the SHA-256 of its own content, {manifest_digest(manifest)}, but got {manifest.get('sha256')!r}. "
            "It changed after it was written: copy or export the bundle again."
        )
    for field in ("files", "engines"):
        entries = manifest.get(field)
        if not isinstance(entries, dict) or not all(isinstance(entry, dict) for entry in entries.values()):
            raise InvalidArgumentError(f"{path} must have `{field}` as an object of objects. Export the bundle again.")
    result: dict[str, Any] = manifest
    return result


def resolve_bundle(folder: str | Path, engine: str | None) -> tuple[str, Path]:
    """Find the file of an engine in a bundle, and check the whole bundle against its manifest.

    Args:
        folder: the bundle's directory.
        engine: name of the engine; ``None`` takes the manifest's default.

    Returns:
        The engine's name and the path of its file.

    Raises:
        MissingFileError: no manifest, or a file it lists is missing.
        InvalidArgumentError: the manifest is broken or newer, the engine isn't in the bundle, a path leaves the bundle, or a
            file's SHA-256 isn't the one that was written.
    """
    folder = Path(folder)
    manifest = read_manifest(folder)
    if manifest.get("kind") == "language-model":
        raise InvalidArgumentError(
            f"Argument `path` must be a bundle of ModelExport, but got {str(folder)!r}, a language model: open it with "
            "`language_models.open_bundle`, or `lightning-accel generate`."
        )
    shipped = manifest["engines"]
    if engine is None:
        default = manifest.get("default")
        if not isinstance(default, dict) or not isinstance(default.get("engine"), str):
            raise InvalidArgumentError(
                f"{folder / MANIFEST} must name its default engine. Pass `engine`: one of {list(shipped)}."
            )
        engine, entry = default["engine"], default
    elif engine in shipped:
        entry = shipped[engine]
    elif engine in manifest.get("failed", {}):
        reason = manifest["failed"][engine]["reason"]
        raise InvalidArgumentError(
            f"Argument `engine` must be one of the bundle's engines {list(shipped)}, but got {engine!r}, which failed when the bundle was "
            f"written: {reason}"
        )
    else:
        raise InvalidArgumentError(
            f"Argument `engine` must be one of the bundle's engines {list(shipped)}, but got {engine!r}. "
            "Export again with that engine, so that it is verified, or load the file itself."
        )
    name = entry.get("file")
    if not isinstance(name, str) or name not in manifest["files"]:
        raise InvalidArgumentError(
            f"{folder / MANIFEST} must list the file of engine `{engine}`, but its file is {name!r}."
        )
    check_files(folder, manifest)
    return engine, folder / name


def check_files(folder: str | Path, manifest: Mapping[str, Any]) -> None:
    """Check each file that a manifest lists: it is there, inside the bundle, and the one that was written.

    Args:
        folder: the bundle's directory.
        manifest: from :func:`read_manifest`.

    Raises:
        MissingFileError: one is missing.
        InvalidArgumentError: a path leaves the bundle, or a file changed.
    """
    for name, entry in manifest["files"].items():
        _check_file(Path(folder), name, entry.get("sha256"))


def _check_file(folder: Path, name: str, expected: str | None) -> None:
    # Windows rules see drives and both separators on every system. Links are followed: caches of downloaded models
    # are made of them, and the SHA-256 holds for what they point to.
    parts = PureWindowsPath(name)
    if parts.drive or parts.root or ".." in parts.parts or "\\" in name:
        raise InvalidArgumentError(f"{folder / MANIFEST} must list only files inside the bundle, but got {name!r}.")
    if not (folder / name).is_file():
        raise MissingFileError(f"The bundle {folder} must hold `{name}`, but it is missing. Copy or export it again.")
    found = sha256_of(folder / name)
    if found != expected:
        raise InvalidArgumentError(
            f"`{name}` must have the SHA-256 in {MANIFEST}, {expected}, but got {found}. "
            "The file changed after it was verified: copy or export the bundle again."
        )
