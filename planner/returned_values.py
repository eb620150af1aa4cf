"""What a model returns: whole, or split and gathered on the way out, or left split where that was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .factor_graph import INFEASIBLE
from .graph import Node
from .moves import Move
from .placement import PARTIAL_GRAD, WHOLE, Shard
from .pricing import Pricing
from .storing import Stored

RETURNED = Move("identity", "lift")
"""What happens to a returned value whose gradient is partial: what the caller adds to it counts on one rank."""


def returned_part(stored: Shard, whole: bool) -> Move:
    """What happens to a returned value that is split: it is gathered, or given out as it is."""
    if whole:
        return Move("all_gather", "slice", stored.dim, stored.layout)
    return Move("identity", "identity", stored.dim, stored.layout)


def output_price(pricing: Pricing, node: Node, stored: Stored, whole: bool, is_read: bool) -> int:
    """Weighed picoseconds of returning a value stored so; `INFEASIBLE` where it cannot be.

    Args:
        pricing: Of the workload.
        node: What makes the value.
        stored: Its placement.
        whole: The caller wants it whole.
        is_read: The model itself reads it too (a loss reads logits): only then is it gathered on the way out.
    """
    if stored == WHOLE:
        return 0
    if stored == PARTIAL_GRAD:
        return pricing.weighed(pricing.move(RETURNED, node.nbytes))
    if isinstance(stored, Shard) and not stored.layout.elastic and (is_read or not whole):
        return pricing.weighed(pricing.move(returned_part(stored, whole), node.nbytes))
    return INFEASIBLE


def parts_of(value: Any) -> dict[str, Any] | None:
    """What a returned container holds, by key, index or field; None for anything else.

    Objects count if they are dataclasses or have tensors among their attributes; a KV cache, which keeps its tensors
    in layers, is the ranks' own and no result.
    """
    if isinstance(value, Tensor) or value is None:
        return None
    if isinstance(value, Mapping):
        return {str(key): part for key, part in value.items()}
    if isinstance(value, (tuple, list)):
        return {str(index): part for index, part in enumerate(value)}
    if isinstance(value, type):
        return None
    if dataclasses.is_dataclass(value):
        return {field.name: getattr(value, field.name, None) for field in dataclasses.fields(value)}
    held = getattr(value, "__dict__", {})
    return dict(held) if any(isinstance(part, Tensor) for part in held.values()) else None
