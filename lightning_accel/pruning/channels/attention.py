"""Find attention modules, whose channels are grouped into heads."""

from dataclasses import dataclass

from torch import nn

_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads")


@dataclass(frozen=True)
class Attention:
    """A candidate for an attention module; whether heads can be removed is verified separately.

    Args:
        heads: number of heads.
        width: channels of a head.
        fused: sides of the fused query-key-value layer, and of the layer that reads the heads; empty for separate layers.
        projections: candidates for separate query, key and value layers.
        variants: candidate changes of the module's attributes for a removed head, the most complete first.
    """

    heads: int
    width: int
    fused: tuple[tuple[str, str], ...]
    projections: tuple[str, ...]
    variants: tuple[tuple[tuple[str, str, int], ...], ...]


def find_attention(module: nn.Module) -> list[Attention]:
    """Find modules with a number of heads and matching linear layers.

    Args:
        module: searched with all submodules; ``nn.MultiheadAttention`` is excluded.
    """
    found = []
    for path, owner in module.named_modules():
        count = next((name for name in _COUNTS if type(vars(owner).get(name)) is int), None)
        if count is None or isinstance(owner, nn.MultiheadAttention):
            continue
        heads = vars(owner)[count]
        linear = {f"{path}.{n}" if path else n: m for n, m in owner.named_children() if isinstance(m, nn.Linear)}
        pairs = [
            (a, b)
            for a, qkv in linear.items()
            for b, proj in linear.items()
            if a != b and qkv.out_features == 3 * proj.in_features
        ]
        if len(pairs) == 1:
            inner = linear[pairs[0][1]].in_features
            fused: tuple[tuple[str, str], ...] = ((pairs[0][0], "out"), (pairs[0][1], "in"))
        elif len(linear) >= 3:
            inner, fused = next(iter(linear.values())).out_features, ()
            linear = {name: layer for name, layer in linear.items() if layer.out_features == inner}
        else:
            continue
        if heads < 1 or inner % heads:
            continue
        width = inner // heads
        of_all = [n for n, v in vars(owner).items() if type(v) is int and v == inner and "head" in n and n != count]
        one = ((path, count, 1),)
        variants = dict.fromkeys([(*one, *((path, name, width) for name in of_all)), one, ()])
        found.append(Attention(heads, width, fused, tuple(linear), tuple(variants)))
    return found
