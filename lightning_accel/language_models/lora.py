"""Low-rank adapters (https://arxiv.org/abs/2106.09685), trained inside the integer grid or kept apart from it.

``merged``: a layer computes with ``round(W + s·BA)``, so the merged and quantized network is exactly the trained one.
``apart``: a layer computes ``round(W) x + s·B(A x)``: several adapters share one frozen quantized base.
"""

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_accel.core.effective_weight import (
    EffectiveWeight,
    add_adapter_,
    has_linear_weight,
    linear_layers,
    remove_adapter_,
)
from lightning_accel.core.globs import as_patterns, select
from lightning_accel.core.optional import require
from lightning_accel.errors import InvalidArgumentError, MissingFileError
from lightning_accel.quantization.weight_only.layers import inputs_of, matching

ALL_LINEAR = "all-linear"
_MODES = ("merged", "apart")
_WEIGHTS, _CONFIG, _BASE = "adapter_model.safetensors", "adapter_config.json", "base.json"


@dataclass(frozen=True)
class LoRA:
    """Settings of low-rank adapters.

    Args:
        r: rank.
        targets: ``"all-linear"`` (all linear layers but the output layer), or globs of layers; ``"q_proj"`` also matches the end of a
            name.
        alpha: scale times ``r``: adapters are added with the factor ``alpha / r``; ``None`` means ``2 * r``.
        mode: ``"merged"``: trained inside the rounding, ships as one network; ``"apart"``: added to the output of the frozen layer, ships
            as an adapter.

    Raises:
        InvalidArgumentError: an argument is out of its range.

    Example:
        >>> LoRA(r=8, targets=["q_proj", "v_proj"]).scale
        2.0
    """

    r: int = 8
    targets: str | list[str] | tuple[str, ...] = ALL_LINEAR
    alpha: float | None = None
    mode: str = "merged"

    def __post_init__(self) -> None:
        if isinstance(self.r, bool) or not isinstance(self.r, int) or self.r < 1:
            raise InvalidArgumentError(f"Argument `r` must be an integer of at least 1, but got {self.r!r}.")
        if self.alpha is not None and not 0 < self.alpha < math.inf:
            raise InvalidArgumentError(f"Argument `alpha` must be above 0, but got {self.alpha!r}.")
        if self.mode not in _MODES:
            raise InvalidArgumentError(f"Argument `mode` must be one of {_MODES}, but got {self.mode!r}.")
        if not as_patterns("targets", self.targets):
            raise InvalidArgumentError("Argument `targets` must name layers, but got none.")

    @property
    def scale(self) -> float:
        """Factor of the adapter."""
        return (2.0 * self.r if self.alpha is None else self.alpha) / self.r


class LowRankAdapter(nn.Module):
    """One adapter of one layer: ``s·BA`` with ``A`` ``(r, in)`` and ``B`` ``(out, r)``.

    Args:
        inputs: of the layer.
        outputs: of the layer.
        lora: settings.

    Attributes:
        active: whether the layer uses it.
        merged: whether it changes the weight; otherwise it is added to the output.
    """

    def __init__(self, inputs: int, outputs: int, lora: LoRA) -> None:
        super().__init__()
        self.A = nn.Parameter(torch.empty(lora.r, inputs))
        self.B = nn.Parameter(torch.zeros(outputs, lora.r))  # an adapter starts as nothing
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))
        self.lora, self.active, self.merged = lora, True, lora.mode == "merged"

    def delta(self) -> Tensor:
        """Change of the weight, ``(out, in)``."""
        return self.lora.scale * (self.B @ self.A)

    def forward(self, x: Tensor) -> Tensor:
        """Change of the output: ``(..., in)`` to ``(..., out)``."""
        return self.lora.scale * F.linear(F.linear(x.to(self.A.dtype), self.A), self.B)


def hugging_face_model(module: nn.Module) -> tuple[str, nn.Module]:
    """Path and module of the transformers model in a module: the outermost one.

    Raises:
        InvalidArgumentError: there is none.
    """
    for name, part in module.named_modules():
        if hasattr(part, "config") and hasattr(part, "save_pretrained") and hasattr(part, "get_output_embeddings"):
            return name, part
    raise InvalidArgumentError(
        f"Argument `module` must hold a model of transformers (a PreTrainedModel), but got {type(module).__name__} without one."
    )


def target_layers(module: nn.Module, lora: LoRA) -> list[str]:
    """Names of the linear layers that get an adapter.

    Raises:
        InvalidArgumentError: ``targets`` matches nothing, or a layer whose weight is also an embedding.
    """
    layers = linear_layers(module)
    embeddings = {id(part.weight): name for name, part in module.named_modules() if isinstance(part, nn.Embedding)}
    if lora.targets == ALL_LINEAR:
        models: list[Any] = [p for p in module.modules() if hasattr(p, "get_output_embeddings")]
        heads = {id(model.get_output_embeddings()) for model in models}
        names = [n for n, layer in layers.items() if id(layer) not in heads and id(layer.weight) not in embeddings]
        if not names:
            raise InvalidArgumentError(
                f"Argument `targets` must match linear layers, but got {ALL_LINEAR!r}, and {type(module).__name__} has none."
            )
        return names
    patterns = as_patterns("targets", lora.targets)
    try:
        names = select(layers, matching(layers, patterns), (), "linear layer")
    except InvalidArgumentError as error:
        raise InvalidArgumentError(str(error).replace("`include`", "`targets`")) from None
    for name in names:
        if id(layers[name].weight) in embeddings:
            raise InvalidArgumentError(
                f"Argument `targets` must match layers with a weight of their own, but got `{name}`, whose weight is also the embedding "
                f"`{embeddings[id(layers[name].weight)]}`."
            )
    return names


def add_lora_(module: nn.Module, lora: LoRA, name: str = "default", *, freeze: bool = True) -> list[str]:
    """Add adapters to linear layers in place, under a name; the network computes the same until they are trained.

    Args:
        module: the network.
        lora: rank, layers, mode.
        name: of the adapter; a network can have several.
        freeze: whether all parameters that aren't of adapters stop being trained.

    Returns:
        Names of the layers.

    Raises:
        InvalidArgumentError: ``targets`` matches nothing, or an adapter has this name.
    """
    if not name.isidentifier():
        raise InvalidArgumentError(f"Argument `name` must be an identifier, but got {name!r}.")
    if name in adapter_names(module):
        raise InvalidArgumentError(f"Argument `name` must be new, but got {name!r}, which the network has already.")
    names = target_layers(module, lora)
    if freeze:
        for parameter_name, parameter in module.named_parameters():
            if ".adapters." not in f".{parameter_name}":
                parameter.requires_grad_(False)
    for layer_name in names:
        layer = module.get_submodule(layer_name)
        weight = layer.weight
        assert isinstance(weight, Tensor)
        inputs = inputs_of(layer)
        adapter = LowRankAdapter(inputs, weight.numel() // inputs, lora).to(weight.device)
        add_adapter_(layer, name, adapter)
    return names


def adapters_of(module: nn.Module, name: str) -> dict[str, LowRankAdapter]:
    """Adapters of a name, by layer.

    Raises:
        InvalidArgumentError: there is none of this name.
    """
    found: dict[str, LowRankAdapter] = {
        layer_name: part.adapters_by_name[name]
        for layer_name, part in module.named_modules()
        if isinstance(part, EffectiveWeight) and name in part.adapters_by_name
    }
    if not found:
        raise InvalidArgumentError(f"Argument `name` must be one of {adapter_names(module)}, but got {name!r}.")
    return found


def adapter_names(module: nn.Module) -> list[str]:
    """Names of the adapters of a network."""
    parts = (part for part in module.modules() if isinstance(part, EffectiveWeight))
    return list(dict.fromkeys(name for part in parts for name in part.adapters_by_name))


def set_adapters_(module: nn.Module, names: str | Sequence[str]) -> None:
    """Use the adapters of these names and no others; an empty list leaves the base alone. Only they are trained."""
    wanted = as_patterns("names", names)
    known = adapter_names(module)
    for name in wanted:
        if name not in known:
            raise InvalidArgumentError(f"Argument `names` must be some of {known}, but got {name!r}.")
    for name in known:
        for adapter in adapters_of(module, name).values():
            adapter.active = name in wanted
            adapter.requires_grad_(adapter.active)


@torch.no_grad()
def merge_lora_(module: nn.Module, name: str = "default") -> None:
    """Add an adapter to the weights and remove it, in place.

    A rounded layer gets the rounded weight, which it computes with already, so with ``mode="merged"`` the result equals the trained
    network bit for bit. With ``mode="apart"`` rounding the sum changes the network.
    """
    for layer_name, adapter in adapters_of(module, name).items():
        layer = module.get_submodule(layer_name)
        assert isinstance(layer, EffectiveWeight)
        weight = layer.stored_weight()
        merged = weight + adapter.delta().to(weight.dtype)
        weight.copy_(merged if layer.rounding is None else layer.rounding(merged))
        remove_adapter_(layer, name)


@torch.no_grad()
def base_digest(module: nn.Module, *, rounded: bool) -> str:
    """SHA-256 of what adapters are added to: all parameters but theirs.

    Args:
        module: the network.
        rounded: take the rounded weight of rounded layers, to which adapters with ``mode="apart"`` are added.
    """
    _, model = hugging_face_model(module)
    layers = {
        f"{name}.weight": layer
        for name, layer in model.named_modules()
        if isinstance(layer, EffectiveWeight) and rounded
    }
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        if ".adapters." in f".{name}":
            continue
        layer = layers.get(name)
        rounding = None if layer is None else layer.rounding
        value = parameter if layer is None or rounding is None else rounding(layer.stored_weight())
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_adapter(module: nn.Module, dirpath: str | Path, name: str = "default") -> Path:
    """Write an adapter in the format of peft, with the digest of its base.

    Args:
        module: the network.
        dirpath: folder; created if needed.
        name: of the adapter.

    Returns:
        The folder, which ``peft.PeftModel.from_pretrained(base, folder)`` and vLLM read.
    """
    safetensors = require("safetensors.torch", "lm", "An adapter file")
    prefix, model = hugging_face_model(module)
    found = adapters_of(module, name)
    folder = Path(dirpath)
    folder.mkdir(parents=True, exist_ok=True)
    start = f"{prefix}." if prefix else ""
    tensors = {}
    for layer, adapter in found.items():
        path = f"base_model.model.{layer.removeprefix(start)}"
        tensors[f"{path}.lora_A.weight"] = adapter.A.detach().cpu().contiguous()
        tensors[f"{path}.lora_B.weight"] = adapter.B.detach().cpu().contiguous()
    safetensors.save_file(tensors, str(folder / _WEIGHTS), metadata={"format": "pt"})
    lora = next(iter(found.values())).lora
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": getattr(model.config, "_name_or_path", None),
        "r": lora.r,
        "lora_alpha": lora.scale * lora.r,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": any(layer.transposed for layer in _effective(module, found)),
        "inference_mode": True,
        "target_modules": sorted({layer.rpartition(".")[2] for layer in found}),
    }
    (folder / _CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    record = {
        "base_sha256": base_digest(module, rounded=lora.mode == "apart"),
        "mode": lora.mode,
        "layers": sorted(n.removeprefix(start) for n in found),
    }
    (folder / _BASE).write_text(json.dumps(record, indent=2) + "\n")
    return folder


def _effective(module: nn.Module, names: Any) -> list[EffectiveWeight]:
    return [part for part in map(module.get_submodule, names) if isinstance(part, EffectiveWeight)]


def load_adapter_(module: nn.Module, dirpath: str | Path, name: str = "default") -> list[str]:
    """Add an adapter that :func:`save_adapter` wrote, in place.

    Args:
        module: a network with the same base.
        dirpath: its folder.
        name: of the adapter from now on.

    Returns:
        Names of the layers.

    Raises:
        MissingFileError: there is no adapter in the folder.
        InvalidArgumentError: the adapter belongs to another base.
    """
    safetensors = require("safetensors.torch", "lm", "An adapter file")
    folder = Path(dirpath)
    for file in (_WEIGHTS, _CONFIG):
        if not (folder / file).is_file():
            raise MissingFileError(f"Argument `dirpath` must be a folder with {file}, but got {str(dirpath)!r}.")
    config = json.loads((folder / _CONFIG).read_text())
    record = json.loads((folder / _BASE).read_text()) if (folder / _BASE).is_file() else {}
    digest = base_digest(module, rounded=record.get("mode", "apart") == "apart")
    if record and record["base_sha256"] != digest:
        raise InvalidArgumentError(
            f"Argument `dirpath` must be an adapter of this base ({digest[:12]}), but got {str(dirpath)!r}, which was trained on another "
            f"one ({record['base_sha256'][:12]})."
        )
    tensors = safetensors.load_file(str(folder / _WEIGHTS))
    prefix, model = hugging_face_model(module)
    start = f"{prefix}." if prefix else ""
    layers = [k.removeprefix("base_model.model.").removesuffix(".lora_A.weight") for k in tensors if ".lora_A." in k]
    known = dict(model.named_modules())
    for layer in layers:
        part = known.get(layer)
        if part is None or not has_linear_weight(part):
            raise InvalidArgumentError(
                f"Argument `dirpath` must be an adapter of this network, but got {str(dirpath)!r} for `{layer}`, which it lacks."
            )
    lora = LoRA(config["r"], [f"{start}{n}" for n in layers], config["lora_alpha"], record.get("mode", "apart"))
    names = add_lora_(module, lora, name)
    with torch.no_grad():
        for layer, adapter in adapters_of(module, name).items():
            path = f"base_model.model.{layer.removeprefix(start)}"
            for part_name, parameter in (("A", adapter.A), ("B", adapter.B)):
                stored = tensors[f"{path}.lora_{part_name}.weight"]
                if stored.shape != parameter.shape:
                    raise InvalidArgumentError(
                        f"Argument `dirpath` must be an adapter of this network, but got {tuple(stored.shape)} for `{layer}`, which has "
                        f"{tuple(parameter.shape)}."
                    )
                parameter.copy_(stored)
    return names
