"""Small networks of the kinds that people deploy, in plain torch, for tests and experiments that must hold for all of them.

Each has random weights from a fixed seed and batch norm statistics of random data, so that none of its layers is trivial.
"""

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.functional import relu6, scaled_dot_product_attention, silu

from examples.models import ResNet


def conv_norm(channels_in: int, channels_out: int, size: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """Convolution and batch norm."""
    conv = nn.Conv2d(channels_in, channels_out, size, stride, size // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(channels_out))


class PlainCNN(nn.Module):
    """VGG-like: convolutions, pooling, two linear layers. ``(N, 3, 32, 32)`` to ``(N, 10)``."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        before = 3
        for channels in (width, 2 * width, 4 * width):
            layers += [conv_norm(before, channels, 3), nn.ReLU(), nn.MaxPool2d(2)]
            before = channels
        self.body = nn.Sequential(*layers)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(16 * before, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.body(x))


class Depthwise(nn.Module):
    """MobileNetV2-like inverted residuals (https://arxiv.org/abs/1801.04381). ``(N, C, H, W)`` to ``(N, 10)``."""

    def __init__(self, channels_in: int = 3, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_norm(channels_in, width, 3)
        self.blocks = nn.ModuleList()
        self.residual: list[bool] = []
        before = width
        for channels, stride in ((width, 1), (2 * width, 2), (2 * width, 1), (4 * width, 2), (4 * width, 1)):
            inner = 3 * before
            expand = [conv_norm(before, inner, 1), nn.ReLU6(), conv_norm(inner, inner, 3, stride, inner), nn.ReLU6()]
            self.blocks.append(nn.Sequential(*expand, conv_norm(inner, channels, 1)))
            self.residual.append(stride == 1 and before == channels)
            before = channels
        self.head = nn.Linear(before, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = relu6(self.stem(x))
        for block, residual in zip(self.blocks, self.residual, strict=True):
            x = x + block(x) if residual else block(x)
        return self.head(x.mean((2, 3)))


class Gated(nn.Module):
    """EfficientNet-like: SiLU, squeeze and excitation (https://arxiv.org/abs/1905.11946). ``(N, 3, 32, 32)`` to ``(N, 10)``."""

    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.stem, self.deep = conv_norm(3, width, 3, 2), conv_norm(width, width, 5, 1, width)
        self.squeeze, self.excite = nn.Conv2d(width, 8, 1), nn.Conv2d(8, width, 1)
        self.project, self.wide = conv_norm(width, 2 * width, 1), conv_norm(2 * width, 2 * width, 3, 2)
        self.act, self.head = nn.Hardswish(), nn.Linear(2 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = silu(self.deep(silu(self.stem(x))))
        x = x * torch.sigmoid(self.excite(silu(self.squeeze(x.mean((2, 3), keepdim=True)))))
        return self.head(self.act(self.wide(self.act(self.project(x)))).mean((2, 3)))


class UNet(nn.Module):
    """Encoder, decoder, concatenated skips (https://arxiv.org/abs/1505.04597). ``(N, 3, 32, 32)`` to ``(N, 4, 32, 32)``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.down1, self.down2 = conv_norm(3, width, 3), conv_norm(width, 2 * width, 3)
        self.deep = conv_norm(2 * width, 4 * width, 3)
        self.up2 = nn.ConvTranspose2d(4 * width, 2 * width, 2, 2)
        self.join2, self.join1 = conv_norm(4 * width, 2 * width, 3), conv_norm(3 * width, width, 3)
        self.up1, self.pool = nn.Upsample(scale_factor=2, mode="nearest"), nn.MaxPool2d(2)
        self.head = nn.Conv2d(width, 4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits of each pixel."""
        a = torch.relu(self.down1(x))
        b = torch.relu(self.down2(self.pool(a)))
        y = self.up2(torch.relu(self.deep(self.pool(b))))
        y = torch.relu(self.join2(torch.cat([y, b], 1)))
        return self.head(torch.relu(self.join1(torch.cat([self.up1(y), a], 1))))


class Inception(nn.Module):
    """Branches that are concatenated, average pooling (https://arxiv.org/abs/1409.4842). ``(N, 3, 32, 32)`` to ``(N, 10)``."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.stem = conv_norm(3, width, 3, 2)
        self.one, self.three, self.five = (conv_norm(width, width, k) for k in (1, 3, 5))
        self.pooled, self.pool = conv_norm(width, width, 1), nn.AvgPool2d(3, 1, 1)
        self.join, self.head = conv_norm(4 * width, 4 * width, 3, 2), nn.Linear(4 * width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        x = torch.relu(self.stem(x))
        branches = [self.one(x), self.three(x), self.five(x), self.pooled(self.pool(x))]
        x = torch.relu(self.join(torch.cat([torch.relu(b) for b in branches], 1)))
        return self.head(nn.functional.adaptive_avg_pool2d(x, 1).flatten(1))


class Recurrent(nn.Module):
    """A convolution over time, an LSTM or GRU, a linear head. ``(N, T, 12)`` to ``(N, 10)``."""

    def __init__(self, kind: str = "LSTM", width: int = 64) -> None:
        super().__init__()
        self.conv = nn.Conv1d(12, width, 3, padding=1)
        self.cells = getattr(nn, kind)(width, width, batch_first=True)
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        y = torch.relu(self.conv(x.transpose(1, 2))).transpose(1, 2)
        return self.head(self.cells(y)[0].mean(1))


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection (https://arxiv.org/abs/1706.03762): ``(N, T, C)`` to the same."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attended tokens."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (N, heads, T, C / heads) each
        return self.out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm transformer layer: ``(N, T, C)`` to the same."""

    def __init__(self, width: int, heads: int = 4) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Transformed tokens."""
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """Vision transformer (https://arxiv.org/abs/2010.11929). ``(N, 3, 32, 32)`` to ``(N, 10)``."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.patches, self.place = nn.Conv2d(3, width, 4, 4), nn.Parameter(0.02 * torch.randn(1, 64, width))
        self.layers = nn.Sequential(*[Layer(width) for _ in range(depth)])
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        tokens = self.patches(x).flatten(2).transpose(1, 2) + self.place
        return self.head(self.norm(self.layers(tokens)).mean(1))


class Bert(nn.Module):
    """BERT-like: tokens and a mask, both integers ``(N, T)``, to ``(N, 2)`` (https://arxiv.org/abs/1810.04805)."""

    def __init__(self, width: int = 64, depth: int = 2, words: int = 200) -> None:
        super().__init__()
        self.words, self.place = nn.Embedding(words, width), nn.Embedding(64, width)
        self.norm = nn.LayerNorm(width)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.1, "gelu", batch_first=True)
        self.layers = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.head = nn.Linear(width, 2)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Logits of the first token."""
        x = self.norm(self.words(input_ids) + self.place(torch.arange(input_ids.shape[1], device=input_ids.device)))
        return self.head(self.layers(x, src_key_padding_mask=attention_mask == 0)[:, 0])


class MLP(nn.Module):
    """Linear layers with batch norm. ``(N, 64)`` to ``(N, 10)``."""

    def __init__(self, width: int = 256) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(64, width), nn.BatchNorm1d(width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.head = nn.Linear(width, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits."""
        return self.head(self.body(x))


def _images(n: int) -> tuple[torch.Tensor, ...]:
    return (torch.randn(n, 3, 32, 32),)


def _sentences(n: int) -> tuple[torch.Tensor, ...]:
    mask = (torch.arange(16)[None] < torch.randint(4, 17, (n, 1))).long()
    return torch.randint(0, 200, (n, 16)), mask


# By name: how to make the network, and `n` random samples of its inputs.
ZOO: dict[str, tuple[Callable[[], nn.Module], Callable[[int], tuple[torch.Tensor, ...]]]] = {
    "cnn": (PlainCNN, _images),
    "resnet": (lambda: ResNet(8, 16), lambda n: (torch.randn(n, 1, 28, 28),)),
    "depthwise": (Depthwise, _images),
    "gated": (Gated, _images),
    "unet": (UNet, _images),
    "inception": (Inception, _images),
    "lstm": (Recurrent, lambda n: (torch.randn(n, 20, 12),)),
    "gru": (lambda: Recurrent("GRU"), lambda n: (torch.randn(n, 20, 12),)),
    "encoder": (lambda: nn.Sequential(Layer(64), Layer(64)), lambda n: (torch.randn(n, 20, 64),)),
    "vit": (ViT, _images),
    "bert": (Bert, _sentences),
    "mlp": (MLP, lambda n: (torch.randn(n, 64),)),
}


def network(name: str, seed: int = 0) -> nn.Module:
    """A network of the zoo in eval mode; its batch norms have seen 64 random samples."""
    make, inputs = ZOO[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = make()
        for norm in [m for m in module.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]:
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, 0.0, 0.2)
        with torch.no_grad():
            for _ in range(8):
                module.train()(*inputs(64))
    return module.eval()


def samples(name: str, count: int, seed: int = 1) -> tuple[torch.Tensor, ...]:
    """Random inputs of a network of the zoo."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return ZOO[name][1](count)
