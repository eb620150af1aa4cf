"""Three modules that know nothing of Hugging Face: SOURCEs such as ``examples.plain_models:transformer``.

colrow plan examples.plain_models:two_towers --tp 2
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 48
HEADS, HEAD_DIM = 12, 4
VOCAB = 96


class MLP(nn.Module):
    """A classifier on vectors, with biases and a gate."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(24, 96)
        self.gate = nn.Linear(24, 96)
        self.down = nn.Linear(96, 24)
        self.classify = nn.Linear(24, 12)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.gate(x)) * self.up(x))
        out: Tensor = self.classify(torch.relu(x))
        return out


class Attention(nn.Module):
    """Head counts are literals in the views, and the projections plain parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Parameter(torch.randn(3 * WIDTH, WIDTH) * WIDTH**-0.5)
        self.qkv_bias = nn.Parameter(torch.zeros(3 * WIDTH))
        self.out = nn.Parameter(torch.randn(WIDTH, WIDTH) * WIDTH**-0.5)
        self.out_bias = nn.Parameter(torch.zeros(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        qkv = F.linear(x, self.qkv, self.qkv_bias).view(batch, length, 3, 12, 4)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [batch, 12, length, 4] each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return F.linear(mixed.transpose(1, 2).reshape(batch, length, 48), self.out, self.out_bias)


class Block(nn.Module):
    """Attention and a feed-forward part, normed before."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention()
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.feed(self.norm2(x))
        return out


class Transformer(nn.Module):
    """A causal language model."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCAB, WIDTH)
        self.positions = nn.Parameter(torch.randn(64, WIDTH) * 0.02)
        self.blocks = nn.ModuleList([Block(), Block()])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x)
        out: Tensor = self.head(self.norm(x))
        return out


class Tower(nn.Module):
    """Mean of embedded tokens through two layers; the embedding is given."""

    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding
        self.up = nn.Linear(WIDTH, 96)
        self.down = nn.Linear(96, WIDTH)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids).mean(1)
        return F.normalize(self.down(torch.relu(self.up(x))), dim=-1)


class TwoTowers(nn.Module):
    """Similarities of queries and documents, whose words are embedded alike."""

    def __init__(self) -> None:
        super().__init__()
        shared = nn.Embedding(VOCAB, WIDTH)
        self.query, self.document = Tower(shared), Tower(shared)
        self.temperature = nn.Parameter(torch.tensor(2.0))

    def forward(self, query: Tensor, document: Tensor) -> dict[str, Tensor]:
        scores = self.query(query) @ self.document(document).T
        return {"scores": scores * self.temperature.exp()}


def _ids(*shape: int) -> Tensor:
    return torch.randint(VOCAB, shape, generator=torch.Generator().manual_seed(0))


def mlp() -> tuple[nn.Module, tuple[Any, ...]]:
    """The MLP and a batch of vectors."""
    return MLP(), (torch.randn(6, 24, generator=torch.Generator().manual_seed(0)),)


def transformer() -> tuple[nn.Module, tuple[Any, ...]]:
    """The transformer and two sequences of tokens."""
    return Transformer(), (_ids(2, 10),)


def two_towers() -> tuple[nn.Module, dict[str, Any]]:
    """The two towers, four queries and five documents."""
    return TwoTowers(), {"query": _ids(4, 6), "document": _ids(5, 12)}
