"""``F.embedding_bag`` over split rows: each rank's ids count, the others' count nothing, and the result is a sum."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from colrow.cost_models.errors import ValidationError
from colrow.planner.edits import OperatorEdit
from colrow.planner.layout import Layout

from . import markers
from .groups import TpGroup
from .vocab import local_index

Mode = Literal["sum", "mean"]


def vocab_parallel_embedding_bag(
    weight: Tensor,
    layout: Layout,
    group: TpGroup,
    ids: Tensor,
    offsets: Tensor | None = None,
    mode: Mode = "mean",
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """Bags of the rows this rank owns.

    Args:
        weight: This rank's rows, [layout.local, width].
        layout: Of the vocabulary.
        group: The tensor-parallel group.
        ids: Integers, [bags, length], or [total] with ``offsets``.
        offsets: Where each bag starts, [bags], or [bags + 1] with ``include_last_offset``.
        mode: ``mean`` divides by the number of ids of a bag, all ranks' together, padding left out.
        per_sample_weights: Factor per id, shaped like ``ids``.
        include_last_offset: Whether the last offset is the end of the last bag.
        padding_idx: Global id that counts nothing; None or, as the operator has it, -1: none.

    Returns:
        [bags, width], a partial sum.
    """
    index, inside = local_index(ids, layout, group.rank)
    counted = torch.ones_like(inside)
    if padding_idx is not None and padding_idx != -1:
        counted = ids != padding_idx % layout.size
    each = (inside & counted).to(weight.dtype)
    if per_sample_weights is not None:
        each = each * per_sample_weights
    made = _sums(index, weight, offsets, each, include_last_offset)
    if mode == "sum":
        return made
    one = weight.new_ones(1, 1)
    lengths = _sums(torch.zeros_like(index), one, offsets, counted.to(weight.dtype), include_last_offset)
    return made / lengths.clamp_min(1)


def _sums(ids: Tensor, rows: Tensor, offsets: Tensor | None, each: Tensor, include_last: bool) -> Tensor:
    return F.embedding_bag(ids, rows, offsets, mode="sum", per_sample_weights=each, include_last_offset=include_last)


def embedding_bag_or_marker(
    operator: OperatorEdit,
    group: TpGroup,
    ids: Tensor,
    weight: Tensor,
    offsets: Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: Any = "mean",
    sparse: bool = False,
    per_sample_weights: Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> Tensor:
    """``F.embedding_bag`` on split rows, or what stands for it where a trace looks.

    Raises:
        ValidationError: An option that needs all rows.
    """
    del norm_type
    if max_norm is not None or scale_grad_by_freq or sparse or mode not in ("sum", "mean"):
        wrong = "max_norm, scale_grad_by_freq, sparse and the mode max are not available on split rows"
        raise ValidationError("embedding_bag", wrong)
    assert operator.layout is not None
    if padding_idx == -1:  # the last row: to the operator -1 means none
        padding_idx = operator.layout.size - 1
    if ids.dim() == 2:  # as the function itself does it
        offsets = torch.arange(0, ids.numel(), ids.size(1), dtype=ids.dtype, device=ids.device)
        ids = ids.reshape(-1)
        per_sample_weights = None if per_sample_weights is None else per_sample_weights.reshape(-1)
    assert offsets is not None
    if markers.are_on():
        read = [t for t in (weight, ids, offsets, per_sample_weights) if t is not None]
        shape = (offsets.shape[0] - int(include_last_offset), weight.shape[1])
        return markers.marked_operator(read, operator, shape, weight.dtype)
    return vocab_parallel_embedding_bag(
        weight, operator.layout, group, ids, offsets, mode, per_sample_weights, include_last_offset, padding_idx
    )
