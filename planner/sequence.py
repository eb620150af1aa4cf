"""Sequence parallelism: which values may be split along the sequence between matmuls, and which operators keep it.

Norms, residual sums and dropout work on each token by itself, so between a row layer and the next column layer every
rank may hold its tokens only: the all_reduce becomes a reduce_scatter and an all_gather. The length of such a split is
not known before the run (`Layout.elastic`), so nothing in the code may depend on it: a value whose length the model
reads is never split along it.
"""

from __future__ import annotations

from collections.abc import Mapping

from .graph import Graph, Node
from .layout import Layout, balanced
from .measured import Whole
from .placement import Placement, Shard
from .roles import crossing
from .rules.pointwise import CASTS, EACH, FIRST, JOINT, LINEAR_UNARY, NONLINEAR

Placed = Mapping[int, Placement | tuple[Placement, ...]]

_TOKENWISE = frozenset(
    {*CASTS, *EACH, *FIRST, *JOINT, *LINEAR_UNARY, *NONLINEAR, "where", "masked_fill", "layer_norm", "rms_norm"}
    | {"mean", "sum", "var", "std", "norm", "linalg_vector_norm", "amax", "amin", "softmax", "log_softmax"}
)


def sequence_splits(graph: Graph, ranks: int) -> dict[tuple[int, ...], Shard]:
    """Shapes ``[batch, sequence, hidden]`` that cross from block to block -> their split along the sequence.

    Lengths that do not divide by ``ranks`` have none: such a forward runs the plan's all-reduce twin.
    """
    found: dict[tuple[int, ...], Shard] = {}
    for index in crossing(graph):
        shape = graph.nodes[index].shape
        if len(shape) == 3 and shape[1] > 1 and shape[1] % ranks == 0:
            found[shape] = Shard(1, Layout(balanced(shape[1], ranks).segments, elastic=True))
    return found


def is_elastic(placement: object) -> bool:
    """Whether a value is split along the sequence."""
    return isinstance(placement, Shard) and placement.layout.elastic


def is_read(node: Node, placement: object) -> bool:
    """Whether the model's code reads the length along which ``placement`` splits the value, and cannot do with a local
    one: of a sequence any that it reads, of other dims what it needs whole."""
    if not isinstance(placement, Shard):
        return False
    return Whole(placement.dim) in node.measured or (placement.layout.elastic and placement.dim in node.measured)


def keeps_tokens(node: Node, placed: Placed, made: Placement | tuple[Placement, ...]) -> bool:
    """Whether ``node`` computes each token by itself where its operands are split along the sequence."""
    if not any(map(is_elastic, placed.values())):
        return True
    return works_on_tokens(node) and is_elastic(made)


def works_on_tokens(node: Node) -> bool:
    """Whether the operator is one of norms, residual sums, dropout and the like."""
    return node.op in _TOKENWISE
