"""A small model written for plain local tensors, and its dense twin: what the runtime tests share."""

import torch
from torch import nn
from torch.nn import functional as F

from colrow.planner.layout import balanced, joined, owned_units
from colrow.planner.moves import Move
from colrow.rewrite.collectives import apply_move
from colrow.rewrite.groups import TpGroup
from colrow.rewrite.storage import ParameterSpec
from colrow.rewrite.vocab import vocab_parallel_embedding

WIDTH, HEADS, KV_HEADS, HEAD_DIM, HIDDEN, VOCAB = 8, 6, 2, 2, 13, 11
COPY, REDUCE = Move("identity", "all_reduce"), Move("all_reduce", "identity")


def query_heads(size):
    """6 heads on 3 or fewer ranks as they divide; on 4: 3 heads of a kv group on 2 ranks, padded to 2 each."""
    if size <= 3:
        return balanced(HEADS * HEAD_DIM, size, HEAD_DIM)
    return owned_units(HEADS * HEAD_DIM, HEAD_DIM, ((0, 1), (2,), (3, 4), (5,)))


def kv_heads(size):
    """The one kv head the queries of a rank read; at 3 ranks the middle one reads both."""
    held = {1: ((0, 1),), 2: ((0,), (1,)), 3: ((0,), (0, 1), (1,)), 4: ((0,), (0,), (1,), (1,))}[size]
    return owned_units(KV_HEADS * HEAD_DIM, HEAD_DIM, held)


class Block(nn.Module):
    """Attention-like mixing of heads without positions, then a gated MLP of odd width; biases everywhere."""

    def __init__(self, dtype):
        super().__init__()
        make = {"dtype": dtype}
        self.norm = nn.LayerNorm(WIDTH, **make)
        self.q = nn.Linear(WIDTH, HEADS * HEAD_DIM, **make)
        self.k = nn.Linear(WIDTH, KV_HEADS * HEAD_DIM, **make)
        self.head_norm = nn.LayerNorm(HEAD_DIM, **make)
        self.o = nn.Linear(HEADS * HEAD_DIM, WIDTH, **make)
        self.up = nn.Linear(WIDTH, 2 * HIDDEN, **make)
        self.down = nn.Linear(HIDDEN, WIDTH, **make)
        self.group: TpGroup | None = None

    def heads(self):
        """For every local query head the local kv head it reads; padding reads the first."""
        if self.group is None:
            return [0, 0, 0, 1, 1, 1]
        size, rank = self.group.size, self.group.rank
        local, kv = {}, {g // HEAD_DIM: (at // HEAD_DIM, n // HEAD_DIM) for g, at, n in kv_heads(size).pieces(rank)}
        where = {g + i: at + i for g, (at, n) in kv.items() for i in range(n)}
        for g, at, n in query_heads(size).pieces(rank):
            local.update({(at // HEAD_DIM) + i: where[(g // HEAD_DIM + i) // 3] for i in range(n // HEAD_DIM)})
        return [local.get(i, 0) for i in range(query_heads(size).local // HEAD_DIM)]

    def moved(self, x, move):
        return x if self.group is None else apply_move(x, move, self.group)

    def forward(self, x, fail=False):
        y = self.moved(self.norm(x), COPY)
        q = self.head_norm(self.q(y).unflatten(-1, (-1, HEAD_DIM)))
        k = self.k(y).unflatten(-1, (-1, HEAD_DIM))[..., self.heads(), :]
        mixed = (q * k).sigmoid().flatten(-2)  # sigmoid(0) is not 0: padding must not count by luck
        if fail:
            raise ValueError("as asked")
        x = x + self.moved(F.linear(mixed, self.o.weight, self.o.bias), REDUCE)
        gate, up = self.up(self.moved(x, COPY)).chunk(2, -1)
        return x + self.moved(self.down(F.silu(gate) * up), REDUCE)


class Model(nn.Module):
    """Vocabulary-split tied embedding and head, two blocks and a norm."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, WIDTH, dtype=dtype)
        self.blocks = nn.ModuleList([Block(dtype) for _ in range(2)])
        self.norm = nn.LayerNorm(WIDTH, dtype=dtype)
        self.head = nn.Linear(WIDTH, VOCAB, bias=False, dtype=dtype)
        self.head.weight = self.embed.weight
        self.group: TpGroup | None = None

    def split(self, group):
        self.group = group
        for block in self.blocks:
            block.group = group
        return self

    def forward(self, ids, fail=False):
        if self.group is None:
            x = self.embed(ids)
        else:
            layout = balanced(VOCAB, self.group.size)
            x = apply_move(vocab_parallel_embedding(ids, self.embed.weight, layout, self.group), REDUCE, self.group)
        for block in self.blocks:
            x = block(x, fail=fail)
        x = self.norm(x)
        if self.group is None:
            return self.head(x)
        gather = Move("all_gather", "slice", 2, layout)
        return apply_move(self.head(apply_move(x, COPY, self.group)), gather, self.group)


def dense_model(dtype=torch.float64):
    """Random weights throughout: no norm is 1, no bias 0."""
    torch.manual_seed(0)
    model = Model(dtype)
    for value in model.parameters():
        nn.init.normal_(value, std=0.5)
    return model


def inputs():
    return torch.randint(VOCAB, (3, 5), generator=torch.Generator().manual_seed(1))


def cotangent(dtype=torch.float64):
    return torch.randn(3, 5, VOCAB, dtype=dtype, generator=torch.Generator().manual_seed(2))


def specs(size):
    """The layouts of ``Model``: padded, segmented and replicated ones."""
    heads, kv, hidden = query_heads(size), kv_heads(size), balanced(HIDDEN, size)
    found = [ParameterSpec("embed.weight", 0, balanced(VOCAB, size))]
    for i in range(2):
        at = f"blocks.{i}."
        found += [ParameterSpec(f"{at}q.{name}", 0, heads) for name in ("weight", "bias")]
        found += [ParameterSpec(f"{at}k.{name}", 0, kv) for name in ("weight", "bias")]
        found += [ParameterSpec(f"{at}head_norm.{name}", partial_grad=True) for name in ("weight", "bias")]
        found += [ParameterSpec(f"{at}o.weight", 1, heads), ParameterSpec(f"{at}o.bias", lifted=True)]
        found += [ParameterSpec(f"{at}up.{name}", 0, joined((hidden, hidden))) for name in ("weight", "bias")]
        found += [ParameterSpec(f"{at}down.weight", 1, hidden), ParameterSpec(f"{at}down.bias", lifted=True)]
    return found
