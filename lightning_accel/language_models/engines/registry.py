"""The text engines, by name: the format that each reads, and the package and extra that it needs."""

from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from lightning_accel.errors import InvalidArgumentError, MissingPackageError
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
        extra: extra that installs it.
        where: module and class below this package.
        quantized_only: whether it can't read float32 files.
    """

    name: str
    format: str
    file: str
    package: str
    extra: str
    where: str
    quantized_only: bool = False


TEXT_ENGINES = {
    entry.name: entry
    for entry in (
        EngineEntry("transformers", "compressed-tensors", "", "transformers", "lm", "transformers.TransformersEngine"),
        EngineEntry(
            "onnxruntime-genai",
            "onnx-genai",
            "",
            "onnxruntime_genai",
            "lm",
            "onnxruntime_genai.OnnxRuntimeGenaiEngine",
        ),
        EngineEntry("llama.cpp", "gguf", "model.gguf", "xllamacpp", "lm-engines", "llama_cpp.LlamaCppEngine"),
        EngineEntry(
            "openvino-genai",
            "gguf",
            "model.gguf",
            "openvino_genai",
            "lm-engines",
            "openvino_genai.OpenVinoGenaiEngine",
            quantized_only=True,
        ),
        EngineEntry("vllm", "compressed-tensors", "", "", "", "vllm.VllmEngine"),
    )
}


def engine_entry(name: str) -> EngineEntry:
    """Look up a text engine.

    Raises:
        InvalidArgumentError: none has this name.
    """
    if name not in TEXT_ENGINES:
        raise InvalidArgumentError(f"Argument `engines` must hold some of {sorted(TEXT_ENGINES)}, but got {name!r}.")
    return TEXT_ENGINES[name]


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
            f"Engine `{name}` needs the package `{entry.package}`, which is not installed: pip install "
            f'"lightning-accel[{entry.extra}]"',
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
    module, kind = entry.where.split(".")
    path = Path(bundle) / entry.format / entry.file if entry.file else Path(bundle) / entry.format
    engine: TextEngine = getattr(import_module(f"lightning_accel.language_models.engines.{module}"), kind)(
        path, **options
    )
    return engine
