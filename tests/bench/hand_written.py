"""The baseline of step overhead: what somebody would write by hand to split a Hugging Face Llama over a group.

Local shards, raw collectives, no DTensor, no hooks; the same shards as colrow's plan (``run.py`` checks that).
"""

from __future__ import annotations

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers.models.llama.modeling_llama import LlamaRMSNorm

COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


class Copy(torch.autograd.Function):
    """Forward: nothing. Backward: the sum over the ranks."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(gradient)
        return gradient


class Sum(torch.autograd.Function):
    """Forward: the sum over the ranks. Backward: nothing."""

    @staticmethod
    def forward(ctx, x):
        dist.all_reduce(x)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return gradient


class Gather(torch.autograd.Function):
    """Forward: the ranks' slices of the last dim, put together. Backward: this rank's slice, of whole gradients."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, -1)

    @staticmethod
    def backward(ctx, gradient):
        return gradient.chunk(dist.get_world_size(), -1)[dist.get_rank()]


def split_by_hand(model):
    """Splits a Llama in place: this rank's shards, and where to communicate."""
    rank, size = dist.get_rank(), dist.get_world_size()

    def cut(module, dim, **changes):
        module.weight = nn.Parameter(module.weight.detach().chunk(size, dim)[rank].clone())
        vars(module).update(changes)

    for path, module in model.named_modules():
        name = path.rpartition(".")[2]
        if name in COLUMN:
            cut(module, 0)
        elif name in ("o_proj", "down_proj"):
            cut(module, 1, forward=lambda x, m=module: Sum.apply(F.linear(x, m.weight)))
        elif isinstance(module, LlamaRMSNorm):  # what follows it is split
            module.forward = lambda x, m=module: Copy.apply(LlamaRMSNorm.forward(m, x))
    cut(model.lm_head, 0, forward=lambda x: Gather.apply(F.linear(x, model.lm_head.weight)))
    embed = model.model.embed_tokens
    cut(embed, 1, forward=lambda ids: Gather.apply(F.embedding(ids, embed.weight)))
    return model
