"""What ships of a trained language model: integers and scales, float tensors, config, tokenizer."""

import copy
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_accel.core.effective_weight import EffectiveWeight
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.lora import adapter_names, adapters_of, hugging_face_model
from lightning_accel.quantization.weight_only.group_grid import GroupGrid
from lightning_accel.quantization.weight_only.layers import integers_of


@dataclass
class ShippedModel:
    """The trained network without anything of training.

    Attributes:
        config: settings in the form of transformers.
        tensors: float tensors by their name in transformers, those of quantized layers included: exactly what was computed with.
        integers: by layer: integers ``(out, in)`` in int8, and scales ``(out, in / group)`` in float16.
        grid: of all integers; ``None`` if nothing is quantized.
        adapters: names of adapters that are kept apart.
        transposed: layers whose weight is stored as ``(in, out)``.
        model: the live model, for ``save_pretrained`` and as the reference.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    integers: dict[str, tuple[Tensor, Tensor]]
    grid: GroupGrid | None
    adapters: list[str]
    transposed: set[str] = field(default_factory=set)
    model: Any = None

    @property
    def architecture(self) -> str:
        """Name of the class in transformers, e.g. ``"LlamaForCausalLM"``."""
        return str(self.config["architectures"][0])

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return bool(self.config.get("tie_word_embeddings"))


@torch.no_grad()
def shipped_model(module: nn.Module) -> ShippedModel:
    """Collect what ships of a trained module.

    Args:
        module: a :class:`CausalLM`, or any module around one model of transformers. Merged adapters are part of the weights; those that
            are kept apart are named.

    Raises:
        InvalidArgumentError: there is no model of transformers in it, or layers have different grids.
    """
    _, model = hugging_face_model(module)
    found = integers_of(model)
    grids = {grid for _, _, grid in found.values()}
    if len(grids) > 1:
        raise InvalidArgumentError(
            f"Argument `module` must have one grid for all layers, but got {sorted(map(str, grids))}. Formats have one group size."
        )
    tensors = {
        name: value.detach().float().cpu() if value.is_floating_point() else value.detach().cpu()
        for name, value in model.state_dict().items()
        if ".adapters." not in f".{name}"
    }
    transposed = set()
    for name, layer in model.named_modules():
        if isinstance(layer, EffectiveWeight):
            value = layer.effective_weight().detach().float().cpu()
            tensors[f"{name}.weight"] = (value.t() if layer.transposed else value).contiguous()
            transposed |= {name} if layer.transposed else set()
    config: Any = model.config
    names = [n for n in adapter_names(model) if not next(iter(adapters_of(model, n).values())).merged]
    settings = {**config.to_dict(), "architectures": [type(model).__name__]}
    settings.pop("quantization_config", None)  # of the file that it was loaded from
    integers = {name: (q, s) for name, (q, s, _) in found.items()}
    return ShippedModel(settings, tensors, integers, next(iter(grids), None), names, transposed, model)


def reference_model(shipped: ShippedModel) -> nn.Module:
    """A plain model of transformers with the shipped values in float32, in eval mode: what every engine is compared with."""
    model = type(shipped.model)(copy.deepcopy(shipped.model.config))
    missing = model.load_state_dict(shipped.tensors, strict=False)
    if unknown := [
        *missing.unexpected_keys,
        *(k for k in missing.missing_keys if not (shipped.tied and "lm_head" in k)),
    ]:
        raise InvalidArgumentError(
            f"Argument `shipped` must have the tensors of its architecture, but differs in {unknown}."
        )
    model.tie_weights()
    result: nn.Module = model.eval()
    return result


def write_tokenizer(tokenizer: Any, folder: Path) -> dict[str, str]:
    """Write a tokenizer with its chat template into a folder.

    Returns:
        SHA-256 of each of its files.
    """
    folder.mkdir(parents=True, exist_ok=True)
    before = {path.name for path in folder.iterdir()}
    tokenizer.save_pretrained(str(folder))
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name not in before)
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def check_tokenizer(tokenizer: Any, shipped_vocabulary: int) -> None:
    """Raise if a tokenizer can't be written into files, or has tokens that the network lacks.

    Raises:
        InvalidArgumentError: it doesn't fit.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise InvalidArgumentError(
            f"Argument `tokenizer` must be a fast tokenizer of transformers, but got {type(tokenizer).__name__}: engines read "
            "tokenizer.json."
        )
    if len(tokenizer) > shipped_vocabulary:
        raise InvalidArgumentError(
            f"Argument `tokenizer` must have at most the model's {shipped_vocabulary:,} tokens, but got {len(tokenizer):,}. "
            "Use the model's own."
        )


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write ``config.json``."""
    (folder / "config.json").write_text(json.dumps(config, indent=2, default=str) + "\n")
