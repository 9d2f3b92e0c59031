"""Folders of transformers in the layout of GPTQ (https://github.com/ModelCloud/GPTQModel), first version, without reordering."""

from pathlib import Path
from typing import Any

import torch

from lightning_accel.core.optional import require
from lightning_accel.language_models.formats.compressed_tensors import WEIGHTS, write_generation_config
from lightning_accel.language_models.shipped import ShippedModel, write_config
from lightning_accel.quantization.weight_only.packing import gptq_zeros, pack_gptq, unpack_gptq

Integers = dict[str, tuple[torch.Tensor, torch.Tensor]]


def refuses(shipped: ShippedModel) -> str:
    """Reason why a network can't be written in this format; empty if it can."""
    if shipped.grid is None or shipped.grid.bits != 4:
        return "the layout is written for 4-bit integers only"
    if shipped.transposed:
        return f"`{sorted(shipped.transposed)[0]}` is a Conv1D, and the format has weights (out, in) only"
    if odd := [name for name, (integers, _) in shipped.integers.items() if integers.shape[0] % 8]:
        return f"`{odd[0]}` has a number of outputs that 8 doesn't divide, and zero points are packed by 8"
    return ""


def write(shipped: ShippedModel, tokenizer: Any, folder: Path) -> None:
    """Write the folder: ``qweight``, ``qzeros``, ``scales`` and ``g_idx`` of each layer, all other tensors in float32."""
    safetensors = require("safetensors.torch", "lm", 'Format "gptq"')
    folder.mkdir(parents=True, exist_ok=True)
    assert shipped.grid is not None
    stored: dict[str, torch.Tensor] = {}
    for name, value in shipped.tensors.items():
        layer = name.removesuffix(".weight")
        if name.endswith(".weight") and layer in shipped.integers:
            integers, scales = shipped.integers[layer]
            stored[f"{layer}.qweight"] = pack_gptq(integers)
            stored[f"{layer}.qzeros"] = gptq_zeros(scales)
            stored[f"{layer}.scales"] = scales.t().contiguous()
            stored[f"{layer}.g_idx"] = (torch.arange(integers.shape[1]) // shipped.grid.group).to(torch.int32)
        elif not (shipped.tied and name == "lm_head.weight"):
            stored[name] = value.contiguous()
    safetensors.save_file(stored, str(folder / WEIGHTS), metadata={"format": "pt"})
    settings = {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": shipped.grid.group,
        "desc_act": False,
        "sym": True,
        "lm_head": "lm_head" in shipped.integers,
        "checkpoint_format": "gptq",
    }
    write_config(folder, {**shipped.config, "dtype": "float16", "quantization_config": settings})
    write_generation_config(shipped, folder)
    tokenizer.save_pretrained(str(folder))


def read(folder: Path, shipped: ShippedModel) -> Integers:
    """Integers and scales of the file."""
    safetensors = require("safetensors.torch", "lm", 'Format "gptq"')
    stored = safetensors.load_file(str(folder / WEIGHTS))
    layers = [name.removesuffix(".qweight") for name in stored if name.endswith(".qweight")]
    return {n: (unpack_gptq(stored[f"{n}.qweight"]), stored[f"{n}.scales"].t().contiguous()) for n in layers}
