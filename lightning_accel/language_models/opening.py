"""Open bundles of language models. Imports no torch: engines that need none are measured and run without it."""

from pathlib import Path
from typing import Any

from lightning_accel.engines.manifest import check_files, read_manifest
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.engines.base import TextEngine
from lightning_accel.language_models.engines.registry import open_engine

KIND = "language-model"
ADAPTERS = "adapters"
TOKENIZER = "tokenizer"


def read_language_manifest(bundle: str | Path) -> dict[str, Any]:
    """The manifest of a language model's bundle, all of whose files are as they were written.

    Raises:
        MissingFileError: there is no manifest, or a file is missing.
        InvalidArgumentError: a file changed, or it is a bundle of another kind.
    """
    manifest = read_manifest(bundle)
    if manifest.get("kind") != KIND:
        raise InvalidArgumentError(
            f"Argument `bundle` must be one of LanguageModelExport, but got {str(bundle)!r}, which is no language model. Use `load_runner`."
        )
    check_files(bundle, manifest)
    return manifest


def open_bundle(bundle: str | Path, engine: str | None = None, **options: Any) -> TextEngine:
    """Open an engine of a bundle that passed its proof; every file is compared with the manifest first.

    Args:
        bundle: folder.
        engine: name; ``None`` takes the first that passed.
        options: of the engine: ``threads``, ``context``, ``adapter``.

    Raises:
        InvalidArgumentError: the engine isn't in the bundle, or a file changed.
    """
    manifest = read_language_manifest(bundle)
    default = manifest.get("default")
    name = engine or (default["engine"] if default else "")
    if name not in manifest["engines"]:
        why = manifest.get("failed", {}).get(name, {}).get("reason", "it wasn't proven when the bundle was written")
        raise InvalidArgumentError(
            f"Argument `engine` must be one of the bundle's {sorted(manifest['engines'])}, but got {name!r}: {why}."
        )
    options = {"context": manifest["context"], **options}
    return open_engine(name, bundle, **options)
