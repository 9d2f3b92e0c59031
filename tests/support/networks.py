"""Networks of ordinary depth in plain torch, as narrow as one likes: what a deep network does to a proof, at a test's cost.

The names are those of the papers. Depth, kinds of blocks and the way branches meet are theirs; `width` scales channels.
Weights are random; :func:`with_statistics` lets batch norm see data, so that activations neither vanish nor explode.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def with_statistics(network: nn.Module, *inputs: Tensor, **keywords: Tensor) -> nn.Module:
    """Give batch norm the statistics of data: with those of its construction, activations of a deep random network vanish."""
    norms = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # exactly this batch's; what is left of the first ones would multiply over the layers
    with torch.no_grad():
        network.train()
        network(*inputs, **keywords)
    for norm, momentum in zip(norms, before, strict=True):
        norm.momentum = momentum
    return network


def conv(
    channels_in: int, channels_out: int, size: int = 1, stride: int = 1, groups: int = 1, act: nn.Module | None = None
) -> nn.Sequential:
    """Convolution and batch norm, with an activation if one is given."""
    layers = [
        nn.Conv2d(channels_in, channels_out, size, stride, size // 2, groups=groups, bias=False),
        nn.BatchNorm2d(channels_out),
    ]
    return nn.Sequential(*layers, *([] if act is None else [act]))


class SqueezeExcite(nn.Module):
    """Channel attention (https://arxiv.org/abs/1709.01507): ``(N, C, H, W)`` to the same."""

    def __init__(self, channels: int, squeezed: int, act: type[nn.Module]) -> None:
        super().__init__()
        self.squeeze, self.act, self.excite = nn.Conv2d(channels, squeezed, 1), act(), nn.Conv2d(squeezed, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(self.act(self.squeeze(F.adaptive_avg_pool2d(x, 1)))))


class Head(nn.Module):
    """Global average pooling and a linear layer: ``(N, C, H, W)`` to ``(N, classes)``."""

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.linear = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Basic(nn.Module):
    """ResNet's block of two convolutions."""

    expansion = 1

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(conv(before, width, 3, stride, act=nn.ReLU()), conv(width, width, 3))
        self.shortcut = nn.Identity() if stride == 1 and before == width else conv(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class Bottleneck(nn.Module):
    """ResNet's block of three convolutions; with groups and squeeze-excite it is RegNet-Y's."""

    expansion = 4

    def __init__(self, before: int, width: int, stride: int) -> None:
        super().__init__()
        after = self.expansion * width
        self.body = nn.Sequential(
            conv(before, width, act=nn.ReLU()), conv(width, width, 3, stride, act=nn.ReLU()), conv(width, after)
        )
        self.shortcut = nn.Identity() if stride == 1 and before == after else conv(before, after, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class ResNet(nn.Module):
    """https://arxiv.org/abs/1512.03385; ``(2, 2, 2, 2)`` basic is ResNet-18, ``(3, 4, 6, 3)`` bottlenecks are ResNet-50."""

    def __init__(
        self,
        block: type[Basic] | type[Bottleneck] = Basic,
        depths: Sequence[int] = (2, 2, 2, 2),
        width: int = 64,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.stem = nn.Sequential(conv(3, width, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1))
        blocks, before = [], width
        for stage, depth in enumerate(depths):
            for i in range(depth):
                blocks.append(block(before, width * 2**stage, 2 if i == 0 and stage else 1))
                before = width * 2**stage * block.expansion
        self.blocks, self.head = nn.Sequential(*blocks), Head(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)))


class InvertedResidual(nn.Module):
    """Expand, depthwise, project; squeeze-excite between them in EfficientNet."""

    def __init__(
        self, before: int, after: int, expand: int, size: int, stride: int, act: type[nn.Module], excite: bool
    ) -> None:
        super().__init__()
        inner = expand * before
        layers: list[nn.Module] = [] if expand == 1 else [conv(before, inner, act=act())]
        layers.append(conv(inner, inner, size, stride, inner, act()))
        if excite:
            layers.append(SqueezeExcite(inner, max(before // 4, 1), act))
        self.body = nn.Sequential(*layers, conv(inner, after))
        self.residual = stride == 1 and before == after

    def forward(self, x: Tensor) -> Tensor:
        return x + self.body(x) if self.residual else self.body(x)


class Mobile(nn.Module):
    """A stem, inverted residuals, a wide last convolution.

    Args:
        stages: (expansion, channels, blocks, stride, kernel size) of each.
        last: channels of the last convolution.
        act: the activation.
        excite: with squeeze-excite.
        width: share of the channels.
        classes: logits.
    """

    def __init__(
        self,
        stages: Sequence[tuple[int, int, int, int, int]],
        last: int,
        act: type[nn.Module],
        excite: bool,
        width: float = 1.0,
        classes: int = 10,
    ) -> None:
        super().__init__()
        before = scaled(32, width)
        blocks: list[nn.Module] = [conv(3, before, 3, 2, act=act())]
        for expand, channels, depth, stride, size in stages:
            for i in range(depth):
                after = scaled(channels, width)
                blocks.append(InvertedResidual(before, after, expand, size, stride if i == 0 else 1, act, excite))
                before = after
        blocks.append(conv(before, scaled(last, width), act=act()))
        self.blocks, self.head = nn.Sequential(*blocks), Head(scaled(last, width), classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


def scaled(channels: int, width: float) -> int:
    """That share of the channels, a multiple of 4."""
    return max(4, round(channels * width / 4) * 4)


def mobilenet_v2(width: float = 1.0) -> Mobile:
    """https://arxiv.org/abs/1801.04381."""
    stages = [
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 32, 3, 2, 3),
        (6, 64, 4, 2, 3),
        (6, 96, 3, 1, 3),
        (6, 160, 3, 2, 3),
        (6, 320, 1, 1, 3),
    ]
    return Mobile(stages, 1280, nn.ReLU6, False, width)


def efficientnet_b0(width: float = 1.0) -> Mobile:
    """https://arxiv.org/abs/1905.11946."""
    stages = [
        (1, 16, 1, 1, 3),
        (6, 24, 2, 2, 3),
        (6, 40, 2, 2, 5),
        (6, 80, 3, 2, 3),
        (6, 112, 3, 1, 5),
        (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ]
    return Mobile(stages, 1280, nn.SiLU, True, width)


class ConvNeXtBlock(nn.Module):
    """Depthwise 7x7, layer norm over channels, MLP, layer scale."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.mix = nn.Conv2d(channels, channels, 7, padding=3, groups=channels)
        self.norm = nn.LayerNorm(channels, eps=1e-6)
        self.mlp = nn.Sequential(nn.Linear(channels, 4 * channels), nn.GELU(), nn.Linear(4 * channels, channels))
        self.scale = nn.Parameter(torch.full((channels, 1, 1), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.mlp(self.norm(self.mix(x).permute(0, 2, 3, 1))).permute(0, 3, 1, 2)


class ChannelNorm(nn.LayerNorm):
    """Layer norm over the channels of ``(N, C, H, W)``."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class ConvNeXt(nn.Module):
    """https://arxiv.org/abs/2201.03545; these depths are ConvNeXt-T's."""

    def __init__(self, depths: Sequence[int] = (3, 3, 9, 3), width: int = 96, classes: int = 10) -> None:
        super().__init__()
        blocks: list[nn.Module] = [nn.Conv2d(3, width, 4, 4), ChannelNorm(width)]
        for stage, depth in enumerate(depths):
            channels = width * 2**stage
            if stage:
                blocks += [ChannelNorm(channels // 2), nn.Conv2d(channels // 2, channels, 2, 2)]
            blocks += [ConvNeXtBlock(channels) for _ in range(depth)]
        self.blocks, self.norm = nn.Sequential(*blocks), nn.LayerNorm(channels)
        self.head = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.blocks(x).mean((2, 3))))


class RegNetBlock(nn.Module):
    """Bottleneck with a grouped convolution and squeeze-excite."""

    def __init__(self, before: int, width: int, stride: int, group: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            conv(before, width, act=nn.ReLU()),
            conv(width, width, 3, stride, width // group, nn.ReLU()),
            SqueezeExcite(width, max(before // 4, 1), nn.ReLU),
            conv(width, width),
        )
        self.shortcut = nn.Identity() if stride == 1 and before == width else conv(before, width, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.body(x) + self.shortcut(x))


class RegNetY(nn.Module):
    """https://arxiv.org/abs/2003.13678; these depths are RegNetY-400MF's."""

    def __init__(
        self,
        depths: Sequence[int] = (1, 3, 6, 6),
        widths: Sequence[int] = (48, 104, 208, 440),
        group: int = 8,
        classes: int = 10,
    ) -> None:
        super().__init__()
        before = 32
        blocks: list[nn.Module] = [conv(3, before, 3, 2, act=nn.ReLU())]
        for depth, width in zip(depths, widths, strict=True):
            for i in range(depth):
                blocks.append(RegNetBlock(before, width, 2 if i == 0 else 1, group))
                before = width
        self.blocks, self.head = nn.Sequential(*blocks), Head(before, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class ShuffleUnit(nn.Module):
    """Half of the channels pass, half are computed, and they are shuffled."""

    def __init__(self, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.stride, half = stride, after // 2
        inner = before if stride > 1 else half
        self.right = nn.Sequential(
            conv(inner, half, act=nn.ReLU()), conv(half, half, 3, stride, half), conv(half, half, act=nn.ReLU())
        )
        self.left = nn.Sequential(conv(before, before, 3, stride, before), conv(before, half, act=nn.ReLU()))
        if stride == 1:
            self.left = nn.Sequential()

    def forward(self, x: Tensor) -> Tensor:
        left, right = (x, x) if self.stride > 1 else x.chunk(2, 1)
        x = torch.cat([self.left(left), self.right(right)], 1)
        return x.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


class ShuffleNetV2(nn.Module):
    """https://arxiv.org/abs/1807.11164; these depths are all of its sizes'."""

    def __init__(
        self,
        depths: Sequence[int] = (4, 8, 4),
        widths: Sequence[int] = (24, 116, 232, 464, 1024),
        classes: int = 10,
    ) -> None:
        super().__init__()
        blocks: list[nn.Module] = [conv(3, widths[0], 3, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
        for depth, before, after in zip(depths, widths, widths[1:], strict=False):
            blocks += [ShuffleUnit(before, after, 2), *(ShuffleUnit(after, after, 1) for _ in range(depth - 1))]
        blocks.append(conv(widths[-2], widths[-1], act=nn.ReLU()))
        self.blocks, self.head = nn.Sequential(*blocks), Head(widths[-1], classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(x))


class Encoder(nn.Module):
    """Pre-norm transformer layer: ``(N, T, C)`` to the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """https://arxiv.org/abs/2012.12877; 12 layers are DeiT's."""

    def __init__(
        self, pixels: int = 32, patch: int = 8, depth: int = 12, width: int = 192, heads: int = 3, classes: int = 10
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, patch, patch)
        self.token = nn.Parameter(torch.randn(1, 1, width) * 0.1)
        self.position = nn.Parameter(torch.randn(1, (pixels // patch) ** 2 + 1, width) * 0.1)
        self.layers = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1) + self.position
        return self.head(self.norm(self.layers(x))[:, 0])


class WindowAttention(nn.Module):
    """Attention inside windows of an image, shifted in every other layer; a table of biases by relative position."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.heads, self.window, self.shift = heads, window, shift
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.table = nn.Parameter(torch.randn((2 * window - 1) ** 2, heads) * 0.1)
        where = torch.stack(torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij")).flatten(1)
        apart = (where[:, :, None] - where[:, None]).permute(1, 2, 0) + window - 1
        self.register_buffer("index", apart[..., 0] * (2 * window - 1) + apart[..., 1])
        region = torch.zeros(1, size, size, 1)
        for i, rows in enumerate((slice(-window), slice(-window, -shift or None), slice(-shift or size, None))):
            for j, columns in enumerate((slice(-window), slice(-window, -shift or None), slice(-shift or size, None))):
                region[:, rows, columns] = 3 * i + j
        parts = self.cut(region).squeeze(-1)  # (windows, window ** 2)
        mask = torch.where(parts[:, None] == parts[:, :, None], 0.0, -100.0)
        self.register_buffer("mask", mask if shift else torch.zeros_like(mask))

    def cut(self, x: Tensor) -> Tensor:
        """``(N, H, W, C)`` to ``(N * windows, window ** 2, C)``."""
        n, height, width, channels = x.shape
        x = x.view(n, height // self.window, self.window, width // self.window, self.window, channels)
        return x.transpose(2, 3).reshape(-1, self.window**2, channels)

    def forward(self, x: Tensor) -> Tensor:
        n, height, width, channels = x.shape
        if self.shift:
            x = torch.roll(x, (-self.shift, -self.shift), (1, 2))
        windows = len(self.mask)
        q, k, v = self.qkv(self.cut(x)).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        bias = self.table[self.index.flatten()].view(self.window**2, self.window**2, -1).permute(2, 0, 1)
        scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1) + bias
        scores = (scores.unflatten(0, (n, windows)) + self.mask[:, None]).flatten(0, 1)
        x = self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))
        x = x.view(n, height // self.window, width // self.window, self.window, self.window, channels)
        x = x.transpose(2, 3).reshape(n, height, width, channels)
        return torch.roll(x, (self.shift, self.shift), (1, 2)) if self.shift else x


class SwinLayer(nn.Module):
    """Pre-norm layer around attention in windows: ``(N, H, W, C)`` to the same."""

    def __init__(self, width: int, heads: int, size: int, window: int, shift: int) -> None:
        super().__init__()
        self.attention = WindowAttention(width, heads, size, window, shift)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Merge(nn.Module):
    """Four neighbours become one position of twice the channels."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.reduce = nn.LayerNorm(4 * width), nn.Linear(4 * width, 2 * width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        four = [x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]]
        return self.reduce(self.norm(torch.cat(four, -1)))


class Swin(nn.Module):
    """https://arxiv.org/abs/2103.14030; these depths are Swin-T's."""

    def __init__(
        self,
        pixels: int = 64,
        depths: Sequence[int] = (2, 2, 6, 2),
        width: int = 96,
        window: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 2, 2)
        size, layers = pixels // 2, list[nn.Module]()
        for stage, depth in enumerate(depths):
            if stage:
                layers.append(Merge(width))
                size, width = size // 2, 2 * width
            for i in range(depth):
                shift = window // 2 if i % 2 and size > window else 0
                layers.append(SwinLayer(width, max(width // 16, 1), size, min(window, size), shift))
        self.layers, self.norm, self.head = nn.Sequential(*layers), nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers(self.patches(x).permute(0, 2, 3, 1))
        return self.head(self.norm(x).mean((1, 2)))


class UNet(nn.Module):
    """https://arxiv.org/abs/1505.04597: four levels, concatenated skips. ``(N, 3, H, W)`` to ``(N, classes, H, W)``."""

    def __init__(self, width: int = 64, levels: int = 4, classes: int = 4) -> None:
        super().__init__()
        widths = [width * 2**i for i in range(levels + 1)]
        self.down = nn.ModuleList(self.double(a, b) for a, b in zip([3, *widths], widths, strict=False))
        pairs = list(zip(widths[1:], widths, strict=False))[::-1]
        self.up = nn.ModuleList(nn.ConvTranspose2d(a, b, 2, 2) for a, b in pairs)
        self.join = nn.ModuleList(self.double(a, b) for a, b in pairs)
        self.head = nn.Conv2d(width, classes, 1)

    @staticmethod
    def double(before: int, after: int) -> nn.Sequential:
        return nn.Sequential(conv(before, after, 3, act=nn.ReLU()), conv(after, after, 3, act=nn.ReLU()))

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for i, down in enumerate(self.down):
            x = down(F.max_pool2d(x, 2) if i else x)
            skips.append(x)
        for up, join, skip in zip(self.up, self.join, skips[-2::-1], strict=True):
            x = join(torch.cat([skip, up(x)], 1))
        return self.head(x)


class Split(nn.Module):
    """YOLOv8's C2f: halves, residual blocks on the last one, everything joined."""

    def __init__(self, before: int, after: int, depth: int, residual: bool) -> None:
        super().__init__()
        half = after // 2
        self.first, self.residual = conv(before, after, act=nn.SiLU()), residual
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(half, half, 3, act=nn.SiLU()), conv(half, half, 3, act=nn.SiLU())) for _ in range(depth)
        )
        self.last = conv((2 + depth) * half, after, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = list(self.first(x).chunk(2, 1))
        for block in self.blocks:
            parts.append(parts[-1] + block(parts[-1]) if self.residual else block(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Pyramid(nn.Module):
    """YOLOv8's SPPF: one pooling three times over, everything joined."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first, self.pool = conv(channels, channels // 2, act=nn.SiLU()), nn.MaxPool2d(5, 1, 2)
        self.last = conv(2 * channels, channels, act=nn.SiLU())

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.first(x)]
        for _ in range(3):
            parts.append(self.pool(parts[-1]))
        return self.last(torch.cat(parts, 1))


class Detector(nn.Module):
    """Like YOLOv8-n: backbone, neck that goes up and down again, a head for each of three scales.

    In train mode it returns three maps ``(N, 64 + classes, H, W)``, in eval mode boxes and scores ``(N, 4 + classes, anchors)``.

    Args:
        width: channels of the stem.
        classes: of objects.
        decode: ``False`` returns the maps in eval mode, too.
    """

    def __init__(self, width: int = 16, classes: int = 8, decode: bool = True) -> None:
        super().__init__()
        self.classes, self.decode = classes, decode
        a, b, c, d = 2 * width, 4 * width, 8 * width, 16 * width
        self.stem = nn.Sequential(
            conv(3, width, 3, 2, act=nn.SiLU()), conv(width, a, 3, 2, act=nn.SiLU()), Split(a, a, 1, True)
        )
        self.third = nn.Sequential(conv(a, b, 3, 2, act=nn.SiLU()), Split(b, b, 2, True))
        self.fourth = nn.Sequential(conv(b, c, 3, 2, act=nn.SiLU()), Split(c, c, 2, True))
        self.fifth = nn.Sequential(conv(c, d, 3, 2, act=nn.SiLU()), Split(d, d, 1, True), Pyramid(d))
        self.up4, self.up3 = Split(c + d, c, 1, False), Split(b + c, b, 1, False)
        self.to4, self.to5 = conv(b, b, 3, 2, act=nn.SiLU()), conv(c, c, 3, 2, act=nn.SiLU())
        self.down4, self.down5 = Split(b + c, c, 1, False), Split(c + d, d, 1, False)
        self.boxes = nn.ModuleList(self.branch(w, b, 64) for w in (b, c, d))
        self.scores = nn.ModuleList(self.branch(w, b, classes) for w in (b, c, d))

    @staticmethod
    def branch(before: int, width: int, after: int) -> nn.Sequential:
        layers = [conv(before, width, 3, act=nn.SiLU()), conv(width, width, 3, act=nn.SiLU())]
        return nn.Sequential(*layers, nn.Conv2d(width, after, 1))

    def forward(self, x: Tensor) -> list[Tensor] | Tensor:
        third = self.third(self.stem(x))
        fourth = self.fourth(third)
        fifth = self.fifth(fourth)
        fourth = self.up4(torch.cat([F.interpolate(fifth, scale_factor=2.0), fourth], 1))
        third = self.up3(torch.cat([F.interpolate(fourth, scale_factor=2.0), third], 1))
        fourth = self.down4(torch.cat([self.to4(third), fourth], 1))
        fifth = self.down5(torch.cat([self.to5(fourth), fifth], 1))
        features = zip(self.boxes, self.scores, (third, fourth, fifth), strict=True)
        maps = [torch.cat([box(y), score(y)], 1) for box, score, y in features]
        return maps if self.training or not self.decode else self.decoded(maps)

    def decoded(self, maps: list[Tensor]) -> Tensor:
        """Distances to the four sides, as means of their distributions over 16 bins, and probabilities."""
        flat = torch.cat([m.flatten(2) for m in maps], 2)  # (N, 64 + classes, anchors)
        boxes, scores = flat.split((64, self.classes), 1)
        bins = torch.arange(16, dtype=flat.dtype, device=flat.device).view(1, 1, 16, 1)
        sides = (boxes.unflatten(1, (4, 16)).softmax(2) * bins).sum(2)
        anchors, strides = [], []
        for i, m in enumerate(maps):
            ys, xs = (torch.arange(size, dtype=m.dtype, device=m.device) + 0.5 for size in m.shape[2:])
            anchors.append(torch.stack(torch.meshgrid(xs, ys, indexing="xy")).flatten(1))
            strides.append(torch.full((1, anchors[-1].shape[1]), 8.0 * 2**i, device=m.device))
        points, stride = torch.cat(anchors, 1), torch.cat(strides, 1)
        low, high = points - sides[:, :2], points + sides[:, 2:]
        return torch.cat([(low + high) / 2 * stride, (high - low) * stride, scores.sigmoid()], 1)
