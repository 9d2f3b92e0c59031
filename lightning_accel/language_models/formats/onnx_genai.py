"""ONNX with a KV cache, through the model builder of onnxruntime-genai (https://github.com/microsoft/onnxruntime-genai).

The builder quantizes by itself, with the rule of MatMulNBits. It gets the weights on the grid, so it writes the trained integers;
:func:`read` shows that it did. Layers in float are kept out by name: by default the builder quantizes the output layer, too, and the
embedding that is tied to it.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_accel.core.optional import require
from lightning_accel.errors import EngineError
from lightning_accel.language_models.formats.compressed_tensors import write_generation_config
from lightning_accel.language_models.shipped import ShippedModel, write_config
from lightning_accel.quantization.weight_only.packing import unpack_matmul_nbits

Integers = dict[str, tuple[torch.Tensor, torch.Tensor]]
FILE = "model.onnx"
_NODE = re.compile(r"/model/layers\.(\d+)/(?:attn|self_attn|mlp)/(\w+)/")
_PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_ARCHITECTURES = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM")


def refuses(shipped: ShippedModel) -> str:
    """Reason why a network can't be written in this format; empty if it can."""
    if shipped.architecture not in _ARCHITECTURES:
        return f"integers of {shipped.architecture} can't be compared here; those of {', '.join(_ARCHITECTURES)} can"
    if shipped.grid is not None and shipped.grid.bits != 4:
        return "its builder quantizes to 4 bits by this rule only"
    if shipped.grid is not None:
        blocks = {n for n, p in shipped.model.named_modules() if isinstance(p, torch.nn.Linear) and ".layers." in n}
        if left := sorted(blocks - shipped.integers.keys()):
            return f"its builder quantizes all layers of the blocks, and `{left[0]}` is float"
    return ""


def write(shipped: ShippedModel, tokenizer: Any, folder: Path) -> None:
    """Write the folder with the builder, from the weights on the grid.

    Raises:
        EngineError: the builder failed; the message has its last line.
    """
    require("onnxruntime_genai", "lm", 'Format "onnx-genai"')
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "float"
        write_float(shipped, tokenizer, source)
        options = ["hf_token=false"]
        precision = "fp32"
        if shipped.grid is not None:
            precision = "int4"
            options += [f"block_size={shipped.grid.group}", "accuracy_level=4"]
            float_nodes = [
                *([] if "lm_head" in shipped.integers else ["/lm_head/MatMul"]),
                "/model/embed_tokens/Gather",
            ]
            options += [f"nodes_to_exclude={','.join(float_nodes)}"]
        arguments = ["-m", str(source), "-i", str(source), "-o", str(folder), "-p", precision, "-e", "cpu"]
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", *arguments]
        done = subprocess.run(
            [*command, "-c", str(Path(scratch) / "cache"), "--extra_options", *options],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "HF_HUB_OFFLINE": "1"},
        )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EngineError(f"The builder of onnxruntime-genai failed for {shipped.architecture}: {last}")


def write_float(shipped: ShippedModel, tokenizer: Any, folder: Path) -> None:
    """Write a folder of transformers with all weights in float32, those of quantized layers on the grid."""
    state = {k: v for k, v in shipped.tensors.items() if not (shipped.tied and k == "lm_head.weight")}
    folder.mkdir(parents=True, exist_ok=True)
    safetensors = require("safetensors.torch", "lm", "A folder of transformers")
    safetensors.save_file(state, str(folder / "model.safetensors"), metadata={"format": "pt"})
    write_config(folder, {**shipped.config, "dtype": "float32"})
    write_generation_config(shipped, folder)
    tokenizer.save_pretrained(str(folder))


def layers_of(node: str, shipped: ShippedModel) -> list[str]:
    """Layers in transformers of a node of the graph; several if the builder joined them."""
    if "lm_head" in node:
        return ["lm_head"]
    found = _NODE.search(node)
    if found is None:
        return [node]
    number, part = found.groups()
    names = _PARTS.get(part, (part,))
    room = "self_attn" if names[0] in _ATTENTION else "mlp"
    return [f"model.layers.{number}.{room}.{name}" for name in names]


def read(folder: Path, shipped: ShippedModel) -> Integers:
    """Integers and scales of all ``MatMulNBits`` of the graph; a quantized embedding is named without them."""
    onnx = require("onnx", "lm", 'Format "onnx-genai"')
    model = onnx.load(str(folder / FILE))
    values = {one.name: one for one in model.graph.initializer}
    found: Integers = {}
    for node in model.graph.node:
        if node.op_type == "GatherBlockQuantized":  # an embedding, which is float in the trained network
            found["model.embed_tokens"] = (torch.zeros(0), torch.zeros(0))
        if node.op_type != "MatMulNBits":
            continue
        settings = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        outputs, inputs, block = settings["N"], settings["K"], settings["block_size"]
        blob = onnx.numpy_helper.to_array(values[node.input[1]]).reshape(outputs, -1, block // 2)
        integers = unpack_matmul_nbits(blob, outputs, inputs)
        scales = torch.from_numpy(onnx.numpy_helper.to_array(values[node.input[2]]).reshape(outputs, -1).copy())
        row = 0
        for name in layers_of(node.name, shipped):
            count = shipped.integers[name][0].shape[0] if name in shipped.integers else outputs
            found[name] = (integers[row : row + count], scales[row : row + count])
            row += count
    return found


def float_logits(folder: Path, tokens: Sequence[int]) -> np.ndarray:
    """Logits ``(T, V)`` of the graph with float32 activations: ``accuracy_level=1`` in every ``MatMulNBits``, in ONNX Runtime.

    The shipped file asks for level 4, which rounds activations to int8.
    """
    onnx = require("onnx", "lm", 'Format "onnx-genai"')
    ort = require("onnxruntime", "cpu", 'Format "onnx-genai"')
    width = json.loads((folder / "genai_config.json").read_text())["model"]["decoder"]["head_size"]
    model = onnx.load(str(folder / FILE))
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    with tempfile.TemporaryDirectory() as scratch:
        path = str(Path(scratch) / FILE)
        onnx.save(model, path, save_as_external_data=True)
        session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
        feeds = {}
        for one in session.get_inputs():
            if one.name == "input_ids":
                feeds[one.name] = np.array([list(tokens)], dtype=np.int64)
            elif one.name == "attention_mask":
                feeds[one.name] = np.ones((1, len(tokens)), dtype=np.int64)
            elif one.name == "position_ids":
                feeds[one.name] = np.arange(len(tokens), dtype=np.int64)[None]
            else:  # an empty cache: (batch, heads, 0, width)
                feeds[one.name] = np.zeros((1, one.shape[1], 0, width), dtype=np.float32)
        result: np.ndarray = session.run(["logits"], feeds)[0][0]
    return result
