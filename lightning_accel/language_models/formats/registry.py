"""The file formats, by name: how each is written, how its integers are read back, and what it supports."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.formats import compressed_tensors, gguf, gptq, onnx_genai
from lightning_accel.language_models.shipped import ShippedModel

Integers = dict[str, tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Format:
    """One file format.

    Args:
        name: in ``formats=[...]``, and the folder in a bundle.
        file: main file in that folder.
        write: writes the folder.
        read: integers and scales by layer, from the files alone.
        refuses: the reason why a network can't be written so; empty if it can. Called before training, too.
        description: in one sentence, for the report.
    """

    name: str
    file: str
    write: Callable[[ShippedModel, Any, Path], None]
    read: Callable[[Path, ShippedModel], Integers]
    refuses: Callable[[ShippedModel], str]
    description: str


FORMATS = {
    found.name: found
    for found in (
        Format(
            "compressed-tensors",
            "model.safetensors",
            compressed_tensors.write,
            compressed_tensors.read,
            compressed_tensors.refuses,
            "a folder of transformers with packed integers, read by transformers and vLLM",
        ),
        Format(
            "gptq",
            "model.safetensors",
            gptq.write,
            gptq.read,
            gptq.refuses,
            "a folder of transformers in the layout of GPTQ, read by vLLM and GPTQModel",
        ),
        Format(
            "gguf", "model.gguf", gguf.write, gguf.read, gguf.refuses, "one file, read by llama.cpp and OpenVINO GenAI"
        ),
        Format(
            "onnx-genai",
            "model.onnx",
            onnx_genai.write,
            onnx_genai.read,
            onnx_genai.refuses,
            "ONNX with a KV cache, read by onnxruntime-genai",
        ),
    )
}


def format_named(name: str) -> Format:
    """Look up a format.

    Raises:
        InvalidArgumentError: none has this name.
    """
    if name not in FORMATS:
        raise InvalidArgumentError(f"Argument `formats` must hold some of {sorted(FORMATS)}, but got {name!r}.")
    return FORMATS[name]
