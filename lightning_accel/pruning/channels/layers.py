"""Effect of removing a channel on the tensors and attributes of each kind of layer."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.nn.utils import parametrize

from lightning_accel.errors import InvalidArgumentError
from lightning_accel.pruning.weights.layers import is_hugging_face_conv1d

FIXED_HEADS = (
    "nn.MultiheadAttention has heads as wide as its embedding asks for: with fewer of either its forward fails"
)


@dataclass(frozen=True)
class Losses:
    """Tensors and attributes that shrink with each channel of a layer, on one of its sides.

    Args:
        channels: number of channels.
        tensors: name, dimension, and the period after which its entries repeat (grouped convolutions).
        attributes: module path, name, position (0 for a number), and number of channels for a decrement of one.
        scale: name of the scale of batch norm, if it is one.
        normalises: whether the layer normalizes over channels.
    """

    channels: int
    tensors: tuple[tuple[str, int, int], ...]
    attributes: tuple[tuple[str, str, int, int], ...] = ()
    scale: str = ""
    normalises: bool = False


def losses_of(root: nn.Module, name: str, role: str) -> Losses:
    """Describe the effect of removing a channel on a layer.

    Args:
        root: module that contains the layer.
        name: of a layer, or of a parameter used by itself (then ``"<name>@<dimension>"``).
        role: ``"out"`` for output channels, ``"in"`` for input channels.

    Raises:
        InvalidArgumentError: channels of the layer can't be removed; the message is the reason.
    """
    if "@" in name:
        parameter, dim = name.split("@")
        size = root.get_parameter(parameter).shape[int(dim)]
        return Losses(size, ((parameter, int(dim), size),))
    layer = root.get_submodule(name)
    if makes_channels(root, name) and "weight" not in layer._parameters:
        raise InvalidArgumentError(
            f"forward needs all of its channels: the weight of `{name}` is computed ({_computed_by(layer)}); remove that to prune them"
        )
    losses = _losses(layer, role)
    if isinstance(layer, nn.MultiheadAttention):
        raise InvalidArgumentError(FIXED_HEADS)
    if losses is None:
        raise InvalidArgumentError(f"it isn't known how a {type(layer).__name__} (`{name}`) loses channels")
    here = f"{name}." if name else ""
    present = {key for key, t in [*layer.named_parameters(recurse=False), *layer.named_buffers(recurse=False)]}
    return Losses(
        losses.channels,
        tuple((here + key, dim, period) for key, dim, period in losses.tensors if key in present),
        tuple((name, key, where, divisor) for _, key, where, divisor in losses.attributes),
        here + losses.scale if losses.scale in present else "",
        losses.normalises,
    )


def _numbers(*names: str) -> tuple[tuple[str, str, int, int], ...]:
    return tuple(("", name, 0, 1) for name in names)


def _losses(layer: nn.Module, role: str) -> Losses | None:
    if isinstance(layer, _ConvNd):
        return _convolution(layer, role)
    if isinstance(layer, nn.Linear):
        if role == "out":
            size = layer.out_features
            return Losses(size, (("weight", 0, size), ("bias", 0, size)), _numbers("out_features"))
        return Losses(layer.in_features, (("weight", 1, layer.in_features),), _numbers("in_features"))
    if is_hugging_face_conv1d(layer):  # laid out (in, out)
        into, size = layer.weight.shape  # type: ignore[misc]
        if role == "out":
            return Losses(size, (("weight", 1, size), ("bias", 0, size)), _numbers("nf"))
        return Losses(into, (("weight", 0, into),), _numbers("nx") if "nx" in vars(layer) else ())
    if isinstance(layer, _BatchNorm | _InstanceNorm):
        size = layer.num_features
        tensors = tuple((name, 0, size) for name in ("weight", "bias", "running_mean", "running_var"))
        scale = "weight" if isinstance(layer, _BatchNorm) else ""
        return Losses(size, tensors, _numbers("num_features"), scale)
    if isinstance(layer, nn.GroupNorm):
        size = layer.num_channels
        numbers = (*_numbers("num_channels"), ("", "num_groups", 0, size // layer.num_groups))
        return Losses(size, (("weight", 0, size), ("bias", 0, size)), numbers, normalises=True)
    if isinstance(layer, nn.LayerNorm):
        size, last = layer.normalized_shape[-1], len(layer.normalized_shape) - 1
        shape = (("", "normalized_shape", last, 1),)
        return Losses(size, (("weight", last, size), ("bias", last, size)), shape, normalises=True)
    if isinstance(layer, nn.PReLU):
        size = layer.num_parameters
        return Losses(size, (("weight", 0, size),), _numbers("num_parameters")) if size > 1 else Losses(2**62, ())
    if isinstance(layer, nn.Embedding):
        return Losses(layer.embedding_dim, (("weight", 1, layer.embedding_dim),), _numbers("embedding_dim"))
    return None


def _convolution(layer: _ConvNd, role: str) -> Losses:
    """A weight is (out, in / groups, ...), transposed (in, out / groups, ...)."""
    out_dim, in_dim = (1, 0) if isinstance(layer, _ConvTransposeNd) else (0, 1)
    outs, ins = layer.out_channels, layer.in_channels
    if depthwise(layer):
        attributes = _numbers("out_channels", "in_channels", "groups")
        return Losses(outs, (("weight", 0, outs), ("bias", 0, outs)), attributes)
    if role == "out":
        return Losses(
            outs, (("weight", out_dim, layer.weight.shape[out_dim]), ("bias", 0, outs)), _numbers("out_channels")
        )
    return Losses(ins, (("weight", in_dim, layer.weight.shape[in_dim]),), _numbers("in_channels"))


def depthwise(layer: nn.Module) -> bool:
    """Whether a convolution is depthwise."""
    return isinstance(layer, _ConvNd) and layer.groups == layer.out_channels == layer.in_channels > 1


def makes_channels(root: nn.Module, name: str) -> bool:
    """Whether a layer is a convolution or linear; other layers pass channels on."""
    layer = None if "@" in name else root.get_submodule(name)
    return layer is not None and (isinstance(layer, _ConvNd | nn.Linear) or is_hugging_face_conv1d(layer))


@contextmanager
def as_linear(root: nn.Module) -> Iterator[None]:
    """Context in which layers of Hugging Face's ``Conv1D`` are the linear layers that they compute, which can be traced."""
    found = [(parent, name, child) for parent in root.modules() for name, child in parent.named_children()]
    found = [(parent, name, child) for parent, name, child in found if is_hugging_face_conv1d(child)]
    try:
        for parent, name, child in found:
            weight, bias = child.get_parameter("weight"), child._parameters.get("bias")
            options = {"bias": bias is not None, "dtype": weight.dtype, "device": weight.device}
            linear = nn.utils.skip_init(nn.Linear, *weight.shape, **options)
            linear.weight.data = weight.detach().t().contiguous()
            if bias is not None:
                linear.bias.data = bias.detach()
            parent._modules[name] = linear
        yield
    finally:
        for parent, name, child in found:
            parent._modules[name] = child


def check_copyable(root: nn.Module) -> None:
    """Raise if layers hold computed tensors, which no copy of the module can hold.

    Raises:
        InvalidArgumentError: one does, as under ``torch.nn.utils.weight_norm`` and ``torch.nn.utils.prune``.
    """
    computed = {
        f"{name}.{key}" if name else key: _computed_by(part)
        for name, part in root.named_modules()
        for key, value in vars(part).items()
        if isinstance(value, torch.Tensor) and not value.is_leaf
    }
    if computed:
        names = ", ".join(f"`{name}` ({how})" for name, how in list(computed.items())[:4])
        more = f" and {len(computed) - 4} more" if len(computed) > 4 else ""
        raise InvalidArgumentError(
            f"Argument `model` must have weights that are parameters for ChannelPruning, but got computed ones: {names}{more}. Remove what "
            "computes them before training (`torch.nn.utils.remove_weight_norm`, `remove_spectral_norm`, `prune.remove`)."
        )


def _computed_by(layer: nn.Module) -> str:
    """What computes the weight of a layer."""
    if parametrize.is_parametrized(layer, "weight"):
        chain = layer.parametrizations["weight"]  # type: ignore[index]
        return ", ".join(type(one).__name__.strip("_") for one in chain)
    hooks = {type(hook).__name__ for hook in layer._forward_pre_hooks.values()}
    return ", ".join(sorted(hooks)) or "outside of the layer"
