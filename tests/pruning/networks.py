"""Networks with every way in which channels of several layers depend on each other."""

import torch
from torch import nn
from torch.nn.functional import gelu, glu, scaled_dot_product_attention
from torch.nn.utils.parametrizations import weight_norm

IMAGES, TOKENS = (4, 3, 8, 8), (4, 5)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.inner, self.norm2 = nn.Conv2d(8, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.outer, self.head = nn.Conv2d(12, 8, 3, padding=1), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(x + self.outer(torch.relu(self.norm2(self.inner(x)))))
        return self.head(x.mean((2, 3)))


class Concatenated(nn.Module):
    """Two layers side by side, or with the input between them, whose channels torch-pruning doesn't count."""

    def __init__(self, with_input: bool = False):
        super().__init__()
        self.with_input = with_input
        self.a, self.b, self.c = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 4, 1), nn.Conv2d(13 if with_input else 10, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        a, b = torch.sigmoid(self.a(x)), torch.tanh(self.b(x))
        x = torch.cat([a, x, b] if self.with_input else [a, b], 1)
        return self.head(self.c(x).relu().amax((2, 3)))


class Grouped(nn.Module):
    """A grouped convolution between two others, then a depthwise one."""

    def __init__(self):
        super().__init__()
        self.a, self.grouped = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 12, 3, groups=4)
        self.depthwise, self.b = nn.Conv2d(12, 12, 3, groups=12), nn.Conv2d(12, 6, 1)
        self.head = nn.Linear(6, 3)

    def forward(self, x):
        x = self.depthwise(torch.relu(self.grouped(torch.relu(self.a(x)))))
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


class Flattened(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.ConvTranspose2d(3, 6, 2), nn.InstanceNorm2d(6, affine=True)
        self.linear, self.act, self.head = nn.Linear(6 * 81, 10), nn.PReLU(10), nn.Linear(10, 3)

    def forward(self, x):
        return self.head(self.act(self.linear(self.norm(self.conv(x)).flatten(1))))


class GroupNormed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.conv2 = nn.Conv2d(3, 12, 3), nn.GroupNorm(4, 12), nn.Conv2d(12, 5, 1)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        return self.head(self.conv2(self.norm(self.conv(x)).relu()).relu().mean((2, 3)))


class Gated(nn.Module):
    """Two halves of one layer, multiplied."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        value, gate = self.up(x).chunk(2, 1)
        return self.head(self.down(value * torch.sigmoid(gate)).relu().mean((2, 3)))


class Glu(nn.Module):
    """Gated linear units, as a function and as a module, with a batch norm behind."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Conv2d(3, 16, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 12, 1)
        self.gate, self.head = nn.GLU(dim=1), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.gate(self.b(self.norm(glu(self.a(x), 1)))).mean((2, 3)))


class Sliced(nn.Module):
    """Two halves of one layer, whose size is written into the code."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.head = nn.Conv2d(3, 16, 1), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.up(x)
        return self.head(self.down(x[:, :8] * torch.sigmoid(x[:, 8:])).relu().mean((2, 3)))


class Conv1D(nn.Module):
    """The linear layer of GPT-2 in ``transformers``, whose weight is (in, out); it is known by its name and its place."""

    __module__ = "transformers.pytorch_utils"

    def __init__(self, nf: int, nx: int):
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight, self.bias = nn.Parameter(torch.randn(nx, nf) / 3), nn.Parameter(torch.randn(nf))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.size()[:-1], self.nf)


class Gpt(nn.Module):
    """A block of GPT-2: the values of attention are cached, by a concatenation with an empty tensor."""

    def __init__(self):
        super().__init__()
        self.words, self.norm, self.value = nn.Embedding(11, 12), nn.LayerNorm(12), Conv1D(8, 12)
        self.proj, self.fc, self.out, self.head = Conv1D(12, 8), Conv1D(20, 12), Conv1D(12, 20), nn.Linear(12, 3)

    def forward(self, tokens):
        x = self.words(tokens)
        values = torch.cat([torch.tensor([], device=x.device, dtype=x.dtype), self.value(self.norm(x))], dim=-2)
        x = x + self.proj(values.mean(1, keepdim=True))
        return self.head((x + self.out(gelu(self.fc(x)))).mean(1))


class Squeezed(nn.Module):
    """Squeeze and excitation."""

    def __init__(self):
        super().__init__()
        self.conv, self.squeeze, self.excite = nn.Conv2d(3, 8, 3), nn.Linear(8, 4), nn.Linear(4, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        scale = torch.sigmoid(self.excite(torch.relu(self.squeeze(x.mean((2, 3))))))
        return self.head((x * scale[:, :, None, None]).mean((2, 3)))


class FusedAttention(nn.Module):
    def __init__(self, how: str):
        super().__init__()
        self.how, self.num_heads, self.head_dim = how, 4, 4
        self.qkv, self.proj = nn.Linear(16, 48), nn.Linear(16, 16)

    def forward(self, x):
        n, t, c = x.shape
        qkv = self.qkv(x).reshape(n, t, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.how == "unbind" else (qkv[0], qkv[1], qkv[2])
        x = ((q @ k.transpose(-2, -1)) * self.head_dim**-0.5).softmax(-1) @ v
        return self.proj(x.transpose(1, 2).reshape(n, t, c if self.how == "fixed" else -1))


class SeparateAttention(nn.Module):
    def __init__(self):
        super().__init__()
        self.n_heads, self.head_size = 2, 8
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))

    def forward(self, x):
        q, k, v = (f(x).unflatten(-1, (-1, self.head_size)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class Transformer(nn.Module):
    """A vision transformer of one block."""

    def __init__(self, attention: nn.Module):
        super().__init__()
        self.patches, self.position = nn.Conv2d(3, 16, 4, 4), nn.Parameter(torch.randn(1, 4, 16))
        self.norm1, self.attention, self.norm2 = nn.LayerNorm(16), attention, nn.LayerNorm(16)
        self.fc1, self.fc2, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.patches(x).flatten(2).transpose(1, 2) + self.position
        x = x + self.attention(self.norm1(x))
        x = x + self.fc2(gelu(self.fc1(self.norm2(x))))
        return {"logits": self.head(x.mean(1))}


class Encoder(nn.Module):
    """The layers of torch itself, on tokens."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 24, 0.3, batch_first=True), 2)
        self.head = nn.Linear(16, 3)

    def forward(self, tokens):
        return self.head(self.encoder(self.embed(tokens)).mean(1))


class Tied(nn.Module):
    """A decoder that is the encoder's transpose."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = nn.Linear(48, 10), nn.Linear(10, 10), nn.Linear(10, 3)
        self.other = nn.Linear(10, 10)
        self.other.weight = self.middle.weight

    def forward(self, x):
        return self.last(torch.relu(self.middle(torch.relu(self.first(x[:, :, :4, :4].flatten(1))))))


class Fixed(nn.Module):
    """A reshape with the number of channels written into it."""

    def __init__(self):
        super().__init__()
        self.conv, self.free, self.head = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(self.free(self.conv(x).reshape(-1, 8, 36, 1)).relu().mean((2, 3)))


class Softmaxed(nn.Module):
    """A softmax over channels: what leaves takes its share of the sum with it."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(48, 8), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.b(self.a(x[:, :, :4, :4].flatten(1)).softmax(1))))


class Single(nn.Module):
    """Insists on float32."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 8, 3), nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.conv(x.float()).relu().mean((2, 3)))


class Reused(nn.Module):
    """One layer that runs twice, and one that forward doesn't run."""

    def __init__(self):
        super().__init__()
        self.conv, self.twice, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1)
        self.head, self.auxiliary = nn.Linear(6, 3), nn.Linear(6, 2)

    def features(self, x):
        x = torch.relu(self.twice(torch.relu(self.twice(torch.relu(self.conv(x))))))
        return torch.relu(self.last(x)).mean((2, 3))

    def forward(self, x):
        return self.head(self.features(x))


class Recurrent(nn.Module):
    """A recurrent layer between linear ones."""

    def __init__(self):
        super().__init__()
        self.embed, self.recurrent = nn.Linear(8, 12), nn.LSTM(12, 10, batch_first=True)
        self.linear, self.head = nn.Linear(10, 7), nn.Linear(7, 3)

    def forward(self, x):
        return self.head(torch.relu(self.linear(self.recurrent(self.embed(x.flatten(1, 2)))[0][:, -1])))


class Skipping(nn.Module):
    """Down, up by a transposed convolution, and side by side with what was before: a segmentation."""

    def __init__(self):
        super().__init__()
        self.stem, self.down = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 12, 3, 2, padding=1)
        self.up, self.out, self.head = nn.ConvTranspose2d(12, 8, 2, 2), nn.Conv2d(16, 6, 3), nn.Conv2d(6, 2, 1)

    def forward(self, x):
        before = torch.relu(self.stem(x))
        return self.head(torch.relu(self.out(torch.cat([self.up(torch.relu(self.down(before))), before], 1))))


class Growing(nn.Module):
    """Each layer reads what all before it made (DenseNet)."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.a, self.norm2, self.b = nn.Conv2d(6, 4, 3, padding=1), nn.BatchNorm2d(10), nn.Conv2d(10, 5, 1)
        self.head = nn.Linear(15, 3)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.cat([x, torch.relu(self.a(x))], 1)
        return self.head(torch.cat([x, torch.relu(self.b(self.norm2(x)))], 1).mean((2, 3)))


class Shuffled(nn.Module):
    """Channels of a grouped convolution that change places (ShuffleNet)."""

    def __init__(self):
        super().__init__()
        self.a, self.grouped = nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=3)
        self.b, self.head = nn.Conv2d(12, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        x = self.grouped(torch.relu(self.a(x))).unflatten(1, (3, -1)).transpose(1, 2).flatten(1, 2)
        return self.head(torch.relu(self.b(x)).mean((2, 3)))


class Halves(nn.Module):
    """Units that shuffle their channels, all but the first after a split into halves (ShuffleNetV2)."""

    def __init__(self, units=3):
        super().__init__()
        self.first = nn.ModuleList([self.branch(6, 8, 2), self.branch(6, 8, 2)])
        self.stem, self.others = nn.Conv2d(3, 6, 1), nn.ModuleList([self.branch(8, 8, 1) for _ in range(units)])
        self.last, self.head = nn.Conv2d(16, 10, 1), nn.Linear(10, 3)

    @staticmethod
    def branch(channels, out, stride):
        depthwise = nn.Conv2d(channels, channels, 3, stride, 1, groups=channels, bias=False)
        return nn.Sequential(
            *(nn.Conv2d(channels, channels, 1), nn.ReLU(), depthwise, nn.BatchNorm2d(channels)),
            *(nn.Conv2d(channels, out, 1), nn.ReLU()),
        )

    @staticmethod
    def shuffled(x):
        n, c, h, w = x.size()
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)

    def forward(self, x):
        x = self.stem(x)
        x = self.shuffled(torch.cat([branch(x) for branch in self.first], 1))
        for branch in self.others:
            kept, changed = x.chunk(2, dim=1)
            x = self.shuffled(torch.cat([kept, branch(changed)], 1))
        return self.head(torch.relu(self.last(x)).mean((2, 3)))


class Dropping(nn.Module):
    """Dropout as a function, and an auxiliary head whose loss train mode returns."""

    def __init__(self):
        super().__init__()
        self.stem, self.middle, self.deep = nn.Conv2d(3, 64, 3), nn.Conv2d(64, 24, 1), nn.Conv2d(24, 16, 1)
        self.head, self.auxiliary = nn.Linear(16, 4), nn.Linear(64, 4)

    def forward(self, x):
        x = torch.relu(self.stem(x))
        deep = nn.functional.dropout(torch.relu(self.middle(x)), 0.1, self.training)
        logits = self.head(torch.relu(self.deep(deep)).mean((2, 3)))
        return (logits, (self.auxiliary(x.mean((2, 3))) - logits).square().mean()) if self.training else logits


class Scaled(nn.Module):
    """A depthwise convolution, LayerNorm over the last dimension and a scale of its own (ConvNeXt)."""

    def __init__(self):
        super().__init__()
        self.stem, self.depthwise = nn.Conv2d(3, 8, 2, 2), nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)
        self.scale, self.head = nn.Parameter(torch.ones(8)), nn.Linear(8, 3)

    def forward(self, x):
        x = self.stem(x)
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return self.head((x + (self.scale * self.down(gelu(self.up(y)))).permute(0, 3, 1, 2)).mean((2, 3)))


class Parametrized(nn.Module):
    """A weight that is computed."""

    def __init__(self):
        super().__init__()
        self.conv, self.free, self.head = weight_norm(nn.Conv2d(3, 8, 3)), nn.Conv2d(8, 6, 1), nn.Linear(6, 3)

    def forward(self, x):
        return self.head(torch.relu(self.free(torch.relu(self.conv(x)))).mean((2, 3)))


class Auxiliary(nn.Module):
    """A second head that runs in train mode alone, as GoogLeNet's."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.deep, self.head, self.auxiliary = nn.Conv2d(8, 12, 3), nn.Linear(12, 4), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        logits = self.head(torch.relu(self.deep(x)).mean((2, 3)))
        return (logits, self.auxiliary(x.mean((2, 3)))) if self.training else logits
