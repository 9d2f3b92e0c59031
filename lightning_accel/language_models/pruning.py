"""Remove layers, heads and feed-forward channels of a causal language model; what is left is an ordinary, smaller model of transformers.

Layers go by how little they change their input (https://arxiv.org/abs/2403.03853), heads and channels by the size of what they
add to the residual stream on calibration data (https://arxiv.org/abs/2407.14679). With grouped queries a group goes as a whole: one
key-value head and the query heads that read it.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from lightning_accel.calls.batches import call_from_batch
from lightning_accel.calls.contexts import mode
from lightning_accel.core.arguments import checked
from lightning_accel.core.effective_weight import EffectiveWeight
from lightning_accel.errors import InvalidArgumentError
from lightning_accel.language_models.loading import load_causal_lm

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_GATED = ("gate_proj", "up_proj", "down_proj")


@checked()
def prune_(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    num_hidden_layers: int | None = None,
    num_key_value_heads: int | None = None,
    intermediate_size: int | None = None,
) -> dict[str, Any]:
    """Make a causal language model smaller, in place; the arguments have the names of its config, which changes with it.

    Afterwards train it, e.g. ``CausalLM(model, distill=TokenKL(original))``; ``model.save_pretrained`` writes an ordinary folder, which
    every format and engine takes.

    Args:
        model: of transformers, with the layers of a Llama (also Mistral, Qwen2, Qwen3 and SmolLM): separate ``q_proj``, ``k_proj``,
            ``v_proj``, ``o_proj``, and ``gate_proj``, ``up_proj``, ``down_proj``.
        batches: calibration data, ``input_ids`` ``(N, T)`` or dicts of arguments; a few dozen sequences.
        num_hidden_layers: layers to keep; ``None``: all.
        num_key_value_heads: key-value heads to keep in each layer, each with its query heads; ``None``: all.
        intermediate_size: feed-forward channels to keep in each layer; ``None``: all.

    Returns:
        ``{"layers": [...], "heads": {layer: [...]}, "channels": {layer: count}}``: original numbers of what was kept.

    Raises:
        InvalidArgumentError: nothing to remove, more to keep than there is, no data, or another architecture.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> size = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
        >>> model = LlamaForCausalLM(LlamaConfig(**size, num_hidden_layers=3, num_key_value_heads=2))
        >>> kept = prune_(model, [torch.randint(0, 64, (4, 8))], num_hidden_layers=2, intermediate_size=32)
        >>> len(kept["layers"]), model.config.num_hidden_layers, model.config.intermediate_size
        (2, 2, 32)
    """
    model = load_causal_lm(model)
    wanted = {
        "num_hidden_layers": num_hidden_layers,
        "num_key_value_heads": num_key_value_heads,
        "intermediate_size": intermediate_size,
    }
    layers = _layers(model)
    _check(model, wanted)
    kept = list(batches)
    if not kept:
        raise InvalidArgumentError("Argument `batches` must hold calibration data, but got none.")
    config: Any = model.config
    heads = config.num_key_value_heads
    with mode(model, False), torch.no_grad():
        changes, groups, channels = _importance(model, layers, heads, kept)
        numbers = _largest(changes, num_hidden_layers)
        found: dict[str, Any] = {"layers": numbers, "heads": {}, "channels": {}}
        for number in numbers:
            if num_key_value_heads is not None:
                rows = _largest(groups[number], num_key_value_heads)
                _keep_heads(layers[number].self_attn, rows, heads)
                found["heads"][number] = rows
            if intermediate_size is not None:
                _keep_channels(layers[number].mlp, _largest(channels[number], intermediate_size))
                found["channels"][number] = intermediate_size
    _keep_layers(model, layers, numbers)
    if num_key_value_heads is not None:
        config.head_dim = layers[0].self_attn.head_dim
        config.num_attention_heads = config.num_attention_heads // heads * num_key_value_heads
        config.num_key_value_heads = num_key_value_heads
    if intermediate_size is not None:
        config.intermediate_size = intermediate_size
    return found


def _layers(model: nn.Module) -> list[Any]:
    """Decoder layers of a model.

    Raises:
        InvalidArgumentError: they aren't those of a Llama, or are quantized or adapted.
    """
    layers: Any = getattr(getattr(model, "model", None), "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        raise InvalidArgumentError(
            f"Argument `model` must have layers in `model.layers` as a Llama, but got a {type(model).__name__}."
        )
    for place, layer in enumerate(layers):
        for part, names in (("self_attn", _ATTENTION), ("mlp", _GATED)):
            owner = getattr(layer, part, None)
            for name in names:
                linear = getattr(owner, name, None)
                if isinstance(linear, EffectiveWeight):
                    raise InvalidArgumentError(
                        f"Argument `model` must have float layers without adapters, but got `model.layers.{place}.{part}.{name}`, which is "
                        "quantized or adapted already: prune first."
                    )
                if not isinstance(linear, nn.Linear):
                    raise InvalidArgumentError(
                        f"Argument `model` must have the layers of a Llama, but {type(model).__name__} has no linear layer "
                        f"`model.layers.{place}.{part}.{name}`."
                    )
    return list(layers)


def _check(model: nn.Module, wanted: dict[str, int | None]) -> None:
    config: Any = model.config
    if all(count is None for count in wanted.values()):
        raise InvalidArgumentError(
            f"One of the arguments {', '.join(f'`{name}`' for name in wanted)} must be given, but got none."
        )
    for name, count in wanted.items():
        if count is not None and not 1 <= count <= getattr(config, name):
            raise InvalidArgumentError(
                f"Argument `{name}` must be from 1 to {getattr(config, name)}, the model's, but got {count}."
            )
    if all(count in (None, getattr(config, name)) for name, count in wanted.items()):
        raise InvalidArgumentError(f"Arguments must leave something to remove, but got those of the model: {wanted}.")


def _importance(
    model: nn.Module, layers: list[Any], heads: int, batches: list[Any]
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """How much each layer changes its input, and the squared size of what each group of heads and each channel adds; sums over tokens."""
    changes = torch.zeros(len(layers), dtype=torch.float64)
    groups = [torch.zeros(heads, dtype=torch.float64) for _ in layers]
    channels = [torch.zeros(layer.mlp.down_proj.in_features, dtype=torch.float64) for layer in layers]

    def change(place: int) -> Callable[..., None]:
        def add(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
            before = args[0] if args else kwargs["hidden_states"]
            after = result[0] if isinstance(result, tuple) else result
            changes[place] += (1 - cosine_similarity(before.double(), after.double(), -1)).sum().cpu()

        return add

    def attended(place: int) -> Callable[..., None]:
        weight = layers[place].self_attn.o_proj.weight

        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            for group, (part, columns) in enumerate(zip(args[0].chunk(heads, -1), weight.chunk(heads, 1), strict=True)):
                groups[place][group] += (part @ columns.t()).double().square().sum().cpu()

        return add

    def gated(place: int) -> Callable[..., None]:
        columns = layers[place].mlp.down_proj.weight.double().square().sum(0)

        def add(_: nn.Module, args: tuple[Any, ...]) -> None:
            channels[place].add_((args[0].double().square().flatten(0, -2).sum(0) * columns).cpu())

        return add

    hooks = []
    for place, layer in enumerate(layers):
        hooks.append(layer.register_forward_hook(change(place), with_kwargs=True))
        hooks.append(layer.self_attn.o_proj.register_forward_pre_hook(attended(place)))
        hooks.append(layer.mlp.down_proj.register_forward_pre_hook(gated(place)))
    try:
        for batch in batches:
            args, kwargs = call_from_batch(model, batch)
            model(*args, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return changes, groups, channels


def _largest(importance: Tensor, count: int | None) -> list[int]:
    """The numbers of the largest values, in order; of equal ones the first."""
    if count is None:
        return list(range(len(importance)))
    ranked = torch.sort(importance, descending=True, stable=True).indices[:count]
    return sorted(ranked.tolist())


def _keep_layers(model: nn.Module, layers: list[Any], numbers: list[int]) -> None:
    config: Any = model.config
    model.model.layers = nn.ModuleList([layers[number] for number in numbers])  # type: ignore[union-attr]
    for place, number in enumerate(numbers):
        for part in layers[number].modules():
            if hasattr(part, "layer_idx"):  # of its cache
                part.layer_idx = place
    if getattr(config, "layer_types", None):
        config.layer_types = [config.layer_types[number] for number in numbers]
    config.num_hidden_layers = len(numbers)


def _keep_heads(attention: Any, kept: list[int], heads: int) -> None:
    for name in _ATTENTION:
        linear = getattr(attention, name)
        size = (linear.in_features if name == "o_proj" else linear.out_features) // heads
        units = torch.cat([torch.arange(size * group, size * (group + 1)) for group in kept])
        _keep(linear, units, inputs=name == "o_proj")
    for name, ratio in (("num_heads", attention.num_key_value_groups), ("num_key_value_heads", 1)):
        if hasattr(attention, name):
            setattr(attention, name, len(kept) * ratio)


def _keep_channels(mlp: Any, kept: list[int]) -> None:
    units = torch.tensor(kept)
    for name in _GATED:
        _keep(getattr(mlp, name), units, inputs=name == "down_proj")
    if hasattr(mlp, "intermediate_size"):
        mlp.intermediate_size = len(kept)


def _keep(linear: nn.Linear, units: Tensor, inputs: bool) -> None:
    """Keep some inputs or outputs of a linear layer."""
    units = units.to(linear.weight.device)
    weight = linear.weight.detach().index_select(1 if inputs else 0, units)
    linear.weight = nn.Parameter(weight, requires_grad=linear.weight.requires_grad)
    if inputs:
        linear.in_features = len(units)
        return
    linear.out_features = len(units)
    if linear.bias is not None:
        linear.bias = nn.Parameter(linear.bias.detach().index_select(0, units), requires_grad=linear.bias.requires_grad)
