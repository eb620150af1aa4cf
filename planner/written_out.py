"""Functions of torch that are one call to the recorder and several products inside, written out so that each is a call.

`F.multi_head_attention_forward` views its projections with literal head counts and widths in places where no plan could
make them local for every batch. While a trace runs, the function written here runs instead: the same mathematics, the
heads as a dim of their own. Where a plan edits calls in it, its edited clone stands for torch's function in the
rewritten model as well; where it edits none, torch's own runs there.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def multi_head_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor | None,
    in_proj_bias: Tensor | None,
    bias_k: Tensor | None,
    bias_v: Tensor | None,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Tensor | None = None,
    k_proj_weight: Tensor | None = None,
    v_proj_weight: Tensor | None = None,
    static_k: Tensor | None = None,
    static_v: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`F.multi_head_attention_forward` without `static_k`, `bias_k` and `add_zero_attn`: [queries, batch, width], the
    batch left out where it is one.

    Raises:
        ValueError: Widths that do not fit, or a causal hint without a mask.
    """
    del bias_k, bias_v, add_zero_attn, static_k, static_v
    is_batched = query.dim() == 3
    is_self, is_pair = query is key and key is value, key is value
    if not is_batched:
        query = query.unsqueeze(1)
        key = query if is_self else key.unsqueeze(1)
        value = key if is_pair else value.unsqueeze(1)
        key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
    queries, batch, width = query.shape
    keys = key.shape[0]
    if width != embed_dim_to_check or embed_dim_to_check % num_heads:
        raise ValueError(f"an attention of width {embed_dim_to_check} with {num_heads} heads got queries of {width}")
    if is_causal and attn_mask is None:
        raise ValueError("the is_causal hint needs an attn_mask")
    head_dim = embed_dim_to_check // num_heads
    mask = _floating(key_padding_mask, query)
    if is_causal and mask is None and not need_weights:
        attn_mask = None
    else:
        attn_mask = _floating(attn_mask, query)
        is_causal = is_causal and mask is None

    if use_separate_proj_weight:
        assert q_proj_weight is not None and k_proj_weight is not None and v_proj_weight is not None
        b_q, b_k, b_v = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q = F.linear(query, q_proj_weight, b_q)
        k = F.linear(key, k_proj_weight, b_k)
        v = F.linear(value, v_proj_weight, b_v)
    elif is_self:
        assert in_proj_weight is not None
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, dim=-1)
    else:
        assert in_proj_weight is not None
        w_q, w_k, w_v = in_proj_weight.chunk(3)
        b_q, b_k, b_v = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q = F.linear(query, w_q, b_q)
        k = F.linear(key, w_k, b_k)
        v = F.linear(value, w_v, b_v)

    q = q.view(queries, batch, num_heads, head_dim).permute(1, 2, 0, 3)
    k = k.view(keys, batch, num_heads, head_dim).permute(1, 2, 0, 3)
    v = v.view(keys, batch, num_heads, head_dim).permute(1, 2, 0, 3)
    if attn_mask is not None:
        if attn_mask.dim() == 3 and attn_mask.shape[0] != 1:
            attn_mask = attn_mask.view(batch, num_heads, queries, keys)
        else:
            attn_mask = attn_mask.view(1, 1, queries, keys)
    if mask is not None:
        mask = mask.view(batch, 1, 1, keys)
        mask = mask if attn_mask is None else attn_mask + mask
    else:
        mask = attn_mask
    drop = dropout_p if training else 0.0

    weights = None
    if need_weights:
        scores = torch.matmul(q * math.sqrt(1.0 / head_dim), k.transpose(-2, -1))
        scores = scores if mask is None else scores + mask
        weights = F.softmax(scores, dim=-1)
        weights = F.dropout(weights, p=drop) if drop > 0.0 else weights
        out = torch.matmul(weights, v)
        weights = weights.mean(dim=1) if average_attn_weights else weights
    else:
        out = F.scaled_dot_product_attention(q, k, v, mask, drop, is_causal)
    out = F.linear(out.permute(2, 0, 1, 3).flatten(2), out_proj_weight, out_proj_bias)
    if not is_batched:
        return out.squeeze(1), None if weights is None else weights.squeeze(0)
    return out, weights


def _floating(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask to add: minus infinity where a boolean one is set."""
    if mask is None or mask.is_floating_point():
        return mask
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, -math.inf)


WRITTEN_OUT: Mapping[Callable[..., Any], Callable[..., Any]] = {F.multi_head_attention_forward: multi_head_attention}
"""torch's function -> what stands for it."""

CODES: frozenset[CodeType] = frozenset({multi_head_attention.__code__})
_USES = ("bias_k", "bias_v", "static_k", "static_v")


def written_out(function: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Callable[..., Any] | None:
    """What to run instead of a call; None where the call itself is to run."""
    if function is not F.multi_head_attention_forward:
        return None
    names = multi_head_attention.__code__.co_varnames[: multi_head_attention.__code__.co_argcount]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    is_plain = not given["add_zero_attn"] and all(given.get(name) is None for name in _USES)
    return multi_head_attention if is_plain else None
