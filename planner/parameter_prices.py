"""What a parameter's placements cost: the optimiser's step, the reduction of its gradient, staying replicated."""

from __future__ import annotations

import numpy as np

from .bytes_per_rank import optimizer_ps
from .factor_graph import INFEASIBLE, Table
from .graph import Node
from .parameter_domains import ParameterChoice
from .placement import PARTIAL_GRAD, Replicate, Shard
from .pricing import Cost, Pricing
from .storing import Stored

REPLICATION_PENALTY_PS = 1 << 49


def parameter_prices(
    pricing: Pricing, choice: ParameterChoice, node: Node, trained: bool
) -> tuple[Table | None, Table | None]:
    """Tables of a parameter in picoseconds; None where all is nothing.

    Args:
        pricing: Of the workload.
        choice: The parameter's domain.
        node: Its leaf.
        trained: Whether a gradient comes to it.

    Returns:
        What each placement costs, and (placement, flag of its block) where that forbids a gradient that is summed
        while the flag is down.
    """
    summed = np.array([_is_summed(s) for s in choice.domain])
    whole = np.array([isinstance(s, Replicate) for s in choice.domain])
    updated = np.array([trained and optimizer_ps(pricing, node, s) for s in choice.domain])
    reduced = pricing.weighed(Cost(0, reduction_slope_ps(pricing, node.nbytes))) if summed.any() else 0
    price = REPLICATION_PENALTY_PS * choice.should_split * whole + reduced * summed + updated
    flag = np.where(summed[:, None] & np.array([True, False]), INFEASIBLE, 0)
    return (price.astype(np.int64) if price.any() else None), (flag.astype(np.int64) if summed.any() else None)


def reduction_latency_ps(pricing: Pricing) -> int:
    """What a block pays once if a gradient of its replicated parameters is partial: they share one all_reduce."""
    return pricing.weighed(Cost(0, pricing.collective("all_reduce", 1)))


def reduction_slope_ps(pricing: Pricing, nbytes: int) -> int:
    """What ``nbytes`` add to a block's one parameter reduction: the slope of its line between 1 byte and 1 MiB."""
    return (pricing.collective("all_reduce", 1 << 20) - pricing.collective("all_reduce", 1)) * nbytes >> 20


def _is_summed(stored: Stored) -> bool:
    """Whether a parameter stored so needs its gradient summed over ranks."""
    return stored == PARTIAL_GRAD or (isinstance(stored, Shard) and stored.layout.is_replicated)
