"""Which parameters are the weights of layers: matrices and kernels that inputs are multiplied with.

A parameter with two or more dimensions isn't always one: embeddings, class tokens, tables of positions and layer scales have as
many. Their values are small, so a comparison with the weights of layers would zero them first, and nothing would be gained.
"""

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils import parametrize

from lightning_accel.calls.contexts import isolated_random

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_OTHER = "it isn't the weight of a linear, convolutional, recurrent or attention layer"
EMBEDDING = "it is an embedding"
ADAPTER = "it belongs to a low-rank adapter, whose zeros are lost when it is merged"


@dataclass(frozen=True)
class WeightKind:
    """What a parameter is to the layer that holds it.

    Args:
        reason: why it is pruned only if a glob names it; empty for the weight of a layer.
        refusal: why it can't be pruned at all; empty if it can.
        inputs_first: whether it is laid out ``(I, O, ...)`` as in transposed convolutions, instead of ``(O, I, ...)``.
        groups: groups of channels of a convolution.
        normed: whether the layer divides by the norm of an output channel, so that each must keep a weight.
    """

    reason: str = _OTHER
    refusal: str = ""
    inputs_first: bool = False
    groups: int = 1
    normed: bool = False


def weight_kinds(module: nn.Module) -> dict[str, WeightKind]:
    """Kind of each floating-point parameter with two or more dimensions, by name.

    Args:
        module: any module; tied parameters appear once, under their first name.

    Example:
        >>> kinds = weight_kinds(nn.Sequential(nn.Embedding(10, 4), nn.Linear(4, 2)))
        >>> {name: kind.reason for name, kind in kinds.items()}
        {'0.weight': 'it is an embedding', '1.weight': ''}
    """
    embeddings = {
        id(p)
        for part in module.modules()
        if isinstance(part, nn.Embedding | nn.EmbeddingBag)
        for p in part.parameters()
    }
    adapters = set(_adapter_parameters(module))
    known: dict[int, WeightKind] = {}
    for part in module.modules():
        for parameter, kind in _weights_of(part):
            known[id(parameter)] = kind
    found = {}
    for name, parameter in module.named_parameters():
        if parameter.ndim < 2 or not parameter.is_floating_point():
            continue
        kind = known.get(id(parameter), WeightKind())
        if id(parameter) in embeddings:  # also one that a layer shares
            kind = replace(kind, reason=EMBEDDING)
        elif id(parameter) in adapters:
            kind = replace(kind, reason=ADAPTER)
        found[name] = kind
    return found


def _weights_of(part: nn.Module) -> Iterator[tuple[nn.Parameter, WeightKind]]:
    """Weights of one layer, not of its children."""
    layout = WeightKind(
        "",
        inputs_first=isinstance(part, _ConvTransposeNd) or is_hugging_face_conv1d(part),
        groups=getattr(part, "groups", 1) if isinstance(part, _ConvNd) else 1,
    )
    own = part._parameters
    for name in _weight_names(part):
        if own.get(name) is not None:
            yield own[name], layout  # type: ignore[misc]  # just looked at
        elif parametrize.is_parametrized(part, name):
            yield from _parametrized(part, name, layout)
        elif own.get(f"{name}_g") is not None and own.get(f"{name}_v") is not None:  # torch.nn.utils.weight_norm
            yield own[f"{name}_v"], replace(layout, normed=True)  # type: ignore[misc]
        elif own.get(f"{name}_orig") is not None:  # torch.nn.utils.spectral_norm and torch.nn.utils.prune
            yield own[f"{name}_orig"], layout  # type: ignore[misc]


def _weight_names(part: nn.Module) -> tuple[str, ...]:
    if isinstance(part, nn.Linear | _ConvNd | nn.Bilinear) or is_hugging_face_conv1d(part):
        return ("weight",)
    if isinstance(part, nn.RNNBase):
        return tuple(name for name in part._flat_weights_names if name.startswith("weight"))
    if isinstance(part, nn.RNNCellBase):
        return ("weight_ih", "weight_hh")
    if isinstance(part, nn.MultiheadAttention):
        return _ATTENTION
    return ("weight",) if _looks_like_a_layer(part) else ()


def _looks_like_a_layer(part: nn.Module) -> bool:
    """Whether a class of another library says of itself what a linear or convolutional layer says (``DeformConv2d``)."""
    weight = part._parameters.get("weight")
    for into, out in (("in_features", "out_features"), ("in_channels", "out_channels")):
        sizes, groups = (getattr(part, into, None), getattr(part, out, None)), getattr(part, "groups", 1)
        if weight is not None and weight.ndim >= 2 and isinstance(sizes[0], int) and isinstance(groups, int):
            return (weight.shape[1] * groups, weight.shape[0]) == sizes
    return False


def is_hugging_face_conv1d(part: nn.Module) -> bool:
    """Whether a module is ``transformers.pytorch_utils.Conv1D``: a linear layer with a weight ``(I, O)``, as in GPT-2."""
    bases = ((base.__name__, base.__module__.partition(".")[0]) for base in type(part).__mro__)
    return ("Conv1D", "transformers") in bases


def _parametrized(part: nn.Module, name: str, layout: WeightKind) -> Iterator[tuple[nn.Parameter, WeightKind]]:
    """The tensor behind a parametrized weight, if its zeros are zeros of the weight (``torch.nn.utils.parametrizations``)."""
    chain: nn.Module = part.parametrizations[name]  # type: ignore[index,assignment]  # a ModuleDict
    with isolated_random(), torch.no_grad():
        trial = copy.deepcopy(chain).eval()  # spectral norm updates its vectors in train mode
        shape = trial().shape
        for key, behind in chain.named_parameters(recurse=False):
            if behind.shape != shape or behind.ndim < 2:
                continue
            tensor = dict(trial.named_parameters())[key]
            tensor.data = torch.where(tensor == 0, torch.ones_like(tensor), tensor)
            tensor.data.view(-1)[::2] = 0
            if trial().view(-1)[::2].any():
                yield behind, replace(layout, refusal="zeros don't survive its parametrization")
                continue
            tensor.data[0] = 0
            yield behind, replace(layout, normed=bool(trial().isnan().any()))


def _adapter_parameters(module: nn.Module) -> Iterator[int]:
    """Parameters of low-rank adapters (LoRA and its kin), by id: peft's layers name theirs in ``adapter_layer_names``."""
    for part in module.modules():
        named = tuple(getattr(part, "adapter_layer_names", ()) or ())
        for name, child in part.named_children():
            if name in named or name.lower().startswith("lora_"):
                yield from map(id, child.parameters())
        for name, parameter in part.named_parameters(recurse=False):
            if name in named or name.lower().startswith("lora_"):
                yield id(parameter)
