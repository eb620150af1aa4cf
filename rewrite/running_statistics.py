"""Norms over the batch with split channels: each rank normalises its own, and the running statistics stay whole.

The buffers are equal on every rank, as those of the dense model are: state dicts, copies and moving averages of a model
need to know nothing. A rank reads its channels of them; where they learn, all ranks' channels are put together again by
one all_reduce of two numbers per channel.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from colrow.cost_models.errors import ValidationError
from colrow.planner.edits import OperatorEdit
from colrow.planner.layout import Layout

from . import markers
from .collectives import all_reduce
from .groups import TpGroup
from .slices import local_part, pieces

_NORMS: dict[Callable[..., Any], str] = {F.batch_norm: "training", F.instance_norm: "use_input_stats"}
"""What may be replaced, and the argument that says whether the statistics learn."""


def norm_of_shard_or_marker(
    operator: OperatorEdit, group: TpGroup, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """``norm_of_shard``, or in a trace its marker.

    Raises:
        ValidationError: ``func`` is neither ``F.batch_norm`` nor ``F.instance_norm``.
    """
    if func not in _NORMS:
        raise ValidationError(
            getattr(func, "__name__", "a norm"),
            "its running statistics cannot be read by channel",
            need="F.batch_norm or F.instance_norm",
            remedy="Pin its convolution replicated, or call the function of torch.nn.functional.",
        )
    assert operator.layout is not None
    if markers.are_on():
        tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
        return markers.marked_operator(tensors, operator, tensors[0].shape, tensors[0].dtype)
    return norm_of_shard(func, operator.layout, group, *args, **kwargs)


def norm_of_shard(norm: Callable[..., Any], layout: Layout, group: TpGroup, *args: Any, **kwargs: Any) -> Tensor:
    """``F.batch_norm`` or ``F.instance_norm`` of this rank's channels.

    Args:
        norm: One of the two.
        layout: Of the channels.
        group: The tensor-parallel group.
        args: Of ``norm``: the input [batch, layout.local, ..], weight and bias [layout.local], running statistics
            [layout.size].
        kwargs: Likewise.

    Returns:
        [batch, layout.local, ..]. The running statistics have learnt from all ranks' channels, alike on every rank.
    """
    given = inspect.signature(norm).bind(*args, **kwargs)
    given.apply_defaults()
    whole: list[Tensor] = [given.arguments["running_mean"], given.arguments["running_var"]]
    own = [local_part(value, 0, layout, group.rank).clone() for value in whole]
    given.arguments["running_mean"], given.arguments["running_var"] = own
    made: Tensor = norm(*given.args, **given.kwargs)
    if given.arguments[_NORMS[norm]]:
        with torch.no_grad():
            for value, learnt in zip(whole, _together(own, layout, group), strict=True):
                value.copy_(learnt)
    return made


def _together(own: list[Tensor], layout: Layout, group: TpGroup) -> Tensor:
    """Both statistics of all channels, each from the first rank that holds it: [layout.local] -> [2, layout.size]."""
    full = torch.zeros((len(own), layout.size), dtype=own[0].dtype, device=own[0].device)
    for start, local, length in pieces(layout, group.rank, copies=False):
        for row, value in zip(full, own, strict=True):
            row[start : start + length] = value[local : local + length]
    return all_reduce(full, group)
