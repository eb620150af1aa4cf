"""Edits: all that a plan changes in a model's source, as plain data.

The list is closed. A parameter is stored sliced and read in some way; a call expression gets its arguments moved,
its literal sizes made
local, its operator replaced by the local one of the same meaning, its result moved; a model input is moved. Nothing
else happens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from .layout import Layout
from .moves import Move
from .sites import Site

OperatorName = Literal[
    "vocab_embedding", "vocab_embedding_bag", "vocab_cross_entropy", "mean_of_shard", "norm_of_shard", "rank_random"
]


@dataclass(frozen=True)
class OperatorEdit:
    """A local operator where the dense one would be wrong on slices.

    Attributes:
        name: ``vocab_embedding`` and ``vocab_embedding_bag`` (rows split), ``vocab_cross_entropy`` (classes split, with
            reductions of its own), ``mean_of_shard`` (a mean over a split dim, as a partial sum), ``norm_of_shard``
            (split channels beside whole running statistics, which learn from every rank), ``rank_random`` (dropout in
            a split region draws differently on every rank).
        dim: The split dim of its first operand.
        layout: Of that dim.
    """

    name: OperatorName
    dim: int = 0
    layout: Layout | None = None


@dataclass(frozen=True)
class CallEdit:
    """What changes at one call expression. Leaves are the call's arguments flattened, a method's receiver first.

    Attributes:
        arguments: ``(leaf, move)`` of tensors changed for this call only.
        integers: ``(leaf, global value, local value)`` of literal sizes and offsets.
        operator: The operator to run instead.
        result: How the result is moved; None if it is not.
    """

    arguments: tuple[tuple[int, Move], ...] = ()
    integers: tuple[tuple[int, int, int], ...] = ()
    operator: OperatorEdit | None = None
    result: Move | None = None


@dataclass(frozen=True)
class ParameterEdit:
    """How one parameter is stored.

    Attributes:
        fqn: Its path.
        dim: The split dim; None: replicated.
        layout: Of that dim.
    """

    fqn: str
    dim: int | None = None
    layout: Layout | None = None


@dataclass(frozen=True)
class ForwardEdits:
    """What one workload's forward does over the stored parameters.

    Attributes:
        calls: Edits per call expression.
        partial: Parameters of whose gradient each rank computes a partial sum.
        lifted: Parameters that join a partial sum, so that only the first rank reads them.
        inputs: Floating model inputs whose gradient would be partial on each rank.
        outputs: Paths of returned values whose gradient is partial on each rank.
        split_outputs: ``(path, move)`` of returned values that are split: gathered, or left as they are (identity).
    """

    calls: Mapping[Site, CallEdit] = field(default_factory=dict)
    partial: frozenset[str] = frozenset()
    lifted: frozenset[str] = frozenset()
    inputs: tuple[str, ...] = ()
    outputs: tuple[str, ...] = ()
    split_outputs: tuple[tuple[str, Move], ...] = ()
