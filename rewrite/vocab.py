"""Operators over a split vocabulary, and the mean over a split dim: exact, padding and second copies excluded."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from colrow.planner.layout import Layout
from colrow.planner.moves import Move

from .collectives import all_reduce, apply_move
from .groups import TpGroup
from .slices import gaps, pieces, without_gaps

_SUM = Move("all_reduce", "identity")


def local_index(ids: Tensor, layout: Layout, rank: int) -> tuple[Tensor, Tensor]:
    """Where ``rank`` keeps the vocabulary entries ``ids``, and which of them it answers for (one rank does).

    Returns:
        Local positions (0 where elsewhere) and a mask, both shaped like ``ids``.
    """
    mine = pieces(layout, rank, copies=False)
    if len(mine) == 1:
        ((start, local, length),) = mine
        inside = (ids >= start) & (ids < start + length)
        return torch.where(inside, ids - (start - local), 0), inside
    index, inside = torch.zeros_like(ids), torch.zeros_like(ids, dtype=torch.bool)
    for start, local, length in mine:
        here = (ids >= start) & (ids < start + length)
        index, inside = torch.where(here, ids - (start - local), index), inside | here
    return index, inside


def vocab_parallel_embedding(
    ids: Tensor, weight: Tensor, layout: Layout, group: TpGroup, padding_idx: int | None = None
) -> Tensor:
    """Look up ``ids`` in the rows this rank owns; the others' rows read zero, so the result is ``Partial``.

    Args:
        ids: Integers, [..]. Out of range ids read zeros (the dense operator raises on CPU, asserts on CUDA).
        weight: This rank's rows, [layout.local, width].
        layout: Of the vocabulary.
        group: The tensor-parallel group.
        padding_idx: Global id whose row gets no gradient, as in ``F.embedding``.

    Returns:
        [.., width], a partial sum.
    """
    index, inside = local_index(ids, layout, group.rank)
    rows = F.embedding(index, weight)
    if padding_idx is not None:
        rows = torch.where((ids == padding_idx % layout.size).unsqueeze(-1), rows.detach(), rows)
    return torch.where(inside.unsqueeze(-1), rows, 0)


def vocab_parallel_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    layout: Layout,
    group: TpGroup,
    ignore_index: int = -100,
    reduction: Literal["mean", "sum", "none"] = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """``F.cross_entropy`` of logits whose last dim is split: all_reduces of one and of two numbers per row.

    With m = max_v x_v, s = sum_v exp(x_v - m), t = x_label and V = layout.size, the loss of a row is
    m + log s - (1 - eps) t - eps / V sum_v x_v (Shoeybi et al. 2019, Megatron-LM, section 3, plus smoothing).

    Args:
        logits: This rank's columns, [.., layout.local]; half precision is computed in float32.
        labels: Global class indices, [..].
        layout: Of the vocabulary.
        group: The tensor-parallel group.
        ignore_index: Label of rows without loss.
        reduction: As in ``F.cross_entropy``; the mean is over the rows not ignored (nan if there is none).
        label_smoothing: eps.

    Returns:
        The loss, whole on every rank, in the dtype of ``logits``: a scalar, or [..] for "none".
    """
    x = logits.float() if logits.dtype in (torch.bfloat16, torch.float16) else logits
    absent = bool(gaps(layout, group.rank, copies=False))
    last = x.dim() - 1
    if absent:
        total = without_gaps(x, last, layout, group.rank, copies=False).sum(-1) if label_smoothing else None
        outside = without_gaps(x.new_ones(x.shape[-1]), 0, layout, group.rank, copies=False) == 0
        x = x.masked_fill(outside, -math.inf)
    else:
        total = x.sum(-1) if label_smoothing else None
    with torch.no_grad():
        largest = all_reduce(x.amax(-1), group, "max")
    sum_exp = (x - largest.unsqueeze(-1)).exp().sum(-1)
    index, inside = local_index(labels, layout, group.rank)
    target = torch.where(inside, x.gather(-1, index.unsqueeze(-1)).squeeze(-1), 0)
    parts = [sum_exp, target] if total is None else [sum_exp, target, total]
    summed = apply_move(torch.stack(parts), _SUM, group)
    loss = largest + summed[0].log() - (1 - label_smoothing) * summed[1]
    if total is not None:
        loss = loss - label_smoothing / layout.size * summed[2]
    counted = labels != ignore_index
    loss = torch.where(counted, loss, 0)
    if reduction == "none":
        return loss.to(logits.dtype)
    value = loss.sum() if reduction == "sum" else loss.sum() / counted.sum()
    return value.to(logits.dtype)


def mean_of_shard(
    x: Tensor, dims: Sequence[int], dim: int, layout: Layout, group: TpGroup, keepdim: bool = False
) -> Tensor:
    """The mean over ``dims``, one of which (``dim``) is split: this rank's sum over the global count, a ``Partial``.

    Args:
        x: This rank's part, [.., layout.local, ..].
        dims: The dims reduced.
        dim: The split one, counted from 0; it must be among ``dims``.
        layout: Of ``dim``.
        group: The tensor-parallel group.
        keepdim: Keep the reduced dims with length 1.
    """
    axes = [d % x.dim() for d in dims]
    assert dim in axes, f"dim {dim} is split but not reduced"
    count = math.prod(layout.size if d == dim else x.shape[d] for d in axes)
    return without_gaps(x, dim, layout, group.rank, copies=False).sum(axes, keepdim=keepdim) / count
