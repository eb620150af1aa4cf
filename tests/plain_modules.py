"""Plain modules as people write them, no two alike: PyTorch's own layers, convolutions, recurrences, functional code.

`MODULES` maps a name to a module's class and its example inputs; all sizes are small, and every module takes float64.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

BATCH, SEQ, WIDTH, HEADS, VOCAB = 2, 6, 24, 4, 30
Inputs = tuple[Tensor, ...]
MODULES: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {}
TOKENS = (torch.zeros(BATCH, SEQ, WIDTH, dtype=torch.float64),)
TWO = TOKENS * 2
IMAGES = (torch.zeros(BATCH, 3, 12, 12, dtype=torch.float64),)
IDS = (torch.arange(BATCH * SEQ).view(BATCH, SEQ),)


def module(inputs: Inputs) -> Callable[[type[nn.Module]], type[nn.Module]]:
    """Adds a class, under its name, with the inputs of one forward."""

    def add(made: type[nn.Module]) -> type[nn.Module]:
        MODULES[made.__name__] = made, inputs
        return made

    return add


def blocks(make: Callable[[], nn.Module]) -> nn.Sequential:
    """Two in a row."""
    return nn.Sequential(make(), make())


# PyTorch's own layers
MODULES["Transformer"] = (
    lambda: nn.Transformer(WIDTH, HEADS, 2, 2, 48, dropout=0.0, batch_first=True),
    TWO,
)
MODULES["TransformerEncoder"] = (
    lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, HEADS, 48, activation="gelu", norm_first=True), 2),
    TOKENS,
)
MODULES["TransformerDecoderLayer"] = (lambda: nn.TransformerDecoderLayer(WIDTH, HEADS, 48, batch_first=True), TWO)
MODULES["Bilinear"] = (lambda: nn.Bilinear(WIDTH, WIDTH, 16), TWO)


@module(TOKENS)
class SelfAttention(nn.Module):
    """nn.MultiheadAttention with its weights asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, weights = self.attention(x, x, x, need_weights=True)
        return self.norm(x + y), weights


@module(TWO)
class CrossAttention(nn.Module):
    """nn.MultiheadAttention with separate projections, causal, no weights, sequence first."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(WIDTH, 16)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, kdim=16, vdim=16, bias=False)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        x, y = x.transpose(0, 1), self.narrow(y).transpose(0, 1)
        mask = torch.ones(len(x), len(y), dtype=torch.bool).triu(1)
        return self.attention(x, y, y, attn_mask=mask, need_weights=False)[0]


@module(IDS)
class LanguageLstm(nn.Module):
    """An embedding, two layers of nn.LSTM and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH)
        self.lstm = nn.LSTM(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.head = nn.Linear(WIDTH, VOCAB)

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.lstm(self.embed(ids))[0])


@module(TOKENS)
class BothWaysGru(nn.Module):
    """A bidirectional nn.GRU between feed-forward layers."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH))
        self.gru = nn.GRU(WIDTH, 12, bidirectional=True)
        self.after = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.gru(self.before(x))[0].mean(0))


@module(TOKENS)
class Cells(nn.Module):
    """nn.LSTMCell in a Python loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(WIDTH, 16)
        self.out = nn.Linear(16, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        h = c = x.new_zeros(x.shape[0], 16)
        made = []
        for step in x.unbind(1):
            h, c = self.cell(step, (h, c))
            made.append(self.out(h))
        return torch.stack(made, 1)


@module(IDS)
class BagOfWords(nn.Module):
    """nn.EmbeddingBag and a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.bag = nn.EmbeddingBag(VOCAB, WIDTH, mode="mean")
        self.classify = nn.Sequential(nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, 4))

    def forward(self, ids: Tensor) -> Tensor:
        return self.classify(self.bag(ids))


@module((IDS[0], torch.zeros(BATCH, WIDTH, dtype=torch.float64)))
class WideAndDeep(nn.Module):
    """A linear model of many ids, one number each, beside a deep one of few."""

    def __init__(self) -> None:
        super().__init__()
        self.wide = nn.EmbeddingBag(31, 1, mode="sum", padding_idx=2)
        self.few = nn.EmbeddingBag(9, WIDTH, mode="max")
        self.deep = nn.Sequential(nn.Linear(2 * WIDTH, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, ids: Tensor, x: Tensor) -> Tensor:
        return torch.sigmoid(self.wide(ids) + self.deep(torch.cat([x, self.few(ids % 9)], -1)))


# Convolutions
class Bottleneck(nn.Module):
    """ResNet's: three convolutions with batch norms, a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(x + self.bn3(self.conv3(y)))


@module(IMAGES)
class ResNet(nn.Module):
    """Two bottlenecks between a strided stem and pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 12, 3, stride=2, padding=1), nn.BatchNorm2d(12), nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        )
        self.layers = blocks(lambda: Bottleneck(12))
        self.pool, self.head = nn.AdaptiveAvgPool2d(1), nn.Linear(12, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.flatten(self.pool(self.layers(self.stem(x))), 1))


MODULES["Vgg"] = (
    lambda: nn.Sequential(
        nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2),
        nn.Conv2d(12, 12, 3, padding=1), nn.ReLU(inplace=True), nn.AvgPool2d(2),
        nn.Flatten(), nn.Linear(12 * 9, 32), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(32, 10),
    ),
    IMAGES,
)  # fmt: skip


@module(IMAGES)
class MobileNet(nn.Module):
    """Depthwise and pointwise convolutions with a squeeze-and-excite gate."""

    def __init__(self) -> None:
        super().__init__()
        self.expand, self.depthwise = nn.Conv2d(3, 24, 1), nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.squeeze, self.excite = nn.Conv2d(24, 6, 1), nn.Conv2d(6, 24, 1)
        self.project = nn.Conv2d(24, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu6(self.depthwise(F.hardswish(self.expand(x))))
        gate = self.excite(F.silu(self.squeeze(F.adaptive_avg_pool2d(y, 1)))).sigmoid()
        return x + self.project(y * gate)


@module(IMAGES)
class UNet(nn.Module):
    """Down, up by a transposed convolution and by interpolation, with joined shortcuts and group norms."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.GroupNorm(4, 12), nn.SiLU())
        self.down = nn.Sequential(nn.Conv2d(12, 24, 3, stride=2, padding=1), nn.GroupNorm(4, 24), nn.SiLU())
        self.lower = nn.Sequential(nn.Conv2d(24, 24, 3, stride=2, padding=1), nn.SiLU())
        self.up = nn.ConvTranspose2d(24, 24, 2, stride=2)
        self.last = nn.Conv2d(24 + 24, 12, 3, padding=1)
        self.out = nn.Conv2d(12 + 12, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        first = self.first(x)
        down = self.down(first)
        y = self.last(torch.cat([self.up(self.lower(down)), down], 1))
        y = F.interpolate(y, scale_factor=2, mode="bilinear", align_corners=False)
        return self.out(torch.cat([F.silu(y), first], dim=1))


@module((torch.zeros(BATCH, 8, 20, dtype=torch.float64),))
class WaveNet(nn.Module):
    """Dilated causal convolutions, gated, with skips that add up."""

    def __init__(self) -> None:
        super().__init__()
        self.dilated = nn.ModuleList(nn.Conv1d(8, 32, 2, dilation=2**i) for i in range(3))
        self.skips = nn.ModuleList(nn.Conv1d(16, 8, 1) for _ in range(3))
        self.out = nn.Conv1d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        total = torch.zeros_like(x)
        for i, (dilated, skip) in enumerate(zip(self.dilated, self.skips, strict=True)):
            a, b = dilated(F.pad(x, (2**i, 0))).chunk(2, dim=1)
            y = skip(a.tanh() * b.sigmoid())
            total, x = total + y, x + y
        return self.out(F.relu(total))


@module(IMAGES)
class Patches(nn.Module):
    """ConvNeXt's block in channels-last form, on patches cut by a strided convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, WIDTH, 4, stride=4)
        self.mix = nn.Conv2d(WIDTH, WIDTH, 3, padding=1, groups=WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 96), nn.Linear(96, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patch(x)
        y = self.down(F.gelu(self.up(self.norm(self.mix(x).permute(0, 2, 3, 1)))))
        return x + (self.scale * y).permute(0, 3, 1, 2)


# Functional code
@module(TOKENS)
class Functional(nn.Module):
    """Bare parameters and functions, no layer at all."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.bias = nn.Parameter(torch.randn(48, WIDTH)), nn.Parameter(torch.zeros(48))
        self.down = nn.Parameter(torch.randn(48, WIDTH))
        self.gain = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.gain
        return x + F.gelu(F.linear(y, self.up, self.bias)) @ self.down


@module(TOKENS)
class Einsums(nn.Module):
    """Attention in torch.einsum, heads as a dim of the weights."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Parameter(torch.randn(HEADS, WIDTH, 6) / 5) for _ in range(3))
        self.o = nn.Parameter(torch.randn(HEADS, 6, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (torch.einsum("btd,hde->bhte", x, w) for w in (self.q, self.k, self.v))
        weights = torch.einsum("bhqe,bhke->bhqk", q, k).div(6**0.5).softmax(-1)
        return torch.einsum("bhte,hed->btd", torch.einsum("bhqk,bhke->bhqe", weights, v), self.o)


@module(TOKENS)
class LinearAttention(nn.Module):
    """Causal linear attention by a cumulative sum over outer products."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        b, t, d = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, HEADS, d // HEADS).unbind(2)
        q, k = F.elu(q) + 1, F.elu(k) + 1
        state = (k.unsqueeze(-1) * v.unsqueeze(-2)).cumsum(1)
        y = (q.unsqueeze(-1) * state).sum(-2) / (q * k.cumsum(1)).sum(-1, keepdim=True)
        return self.out(y.reshape(b, t, d))


@module(TOKENS)
class Recurrence(nn.Module):
    """A gated recurrence by channel, as state-space models have."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.decay, self.out = nn.Linear(WIDTH, 64), nn.Parameter(torch.zeros(32)), nn.Linear(32, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.into(x).split(32, dim=-1)
        state, made = torch.zeros_like(value[:, 0]), []
        for t in range(x.shape[1]):
            state = torch.exp(-F.softplus(self.decay)) * state + value[:, t]
            made.append(state * F.silu(gate[:, t]))
        return self.out(torch.stack(made, dim=1))


@module(TOKENS)
class Mixer(nn.Module):
    """An MLP over the tokens, then one over the channels."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Sequential(nn.Linear(SEQ, 16), nn.GELU(), nn.Linear(16, SEQ))
        self.channels = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.tokens(self.first(x).mT).mT
        return x + self.channels(self.second(x))


@module(TOKENS)
class Fourier(nn.Module):
    """FNet: tokens mixed by a Fourier transform."""

    def __init__(self) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 48), nn.GELU(), nn.Linear(48, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + torch.fft.fft2(x).real
        return x + self.mlp(x)


@module(TOKENS)
class GlobalFilter(nn.Module):
    """GFNet: a complex filter per channel between a transform of the tokens and its inverse."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 48), nn.Linear(48, WIDTH)
        self.filter = nn.Parameter(torch.randn(SEQ // 2 + 1, 48, 2))

    def forward(self, x: Tensor) -> Tensor:
        spectrum = torch.fft.rfft(F.gelu(self.up(x)), dim=1, norm="ortho") * torch.view_as_complex(self.filter)
        return x + self.down(torch.fft.irfft(spectrum, n=x.shape[1], dim=1, norm="ortho"))


@module(TOKENS)
class Experts(nn.Module):
    """A router and experts computed all at once, the chosen two weighed."""

    def __init__(self) -> None:
        super().__init__()
        self.router = nn.Linear(WIDTH, 4)
        self.up = nn.Parameter(torch.randn(4, WIDTH, 32) / 5)
        self.down = nn.Parameter(torch.randn(4, 32, WIDTH) / 5)

    def forward(self, x: Tensor) -> Tensor:
        weights, chosen = self.router(x).softmax(-1).topk(2, dim=-1)
        kept = torch.zeros(*x.shape[:-1], 4, dtype=x.dtype).scatter(-1, chosen, weights)
        each = torch.einsum("bteh,ehd->bted", F.silu(torch.einsum("btd,edh->bteh", x, self.up)), self.down)
        return (each * kept.unsqueeze(-1)).sum(-2)


@module(TOKENS)
class TiedAutoencoder(nn.Module):
    """The decoder's weight is the encoder's, transposed."""

    def __init__(self) -> None:
        super().__init__()
        self.encode, self.bias = nn.Linear(WIDTH, 48), nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(torch.tanh(self.encode(x)), self.encode.weight.t(), self.bias)


@module(TWO)
class Siamese(nn.Module):
    """One tower, called twice, and the cosine between its results."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Sequential(nn.Linear(WIDTH, 48), nn.ReLU(), nn.Linear(48, 16))

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cosine_similarity(self.tower(x), self.tower(y), dim=-1)


@module((IDS[0], torch.zeros(BATCH, 7, dtype=torch.float64)))
class Recommender(nn.Module):
    """DLRM: an embedding table per field, all pairs of products, dense features."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(VOCAB, 16) for _ in range(SEQ))
        self.bottom = nn.Sequential(nn.Linear(7, 32), nn.ReLU(), nn.Linear(32, 16))
        self.top = nn.Sequential(nn.Linear(21 + 16, 32), nn.ReLU(), nn.Linear(32, 1))
        self.register_buffer("pairs", torch.tril_indices(SEQ + 1, SEQ + 1, offset=-1))

    def forward(self, ids: Tensor, dense: Tensor) -> Tensor:
        low = self.bottom(dense)
        each = torch.stack([low, *(table(ids[:, i]) for i, table in enumerate(self.tables))], 1)
        products = torch.bmm(each, each.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        return torch.sigmoid(self.top(torch.cat([low, products], -1)))


@module((torch.zeros(5, WIDTH, dtype=torch.float64), torch.tensor([[0, 1, 2, 3, 4, 0], [1, 2, 3, 4, 0, 2]])))
class GraphConvolution(nn.Module):
    """Messages along edges, added up by their target."""

    def __init__(self) -> None:
        super().__init__()
        self.message = nn.Sequential(nn.Linear(2 * WIDTH, 48), nn.ReLU(), nn.Linear(48, WIDTH))
        self.update = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, edges: Tensor) -> Tensor:
        source, target = edges[0], edges[1]
        messages = self.message(torch.cat([x[source], x[target]], dim=-1))
        return self.update(x + torch.zeros_like(x).index_add(0, target, messages))


@module(TOKENS)
class Parametrised(nn.Module):
    """A weight norm between layers."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.utils.parametrizations.weight_norm(nn.Linear(WIDTH, 48))
        self.down = nn.Linear(48, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.leaky_relu(self.up(x)))


class OnlyIfLarge(nn.Module):
    """Looks at its values to decide what to compute."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) if bool(x.sum() > 0) else self.other(x)
