"""Read the manifest of a bundle and check its files against their checksums."""

import hashlib
import json
import mmap
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

from lightning_accel.errors import InvalidArgumentError, MissingFileError

MANIFEST = "manifest.json"
SCHEMA = 1
# An entry of a tensor's external data (tag, length) with the key "location"; the length of its value follows.
_EXTERNAL = re.compile(rb"\x6a(?:[\x00-\x7f]|[\x80-\xff][\x00-\x7f])\x0a\x08location\x12")


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
    except (ValueError, RecursionError) as error:  # also brackets within brackets within brackets
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
        if name.endswith(".onnx"):
            _check_external(Path(folder), name, manifest["files"])


def _places(folder: Path) -> list[Path]:
    """Folders that a bundle's links may lead to: itself, and the blobs of a cache of the Hugging Face Hub that it is a snapshot in."""
    cache = [folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else []
    return [folder, *cache]


def _check_external(folder: Path, name: str, listed: Mapping[str, Any]) -> None:
    """Check that an ONNX file reads its weights from files in the manifest only.

    Its bytes are searched for the entries of external tensors (field 13 of a tensor, with the key ``location``), since the package onnx,
    which would parse them, isn't needed to run a bundle.
    """
    file = folder / name
    if not file.stat().st_size:
        return
    with open(file, "rb") as opened, mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as content:
        for found in _EXTERNAL.finditer(content):
            length, start = _varint(content, found.end())
            location = bytes(content[start : start + length]).decode("utf-8", "replace")
            path = PurePosixPath(name).parent / location
            if path.as_posix() not in listed:
                raise InvalidArgumentError(
                    f"`{name}` must read its weights from files that {MANIFEST} lists, but it reads {location!r}. Export the bundle again."
                )


def _varint(content: mmap.mmap, place: int) -> tuple[int, int]:
    """A length in protobuf's encoding, and where it ends."""
    value = shift = 0
    while True:
        byte = content[place]
        value, shift, place = value | (byte & 0x7F) << shift, shift + 7, place + 1
        if not byte & 0x80 or shift > 28:
            return value, place


def _check_file(folder: Path, name: str, expected: str | None) -> None:
    # Windows rules see drives and both separators on every system.
    parts = PureWindowsPath(name)
    if parts.drive or parts.root or ".." in parts.parts or "\\" in name:
        raise InvalidArgumentError(f"{folder / MANIFEST} must list only files inside the bundle, but got {name!r}.")
    if not (folder / name).is_file():
        raise MissingFileError(f"The bundle {folder} must hold `{name}`, but it is missing. Copy or export it again.")
    target = (folder / name).resolve()
    if not any(target.is_relative_to(place) for place in _places(folder.resolve())):
        raise InvalidArgumentError(
            f"`{name}` must lie inside the bundle {folder}, but it is a link to {target}. Copy the bundle with the files that its links "
            "lead to: cp -rL."
        )
    found = sha256_of(folder / name)
    if found != expected:
        raise InvalidArgumentError(
            f"`{name}` must have the SHA-256 in {MANIFEST}, {expected}, but got {found}. "
            "The file changed after it was verified: copy or export the bundle again."
        )
