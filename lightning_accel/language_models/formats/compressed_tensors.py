"""Folders of transformers with packed integers, ``quant_method: compressed-tensors``, ``format: pack-quantized``.

https://github.com/vllm-project/compressed-tensors. The config holds the fields that all versions from 0.17 on read.
"""

from pathlib import Path
from typing import Any

import torch

from lightning_accel.core.optional import require
from lightning_accel.language_models.shipped import ShippedModel, write_config
from lightning_accel.quantization.weight_only.packing import pack_int32, unpack_int32

Integers = dict[str, tuple[torch.Tensor, torch.Tensor]]
WEIGHTS = "model.safetensors"


def refuses(shipped: ShippedModel) -> str:
    """Reason why a network can't be written in this format; empty if it can."""
    if shipped.transposed:
        return f"`{sorted(shipped.transposed)[0]}` is a Conv1D, and the format has weights (out, in) only"
    return ""


def write(shipped: ShippedModel, tokenizer: Any, folder: Path) -> None:
    """Write the folder: integers packed into int32, scales (which are float16 values) and all other tensors in float32."""
    safetensors = require("safetensors.torch", "lm", 'Format "compressed-tensors"')
    folder.mkdir(parents=True, exist_ok=True)
    stored: dict[str, torch.Tensor] = {}
    for name, value in shipped.tensors.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in shipped.integers:
            integers, scales = shipped.integers[layer]
            assert shipped.grid is not None
            stored[f"{layer}.weight_packed"] = pack_int32(integers, shipped.grid.bits)
            stored[f"{layer}.weight_scale"] = scales.float().contiguous()  # readers multiply in the type of the scale
            stored[f"{layer}.weight_shape"] = torch.tensor(integers.shape)
        elif not (shipped.tied and name == "lm_head.weight"):
            stored[name] = value.contiguous()
    safetensors.save_file(stored, str(folder / WEIGHTS), metadata={"format": "pt"})
    config = {**shipped.config, "dtype": "float32"}
    if shipped.grid is not None:
        config["quantization_config"] = quantization_config(shipped)
    write_config(folder, config)
    write_generation_config(shipped, folder)
    tokenizer.save_pretrained(str(folder))


def write_generation_config(shipped: ShippedModel, folder: Path) -> None:
    """Write ``generation_config.json``, if the model has one."""
    generation: Any = getattr(shipped.model, "generation_config", None)
    if generation is not None:
        generation.save_pretrained(str(folder))


def quantization_config(shipped: ShippedModel) -> dict[str, Any]:
    """The field ``quantization_config`` of ``config.json``: targets by class, layers in float by name."""
    assert shipped.grid is not None
    linear = {name for name, part in shipped.model.named_modules() if isinstance(part, torch.nn.Linear)}
    weights = {
        "num_bits": shipped.grid.bits,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": shipped.grid.group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        "ignore": sorted(linear - shipped.integers.keys()),
    }


def read(folder: Path, shipped: ShippedModel) -> Integers:
    """Integers and scales of the file."""
    safetensors = require("safetensors.torch", "lm", 'Format "compressed-tensors"')
    stored = safetensors.load_file(str(folder / WEIGHTS))
    layers = [name.removesuffix(".weight_packed") for name in stored if name.endswith(".weight_packed")]
    bits = shipped.grid.bits if shipped.grid is not None else 4
    return {n: (unpack_int32(stored[f"{n}.weight_packed"], bits), stored[f"{n}.weight_scale"]) for n in layers}
