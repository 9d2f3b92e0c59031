"""One operator a network: what the file must compute as PyTorch does, in each engine, or be refused for by name.

Inputs are drawn once with a fixed seed, the batch is the first dimension. ``differs`` records an engine that can't compute a right
file, with its own words; ``refused`` holds what the error must name.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_RANDOM = torch.Generator().manual_seed(0)
IMAGE = torch.randn(4, 3, 12, 14, generator=_RANDOM)
SEQUENCE = torch.randn(4, 10, 6, generator=_RANDOM)
VECTOR = torch.randn(4, 8, generator=_RANDOM)
POSITIVE = torch.randn(4, 8, generator=_RANDOM).abs() + 0.1
SIGNAL = torch.randn(4, 128, generator=_RANDOM)
VOLUME = torch.randn(4, 2, 6, 7, 8, generator=_RANDOM)
INDEX = torch.randint(0, 5, (4, 8), generator=_RANDOM)
INTEGERS = torch.randint(-9, 9, (4, 8), generator=_RANDOM)
PLACES = torch.tensor([0, 3, 1, 4, 4, 2, 0, 1])  # of 8 rows in 5


@dataclass(frozen=True)
class Case:
    """An operator.

    Args:
        function: of the module's layers and its input.
        input: the example, ``(4, ...)``.
        layers: that it calls, by name.
        differs: engine -> what it says about the file, or "wrong" for a wrong result.
        refused: words of the error that names the operator; empty for one that is written.
    """

    function: Callable[[Mapping[str, nn.Module], Any], Any]
    input: torch.Tensor
    layers: Callable[[], dict[str, nn.Module]] = field(default=dict)
    differs: Mapping[str, str] = field(default_factory=dict)
    refused: str = ""


class One(nn.Module):
    """A network of one operator behind a trainable factor."""

    def __init__(self, case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers, self.function = nn.ModuleDict(case.layers()), case.function
        self.scale = nn.Parameter(torch.full((1,), 1.25))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self.layers, x * self.scale if x.is_floating_point() else x)


def _image(function: Callable[[Any], Any], **told: Any) -> Case:
    return Case(lambda m, x: function(x), IMAGE, **told)


def _sequence(function: Callable[[Any], Any], **told: Any) -> Case:
    return Case(lambda m, x: function(x), SEQUENCE, **told)


def _vector(function: Callable[[Any], Any], **told: Any) -> Case:
    return Case(lambda m, x: function(x), VECTOR, **told)


def _positive(function: Callable[[Any], Any], **told: Any) -> Case:
    return Case(lambda m, x: function(x), POSITIVE, **told)


def _integers(function: Callable[[Any], Any], **told: Any) -> Case:
    return Case(lambda m, x: function(x), INTEGERS, **told)


def _layer(
    make: Callable[[], nn.Module], x: torch.Tensor, pick: Callable[[Any], Any] = lambda y: y, **told: Any
) -> Case:
    return Case(lambda m, x: pick(m["layer"](x)), x, lambda: {"layer": make()}, **told)


def _rows(x: torch.Tensor, value: float = 0.0) -> torch.Tensor:
    return torch.full((x.shape[0], 5), value)


def _places(x: torch.Tensor) -> torch.Tensor:
    return PLACES.expand(x.shape[0], -1)


def _resized(mode: str, size: Any = None, factor: Any = None, **settings: Any) -> Case:
    return _image(lambda x: F.interpolate(x, size, factor, mode=mode, **settings))


def _sampled(mode: str, padding: str, corners: bool, **told: Any) -> Case:
    def function(x: torch.Tensor) -> torch.Tensor:
        grid = torch.stack((x[:, 0], x[:, 1]), -1)
        return F.grid_sample(x, grid, mode=mode, padding_mode=padding, align_corners=corners)

    return _image(function, **told)


def _scattered(reduce: str, itself: bool) -> Case:
    return _vector(lambda x: _rows(x, 0.5).scatter_reduce(1, _places(x), x, reduce, include_self=itself))


def _reduced(reduce: str, itself: bool) -> Case:
    return _vector(lambda x: _rows(x, 0.5).index_reduce(1, PLACES, x, reduce, include_self=itself))


def _pooled(pool: Callable[..., Any], x: torch.Tensor, *sizes: Any, **settings: Any) -> Case:
    return Case(lambda m, x: pool(x, *sizes, **settings), x)


def _spectrum(x: torch.Tensor, n: int, hop: int, window: int, **settings: Any) -> torch.Tensor:
    return torch.stft(x, n, hop, window, torch.hann_window(window), return_complex=True, **settings)


def _mel(x: torch.Tensor) -> torch.Tensor:
    power = _spectrum(x, 32, 8, 32).abs().square()
    filters = torch.linspace(0, 1, 17 * 5).reshape(5, 17).sin().abs()
    return torch.log(filters @ power + 1e-3)


def _masked_mean(x: torch.Tensor) -> torch.Tensor:
    mask = x > 0
    return (x * mask).sum(1) / mask.sum(1).clamp(min=1)


def _put(x: torch.Tensor, accumulate: bool) -> torch.Tensor:
    rows = torch.arange(x.shape[0]).unsqueeze(1)
    columns = torch.tensor([1, 5, 1] if accumulate else [1, 5, 2]).expand(x.shape[0], -1)
    return torch.zeros_like(x).index_put((rows, columns), x[:, :3], accumulate=accumulate)


def _complex(x: torch.Tensor) -> torch.Tensor:
    return torch.view_as_complex(x.reshape(x.shape[0], 10, 3, 2).contiguous())


OPENVINO = "openvino"
CASES: dict[str, Case] = {
    # Interpolation
    "antialiased bilinear": _resized("bilinear", (5, 7), antialias=True),
    "antialiased bicubic": _resized("bicubic", (5, 7), antialias=True),
    "antialiased bilinear, factor": _resized("bilinear", None, 0.45, antialias=True),
    "antialiased bilinear, larger": _resized("bilinear", (17, 9), antialias=True, align_corners=True),
    "bicubic, factor": _resized("bicubic", None, 1.7),
    "bicubic, corners": _resized("bicubic", (17, 19), align_corners=True),
    "bilinear, factor": _resized("bilinear", None, 1.3),
    "bilinear, corners": _resized("bilinear", (17, 9), align_corners=True),
    "bilinear, recomputed factor": _resized("bilinear", None, 1.3, recompute_scale_factor=True),
    "nearest": _resized("nearest", (17, 19)),
    "nearest exact": _resized("nearest-exact", (17, 19)),
    "nearest, factor": _resized("nearest", None, 0.6),
    "area": _resized("area", (5, 7)),
    "trilinear": Case(lambda m, x: F.interpolate(x, (9, 5, 8), mode="trilinear"), VOLUME),
    "linear": _sequence(lambda x: F.interpolate(x, 9, mode="linear")),
    # Pooling
    "adaptive average": _pooled(F.adaptive_avg_pool2d, IMAGE, (5, 4)),
    "adaptive average, 1-d": _pooled(F.adaptive_avg_pool1d, SEQUENCE, 4),
    "adaptive average, 3-d": _pooled(F.adaptive_avg_pool3d, VOLUME, (2, 3, 4)),
    "adaptive maximum": _pooled(F.adaptive_max_pool2d, IMAGE, (5, 4)),
    "adaptive maximum, one": _pooled(F.adaptive_max_pool2d, IMAGE, 1),
    "adaptive maximum, places": _pooled(F.adaptive_max_pool2d, IMAGE, (5, 4), return_indices=True),
    "adaptive maximum, 1-d": _pooled(F.adaptive_max_pool1d, SEQUENCE, 4),
    "adaptive maximum, 3-d": _pooled(F.adaptive_max_pool3d, VOLUME, (2, 3, 3)),
    "average, ceil": _pooled(F.avg_pool2d, IMAGE, 3, 2, 1, ceil_mode=True, count_include_pad=False),
    "average, ceil with padding": _pooled(F.avg_pool2d, IMAGE, 3, 2, 1, ceil_mode=True),
    "average, ceil without padding": _pooled(F.avg_pool2d, IMAGE, (5, 3), (3, 4), ceil_mode=True),
    "average, ceil, 1-d": _pooled(F.avg_pool1d, SEQUENCE, 3, 2, 1, ceil_mode=True),
    "average, ceil, 3-d": _pooled(F.avg_pool3d, VOLUME, 3, 2, 1, ceil_mode=True),
    "average, divisor": _pooled(F.avg_pool2d, IMAGE, 3, 2, 1, divisor_override=5),
    "maximum, ceil and dilation": _pooled(F.max_pool2d, IMAGE, 3, 2, 1, dilation=2, ceil_mode=True),
    "maximum, ceil, 1-d": _pooled(F.max_pool1d, SEQUENCE, 3, 2, 1, ceil_mode=True),
    "maximum, places": _pooled(F.max_pool2d, IMAGE, 2, return_indices=True),
    "power average": _pooled(F.lp_pool2d, IMAGE, 2.0, 3, 2),
    "unpooled": _image(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)),
    # Padding, folding, convolution, normalization
    "pad reflect": _image(lambda x: F.pad(x, (3, 2, 1, 4), "reflect")),
    "pad replicate": _image(lambda x: F.pad(x, (3, 2, 1, 4), "replicate")),
    "pad circular": _image(lambda x: F.pad(x, (3, 2, 1, 4), "circular")),
    "pad circular, 1-d": _sequence(lambda x: F.pad(x, (2, 3), "circular")),
    "pad constant, negative": _image(lambda x: F.pad(x, (-1, 2, 3, -2), value=0.5)),
    "circular convolution": _layer(lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "same convolution": _layer(lambda: nn.Conv2d(3, 4, 4, padding="same", dilation=2), IMAGE),
    "transposed convolution": _layer(lambda: nn.ConvTranspose2d(3, 6, 4, 3, 1, output_padding=2, groups=3), IMAGE),
    "instance norm": _layer(lambda: nn.InstanceNorm2d(3), IMAGE),
    "instance norm, tracked": _layer(lambda: nn.InstanceNorm2d(3, affine=True, track_running_stats=True), IMAGE),
    "group norm": _layer(lambda: nn.GroupNorm(1, 3), IMAGE),
    "rms norm": _layer(lambda: nn.RMSNorm(6), SEQUENCE),
    "local response norm": _image(lambda x: F.local_response_norm(x, 2)),
    "normalize": _sequence(lambda x: F.normalize(x, p=1, dim=2)),
    "spectral norm": _layer(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(8, 4)), VECTOR),
    "weight norm": _layer(lambda: nn.utils.parametrizations.weight_norm(nn.Linear(8, 4)), VECTOR),
    "unfold and fold": _image(lambda x: F.fold(F.unfold(x, 3, padding=1), (12, 14), 3, padding=1)),
    "unfold, dilated": _image(lambda x: F.unfold(x, (2, 3), dilation=2, stride=(2, 1))),
    "windows": _sequence(lambda x: x.unfold(1, 4, 3)),
    "pixel shuffle": Case(lambda m, x: F.pixel_shuffle(x.repeat(1, 4, 1, 1), 2), IMAGE),
    "pixel unshuffle, channel shuffle": _image(lambda x: F.channel_shuffle(F.pixel_unshuffle(x, 2), 3)),
    # Sampling
    "grid, bilinear": _sampled("bilinear", "zeros", False),
    "grid, bilinear, corners": _sampled("bilinear", "zeros", True),
    "grid, nearest": _sampled("nearest", "border", False),
    "grid, bicubic, border": _sampled("bicubic", "border", True),
    "grid, reflection": _sampled("bilinear", "reflection", False),
    "affine grid": _image(
        lambda x: F.grid_sample(
            x,
            F.affine_grid(x.mean((2, 3)).unsqueeze(1).repeat(1, 2, 1), (x.shape[0], 3, 6, 6), align_corners=False),
            align_corners=False,
        )
    ),
    # Spectra
    "rfft": _sequence(lambda x: torch.fft.rfft(x).abs()),
    "rfft, filled and scaled": _sequence(lambda x: torch.view_as_real(torch.fft.rfft(x, n=16, norm="ortho"))),
    "rfft along an axis": _sequence(lambda x: torch.fft.rfft(x, dim=1).real),
    "irfft": _sequence(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2)),
    "irfft, odd length": _sequence(
        lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1, norm="forward"), 9, 1, "forward")
    ),
    "stft": Case(lambda m, x: torch.view_as_real(_spectrum(x, 16, 4, 16, center=False)), SIGNAL),
    "stft, short window": Case(lambda m, x: _spectrum(x, 32, 8, 20, normalized=True).abs(), SIGNAL),
    "stft, two-sided": Case(lambda m, x: _spectrum(x, 16, 8, 16, onesided=False).abs(), SIGNAL),
    "mel spectrogram": Case(lambda m, x: _mel(x), SIGNAL),
    "istft": Case(lambda m, x: torch.istft(_spectrum(x, 32, 8, 32), 32, 8, window=torch.hann_window(32)), SIGNAL),
    "complex product": _sequence(
        lambda x: torch.view_as_real(_complex(x) * torch.polar(torch.ones(10, 3), torch.full((10, 3), 0.7)))
    ),
    # Running and order statistics
    "cumsum": _sequence(lambda x: x.cumsum(1)),
    "cumprod": _sequence(lambda x: x.cumprod(1)),
    "cummax": _sequence(lambda x: x.cummax(1)),
    "cummin": _sequence(lambda x: x.cummin(1)),
    "logcumsumexp": _sequence(lambda x: x.logcumsumexp(1)),
    "median": _sequence(lambda x: x.median(1)[0]),
    "median, even, kept": _sequence(lambda x: x.median(2, keepdim=True)),
    "kthvalue": _sequence(lambda x: x.kthvalue(3, 1)),
    "quantile": _sequence(lambda x: torch.quantile(x, 0.3, dim=1)),
    "mode": _integers(lambda x: x.mode(1)[0], refused="mode"),
    "sort": _sequence(lambda x: x.sort(1, descending=True)),
    "argsort": _sequence(lambda x: x.argsort(1)),
    "topk, smallest": _sequence(lambda x: x.topk(3, 1, largest=False)),
    "argmax": _sequence(lambda x: x.argmax(1, keepdim=True)),
    "unique": _integers(lambda x: torch.unique(x)),
    "searchsorted": _sequence(lambda x: torch.searchsorted(torch.tensor([-1.0, 0.0, 1.0]), x)),
    "searchsorted, right, rows": _vector(lambda x: torch.searchsorted(x.sort(1)[0], x, right=True)),
    "bucketize": _sequence(lambda x: torch.bucketize(x, torch.tensor([-1.0, 0.0, 1.0]))),
    "bucketize, right": Case(lambda m, x: torch.bucketize(x, torch.tensor([0, 2, 4]), right=True), INDEX),
    "histogram": _vector(lambda x: torch.histc(x, 4, -1.0, 1.0)),
    # Reductions
    "std": _sequence(lambda x: x.std(1)),
    "var and mean": _sequence(lambda x: torch.var_mean(x, 1)),
    "norm": _sequence(lambda x: torch.linalg.vector_norm(x, 3, dim=1)),
    "norm, infinite": _sequence(lambda x: torch.linalg.vector_norm(x, float("inf"), dim=(1, 2))),
    "product": _sequence(lambda x: x.prod(1)),
    "amin and amax": _sequence(lambda x: torch.stack(torch.aminmax(x, dim=1))),
    "any and all": _sequence(lambda x: torch.stack(((x > 0).any(1), (x > -9).all(1))).movedim(0, 1)),
    "logsumexp": _sequence(lambda x: F.log_softmax(x * 50, 1) + F.softmin(x, 1) + torch.logsumexp(x, 1, keepdim=True)),
    "count of nonzero": _integers(lambda x: torch.count_nonzero(x, 1)),
    "masked mean": _sequence(_masked_mean),
    # Scatter and gather
    **{
        f"scatter {reduce}{', self' if itself else ''}": _scattered(reduce, itself)
        for reduce in ("sum", "mean", "prod", "amax", "amin")
        for itself in (False, True)
    },
    **{
        f"index reduce {reduce}{', self' if itself else ''}": _reduced(reduce, itself)
        for reduce, itself in (("mean", False), ("mean", True), ("amax", False), ("prod", True))
    },
    "scatter add": _vector(lambda x: _rows(x).scatter_add(1, _places(x), x)),
    "scatter value": _vector(lambda x: x.scatter(1, _places(x)[:, :3], 7.0)),
    "index add": _vector(lambda x: _rows(x).index_add(1, PLACES, x, alpha=0.5)),
    "index copy": _vector(lambda x: x.index_copy(1, torch.tensor([5, 0]), x[:, :2])),
    "index fill": _vector(lambda x: x.index_fill(1, torch.tensor([5, 0]), -1.0)),
    "index put": _vector(lambda x: _put(x, False)),
    "index put, accumulate": _vector(lambda x: _put(x, True)),
    "gather": _vector(lambda x: x.gather(1, _places(x))),
    "take along": _sequence(lambda x: torch.take_along_dim(x, x.argsort(1), 1), refused="any size"),
    "masked fill and scatter": _sequence(lambda x: x.masked_fill(x > 1, 0.0) + torch.where(x > 0, x, -1.0)),
    "masked scatter": _vector(lambda x: x.masked_scatter(x > 0, x * 2)),
    "masked select": _sequence(lambda x: x[x > 0]),
    "one-hot": Case(lambda m, x: F.one_hot(x, 6).float(), INDEX),
    "embedding bag, mean": _layer(lambda: nn.EmbeddingBag(9, 4, mode="mean", padding_idx=0), INDEX),
    "embedding bag, max": _layer(lambda: nn.EmbeddingBag(9, 4, mode="max"), INDEX),
    "embedding bag, max, padding": _layer(lambda: nn.EmbeddingBag(9, 4, mode="max", padding_idx=1), INDEX),
    "embedding bag, sum": _layer(lambda: nn.EmbeddingBag(9, 4, mode="sum"), INDEX),
    # Integers
    "remainder": _integers(lambda x: x % 4),
    "fmod": _integers(lambda x: torch.fmod(x, 4)),
    "floor division": _integers(lambda x: x // 4),
    "truncated division": _integers(lambda x: torch.div(x, 4, rounding_mode="trunc")),
    "true division": _integers(lambda x: x / 4),
    "and": _integers(lambda x: x & 3),
    "or, xor, not": _integers(lambda x: (x | 4) ^ ~x),
    "right shift": _integers(lambda x: x >> 1),
    "left shift": _integers(lambda x: x << 2),
    "shift by tensor": _integers(lambda x: torch.bitwise_right_shift(x * 64, x.abs() % 5)),
    "int32 shift": _integers(lambda x: x.int() >> 2),
    "power": _integers(lambda x: x**2 + x.abs() ** 3),
    "int16 and uint8": _integers(lambda x: x.to(torch.int16) * 3 + x.abs().to(torch.uint8)),
    # Shapes
    "roll and flip": _sequence(lambda x: x.movedim(1, 2).roll((2, -1), (2, 1)).flip(1)),
    "repeat interleave": _sequence(lambda x: x.repeat_interleave(3, 1)),
    "rot90": _image(lambda x: x.rot90(1, (2, 3))),
    "diagonal embedding": _vector(lambda x: torch.diag_embed(x)),
    "diagonal": _sequence(lambda x: torch.diagonal(x, 1, 1, 2)),
    "tril and triu": _sequence(lambda x: x[:, :6].tril(-1) + x[:, :6].triu(1)),
    "outer and meshgrid": _vector(lambda x: torch.einsum("bi,bj->bij", x, x) + torch.outer(x[0], x[0])),
    "chunk and stack": _sequence(lambda x: torch.stack(x.chunk(3, 1)[:2], 1)),
    "tile and expand": _vector(lambda x: x.tile(2, 3)[: x.shape[0]]),
    # Products and distances
    "cdist": _sequence(lambda x: torch.cdist(x, x)),
    "cdist, many rows": Case(lambda m, x: torch.cdist(x.reshape(-1, 32, 4), x.reshape(-1, 32, 4) + 1), SIGNAL),
    "cdist, 1-norm": _sequence(lambda x: torch.cdist(x, x[:, :3], p=1.0)),
    "cdist, maximum": _sequence(lambda x: torch.cdist(x, x[:, :3], p=float("inf"))),
    "pairwise distance": _sequence(lambda x: F.pairwise_distance(x[:, :5], x[:, 5:])),
    "cosine similarity": _sequence(lambda x: F.cosine_similarity(x[:, :5], x[:, 5:], 2)),
    "einsum": _sequence(lambda x: torch.einsum("bij,bkj->bik", x, x)),
    "bilinear layer": Case(lambda m, x: m["b"](x, x), VECTOR, lambda: {"b": nn.Bilinear(8, 8, 3)}),
    "addmm": _vector(lambda x: torch.addmm(torch.ones(8), x, torch.ones(8, 8), beta=0.5, alpha=2.0)),
    "baddbmm": _sequence(lambda x: torch.baddbmm(x, x[:, :, :5].expand(-1, -1, -1), x[:, :5], beta=0.3)),
    "cross": _sequence(lambda x: torch.cross(x[..., :3], x[..., 3:], -1)),
    "kron": _vector(lambda x: torch.kron(x, torch.ones(1, 2)), refused="any size"),
    "determinant": _sequence(lambda x: torch.linalg.det(x[:, :6]), differs={OPENVINO: "Det"}),
    "inverse": _sequence(lambda x: torch.linalg.inv(x[:, :6] + 4 * torch.eye(6)), refused="linalg_inv"),
    # Recurrent and attention
    "lstm, projected": _layer(
        lambda: nn.LSTM(6, 5, 2, proj_size=3, batch_first=True, bidirectional=True), SEQUENCE[:, :3], lambda y: y[0]
    ),
    "lstm": _layer(lambda: nn.LSTM(6, 5, 2, batch_first=True), SEQUENCE, lambda y: (y[0], *y[1])),
    "lstm, sequence first": _layer(lambda: nn.LSTM(6, 5, batch_first=True, bias=False), SEQUENCE, lambda y: y[0]),
    "lstm cell": _layer(lambda: nn.LSTMCell(8, 5), VECTOR, lambda y: y[0]),
    "gru": _layer(lambda: nn.GRU(6, 5, 2, batch_first=True, bidirectional=True), SEQUENCE, lambda y: (y[0], y[1])),
    "gru cell": _layer(lambda: nn.GRUCell(8, 5), VECTOR),
    "rnn, relu": _layer(lambda: nn.RNN(6, 5, nonlinearity="relu", batch_first=True), SEQUENCE, lambda y: y[0]),
    "rnn, tanh, bidirectional": _layer(
        lambda: nn.RNN(6, 5, batch_first=True, bidirectional=True), SEQUENCE, lambda y: y[0]
    ),
    "attention": Case(
        lambda m, x: m["a"](x, x, x, need_weights=True, average_attn_weights=False),
        SEQUENCE,
        lambda: {"a": nn.MultiheadAttention(6, 2, batch_first=True, add_zero_attn=True)},
    ),
    "attention of hidden queries": _sequence(
        lambda x: F.scaled_dot_product_attention(
            x, x, x, torch.where(x[..., :1] > 0.3, -torch.inf, x.transpose(1, 2)[:, :1])
        )
    ),
    "causal attention": _sequence(lambda x: F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=0.3)),
    # Functions
    "activations": _sequence(
        lambda x: (
            F.celu(x, 1.7)
            + F.softplus(x * 9, 2, 5)
            + F.logsigmoid(x)
            + F.hardshrink(x)
            + F.softshrink(x)
            + F.threshold(x, 0.1, -3)
            + F.mish(x)
            + F.gelu(x, approximate="tanh")
            + F.selu(x)
            + F.softsign(x)
            + F.hardswish(x)
            + F.glu(x.repeat(1, 1, 2))
            + F.prelu(x, torch.tensor([0.1]))
        )
    ),
    "rrelu": _layer(lambda: nn.RReLU(), SEQUENCE),
    "special functions": _positive(
        lambda x: (
            torch.erf(x)
            + torch.special.expit(x)
            + torch.sinc(x)
            + torch.atan2(x, 1 + x)
            + torch.expm1(x)
            + torch.log1p(x)
            + torch.logit(x / 9)
            + torch.xlogy(x, x)
        )
    ),
    "angles": _positive(lambda x: torch.asinh(x) + torch.acosh(1 + x) + torch.atanh(x / 9) + torch.hypot(x, x + 1)),
    "lgamma": _positive(lambda x: torch.lgamma(x), refused="lgamma"),
    "rounding": _sequence(lambda x: torch.round(x * 2) / 2 + torch.frac(x) + torch.trunc(x) + torch.sign(x)),
    "rounding to decimals": _sequence(lambda x: torch.round(x, decimals=2)),
    "nan to num": _sequence(lambda x: torch.nan_to_num(x / torch.zeros_like(x))),
    "lerp and clamp": _sequence(lambda x: torch.lerp(x, x.clamp(-0.5, 0.7), 0.3) + torch.clamp_min(x, 0.1)),
    "isfinite": _sequence(lambda x: torch.isfinite(1 / torch.relu(x))),
    "heaviside and sign": _sequence(lambda x: torch.heaviside(x, torch.tensor(0.5)) + torch.copysign(x, -x)),
    "float64": _sequence(lambda x: x.double().cumsum(1).float()),
    # Random numbers
    "gumbel softmax": _sequence(lambda x: F.gumbel_softmax(x, hard=True), refused="random numbers"),
    "noise": _sequence(lambda x: x + torch.randn_like(x), refused="random numbers"),
    "dropout left on": _sequence(lambda x: F.dropout(x, 0.5), refused="random numbers"),
    "bernoulli": _sequence(lambda x: torch.bernoulli(torch.sigmoid(x)), refused="random numbers"),
    "sampled token": _vector(lambda x: torch.multinomial(x.softmax(1), 1), refused="random numbers"),
    "random permutation": _vector(lambda x: x[:, torch.randperm(8)], refused="random numbers"),
    "dropout in evaluation": _layer(lambda: nn.Dropout(0.5), SEQUENCE),
}
