"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): Q4_0 and Q8_0 blocks of the trained integers."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lightning_accel.core.optional import require
from lightning_accel.language_models.shipped import ShippedModel
from lightning_accel.quantization.weight_only.packing import pack_ggml, unpack_ggml

Integers = dict[str, tuple[torch.Tensor, torch.Tensor]]
FILE = "model.gguf"
_ARCHITECTURES = {"LlamaForCausalLM": "llama", "Qwen2ForCausalLM": "qwen2", "Qwen3ForCausalLM": "qwen3"}
_PERMUTED = {"llama": {"self_attn.q_proj": "num_attention_heads", "self_attn.k_proj": "num_key_value_heads"}}
_BLOCK = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def refuses(shipped: ShippedModel) -> str:
    """Reason why a network can't be written in this format; empty if it can."""
    if shipped.architecture not in _ARCHITECTURES:
        return f"{shipped.architecture} has no writer here; {', '.join(_ARCHITECTURES)} have"
    if shipped.grid is not None and shipped.grid.group != 32:
        return f"its blocks have 32 integers, and the group is {shipped.grid.group}"
    rope = shipped.config.get("rope_parameters") or {}
    if rope.get("rope_type", "default") != "default":
        return f"the rotary embedding {rope['rope_type']!r} has no writer here"
    return ""


def _permuted(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection in the order of llama.cpp: halves of a head interleaved."""
    shape = rows.shape
    return rows.reshape(heads, 2, shape[0] // heads // 2, *shape[1:]).transpose(1, 2).reshape(shape).contiguous()


def _restored(rows: torch.Tensor, heads: int) -> torch.Tensor:
    """Inverse of :func:`_permuted`."""
    shape = rows.shape
    return rows.reshape(heads, shape[0] // heads // 2, 2, *shape[1:]).transpose(1, 2).reshape(shape).contiguous()


def _name(tensor: str) -> str:
    """Name of a tensor in the file."""
    layer, _, kind = tensor.rpartition(".")
    if layer in _TOP:
        return f"{_TOP[layer]}.{kind}"
    _, _, number, rest = layer.split(".", 3)  # model.layers.N.rest
    return f"blk.{number}.{_BLOCK[rest]}.{kind}"


def _heads(shipped: ShippedModel, layer: str) -> int | None:
    """Number of heads by which the rows of a layer are permuted; ``None`` if they aren't."""
    permuted = _PERMUTED.get(_ARCHITECTURES[shipped.architecture], {})
    key = next((key for end, key in permuted.items() if layer.endswith(end)), None)
    return None if key is None else int(shipped.config[key])


def write(shipped: ShippedModel, tokenizer: Any, folder: Path) -> None:
    """Write ``model.gguf``: blocks of the trained integers, all other tensors in float32, tokenizer and chat template."""
    gguf = require("gguf", "lm", 'Format "gguf"')
    folder.mkdir(parents=True, exist_ok=True)
    config, bits = shipped.config, shipped.grid.bits if shipped.grid is not None else 0
    writer = gguf.GGUFWriter(str(folder / FILE), _ARCHITECTURES[shipped.architecture])
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    writer.add_name("lightning-accel")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(width)
    rope = config.get("rope_parameters") or {}
    writer.add_rope_freq_base(float(rope.get("rope_theta", config.get("rope_theta", 10000.0))))
    writer.add_vocab_size(config["vocab_size"])
    kinds = gguf.LlamaFileType
    writer.add_file_type({0: kinds.ALL_F32, 4: kinds.MOSTLY_Q4_0, 8: kinds.MOSTLY_Q8_0}[bits])
    _add_tokenizer(gguf, writer, tokenizer, config["vocab_size"])
    block = {4: gguf.GGMLQuantizationType.Q4_0, 8: gguf.GGMLQuantizationType.Q8_0}
    for name, value in shipped.tensors.items():
        layer = name.rpartition(".")[0]
        rows = _heads(shipped, layer)
        if name.endswith(".weight") and layer in shipped.integers:
            parts = [part if rows is None else _permuted(part, rows) for part in shipped.integers[layer]]
            writer.add_tensor(_name(name), pack_ggml(parts[0], parts[1], bits), raw_dtype=block[bits])
        elif not (shipped.tied and name == "lm_head.weight"):
            writer.add_tensor(_name(name), (value if rows is None else _permuted(value, rows)).contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(gguf: Any, writer: Any, tokenizer: Any, size: int) -> None:
    """Write a byte-level BPE tokenizer: tokens, merges, special tokens, chat template."""
    stored = json.loads(tokenizer.backend_tokenizer.to_str())
    names = {index: token for token, index in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry["special"] for entry in stored.get("added_tokens", [])}
    tokens, types = [], []
    for index in range(size):
        tokens.append(names.get(index, f"<unused{index}>"))
        kind = gguf.TokenType.NORMAL
        if index not in names:
            kind = gguf.TokenType.UNUSED
        elif index in added:
            kind = gguf.TokenType.CONTROL if added[index] else gguf.TokenType.USER_DEFINED
        types.append(kind)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(stored))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in stored["model"]["merges"]])
    for add, value in (
        (writer.add_bos_token_id, tokenizer.bos_token_id),
        (writer.add_eos_token_id, tokenizer.eos_token_id),
        (writer.add_pad_token_id, tokenizer.pad_token_id),
    ):
        if value is not None:
            add(value)
    prefix = tokenizer("a", add_special_tokens=True)["input_ids"]
    starts = tokenizer.bos_token_id is not None and prefix[0] == tokenizer.bos_token_id
    writer.add_add_bos_token(starts)
    if isinstance(tokenizer.chat_template, str):
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer(stored: dict[str, Any]) -> str:
    """Name in llama.cpp of how a tokenizer splits text; empty if it isn't known.

    Args:
        stored: content of ``tokenizer.json``.
    """
    if stored["model"]["type"] != "BPE":
        return ""
    found = stored.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    pattern = next((step["pattern"].get("Regex", "") for step in steps if step.get("type") == "Split"), "")
    if kinds == ["ByteLevel"]:
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits"):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and r"\p{N}{1,3}" in pattern:
        return "llama-bpe"
    if kinds == ["Split", "ByteLevel"] and r"|\p{N}|" in pattern:
        return "qwen2"
    return ""


def read(folder: Path, shipped: ShippedModel) -> Integers:
    """Integers and scales of the file, in the order of transformers."""
    gguf = require("gguf", "lm", 'Format "gguf"')
    bits = {gguf.GGMLQuantizationType.Q4_0: 4, gguf.GGMLQuantizationType.Q8_0: 8}
    layers = {_name(f"{layer}.weight"): layer for layer in shipped.integers}
    found: Integers = {}
    for tensor in gguf.GGUFReader(str(folder / FILE)).tensors:
        if tensor.tensor_type not in bits:
            continue
        layer = layers.get(tensor.name, tensor.name)
        integers, scales = unpack_ggml(np.array(tensor.data), bits[tensor.tensor_type])
        rows = _heads(shipped, layer)
        found[layer] = (integers, scales) if rows is None else (_restored(integers, rows), _restored(scales, rows))
    return found
