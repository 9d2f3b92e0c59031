"""The text engines, by name: the format that each reads, and the package and extra that it needs.

An engine of another distribution is an entry point of the group ``lightning_accel.text_engines`` that names an :class:`EngineEntry`.
"""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_accel.core.registry import Registry
from lightning_accel.engines.registry import resolve
from lightning_accel.errors import MissingPackageError
from lightning_accel.language_models.engines.base import TextEngine
from lightning_accel.language_models.engines.vllm import vllm_python


@dataclass(frozen=True)
class EngineEntry:
    """One text engine.

    Args:
        name: in ``engines=[...]``.
        format: format that it reads.
        file: what it opens in the folder of the format; empty for the folder.
        package: import name that must be there; empty for vLLM, which has an interpreter of its own.
        install: what ``pip install`` is given to install it.
        where: import path of its class, ``"package.module:name"``.
        quantized_only: whether it can't read float32 files.
    """

    name: str
    format: str
    file: str
    package: str
    install: str
    where: str
    quantized_only: bool = False


_HERE = "lightning_accel.language_models.engines"
_BUILTIN = {
    entry.name: entry
    for entry in (
        EngineEntry(
            "transformers",
            "compressed-tensors",
            "",
            "transformers",
            "lightning-accel[lm]",
            f"{_HERE}.transformers:TransformersEngine",
        ),
        EngineEntry(
            "onnxruntime-genai",
            "onnx-genai",
            "",
            "onnxruntime_genai",
            "lightning-accel[lm]",
            f"{_HERE}.onnxruntime_genai:OnnxRuntimeGenaiEngine",
        ),
        EngineEntry(
            "llama.cpp",
            "gguf",
            "model.gguf",
            "xllamacpp",
            "lightning-accel[lm-engines]",
            f"{_HERE}.llama_cpp:LlamaCppEngine",
        ),
        EngineEntry(
            "openvino-genai",
            "gguf",
            "model.gguf",
            "openvino_genai",
            "lightning-accel[lm-engines]",
            f"{_HERE}.openvino_genai:OpenVinoGenaiEngine",
            quantized_only=True,
        ),
        EngineEntry("vllm", "compressed-tensors", "", "", "", f"{_HERE}.vllm:VllmEngine"),
    )
}
TEXT_ENGINES: Registry[EngineEntry] = Registry(
    "text engine", "lightning_accel.text_engines", _BUILTIN, _BUILTIN.__getitem__, EngineEntry
)


def engine_entry(name: str) -> EngineEntry:
    """Look up a text engine.

    Raises:
        InvalidArgumentError: none has this name.
    """
    return TEXT_ENGINES.get(name, "engines")


def check_installed(name: str) -> None:
    """Raise if the package of an engine isn't installed, without importing it.

    Raises:
        MissingPackageError: it isn't; the message names the extra.
    """
    entry = engine_entry(name)
    if name == "vllm":
        vllm_python()
    elif find_spec(entry.package) is None:
        raise MissingPackageError(
            f'Engine `{name}` needs the package `{entry.package}`, which is not installed: pip install "{entry.install}"',
            name=entry.package,
        )


def open_engine(name: str, bundle: str | Path, **options: Any) -> TextEngine:
    """Load the file of an engine from the folder of a bundle.

    Args:
        name: of the engine.
        bundle: folder with one folder per format.
        options: of the engine: ``threads``, ``context`` and its own.
    """
    entry = engine_entry(name)
    check_installed(name)
    path = Path(bundle) / entry.format / entry.file if entry.file else Path(bundle) / entry.format
    engine: TextEngine = resolve(entry.where)(path, **options)
    return engine
