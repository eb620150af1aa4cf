"""Repeated key and value heads: several query heads share one.

Code repeats them as ``unsqueeze -> expand -> reshape``. Here the three become one operator, ``repeat_heads``, so
that a rank that holds some of
a group's query heads may hold that group's key head whole and repeat it less often: with fewer key heads than ranks,
ranks share copies.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from .edits import CallEdit
from .graph import Call, Graph, Node, Ref
from .layout import Layout, owned_units
from .measured import Measured
from .placement import WHOLE, Placement, Shard
from .rules.base import Operation, Result, rule

FUSED = "fused"


def fuse_repeats(graph: Graph, start: int, read_later: Collection[int]) -> None:
    """Rewrites every repeat of heads in ``graph`` as one node at the place of its reshape; the others read nothing
    any more.

    Args:
        graph: Changed in place.
        start: Where to begin: of a block that copies will be made of, its own nodes suffice.
        read_later: Values that have other readers than the graph's nodes.
    """
    repeats = [node for node in graph.nodes[start:] if node.op in ("reshape", "view") and _is_expand(graph, node)]
    if not repeats:
        return
    users = graph.users()
    for node in repeats:
        expand = graph.nodes[node.operands[0]]
        insert = graph.nodes[expand.operands[0]]
        if insert.op != "unsqueeze" or users[expand.index] != [node.index] or users[insert.index] != [expand.index]:
            continue
        if expand.index in read_later or insert.index in read_later:
            continue
        source = graph.nodes[insert.operands[0]]
        at = next((d for d in range(1, len(expand.shape)) if insert.shape[d] == 1 and expand.shape[d] > 1), None)
        merged = at is not None and node.shape == (
            *expand.shape[: at - 1],
            expand.shape[at - 1] * expand.shape[at],
            *expand.shape[at + 1 :],
        )
        if at is None or not merged or source.shape != (*insert.shape[:at], *insert.shape[at + 1 :]):
            continue
        if [i for i, n in enumerate(expand.shape) if n != insert.shape[i]] != [at]:
            continue
        graph.nodes[node.index] = replace(
            node,
            op="repeat_heads",
            arguments=(Ref(source.index), at - 1, expand.shape[at]),
            keywords={},
            inner_call=expand.call,
        )
        for dead in (expand, insert):
            graph.nodes[dead.index] = replace(dead, op=FUSED, arguments=(), keywords={}, differentiable=False, call=-1)
    graph.forget_users()


def _is_expand(graph: Graph, reshape: Node) -> bool:
    return bool(reshape.operands) and graph.nodes[reshape.operands[0]].op == "expand"


@rule("repeat_heads")
def repeat_heads(op: Operation) -> Result:
    """Each element of one dim several times: a split of it is scaled; partial sums pass."""
    dim, times = op.argument(1), op.argument(2)
    match op.placement(op.argument(0)):
        case Shard(d, layout):
            return Shard(d, layout.scaled(times) if d == dim else layout)
        case placement:
            return placement


def positions(layout: Layout, rank: int) -> list[int | None]:
    """Global index at every local position; None in padding."""
    held: list[int | None] = [None] * layout.local
    for start, local, length in layout.pieces(rank):
        held[local : local + length] = range(start, start + length)
    return held


def shared_heads(queries: Layout, times: int) -> Layout | None:
    """The key heads that each rank's query heads need, repeated equally often on every rank, as often as possible."""
    if len(queries.segments) > 1 or queries.size % times or queries.local > 1024:
        return None
    for repeats in range(queries.local, 0, -1):
        if queries.local % repeats:
            continue
        owned = [_needed(positions(queries, rank), times, repeats) for rank in range(queries.ranks)]
        if all(keys is not None for keys in owned):
            return owned_units(queries.size // times, 1, tuple(tuple(keys or ()) for keys in owned))
    return None


def _needed(queries: list[int | None], times: int, repeats: int) -> list[int] | None:
    keys: list[int] = []
    for start in range(0, len(queries), repeats):
        found = {q // times for q in queries[start : start + repeats] if q is not None}
        if len(found) > 1 or (found and len(keys) < start // repeats):
            return None
        keys += found
    return keys


def serves(keys: Layout, queries: Layout, times: int) -> bool:
    """Whether repeating each local key head ``queries.local / keys.local`` times lines up with the local query
    heads."""
    if keys.local == 0 or queries.local % keys.local or keys.size * times != queries.size:
        return False
    repeats = queries.local // keys.local
    if repeats == 1:
        return False  # traced again, it would be no repeat
    for rank in range(queries.ranks):
        held = positions(keys, rank)
        for at, query in enumerate(positions(queries, rank)):
            if query is not None and held[at // repeats] != query // times:
                return False
    return True


def held_keys(keys: Placement | tuple[Placement, ...], length: int, ranks: int) -> Layout | None:
    """How ranks hold the heads that are repeated: their layout, or a single head that every rank has."""
    if isinstance(keys, Shard):
        return keys.layout
    return owned_units(1, 1, ((0,),) * ranks) if keys == WHOLE and length == 1 else None


def repeat_edits(
    node: Node, outer: Call, inner: Call, keys: Layout, made: Placement
) -> tuple[CallEdit, CallEdit] | str | None:
    """Edits of the reshape and of the expand that repeat local heads as often as planned; None if nothing changes.

    Args:
        node: The repeat.
        outer: The reshape's call.
        inner: The expand's call.
        keys: Layout of the heads repeated.
        made: Placement of the result.
    """
    _, dim, times = node.arguments
    if not isinstance(made, Shard):
        return None
    joined = [*node.shape]
    joined[made.dim] = made.layout.local
    repeats = times if made.dim != dim else made.layout.local // keys.local
    spread = [*joined[:dim], joined[dim] // repeats, repeats, *joined[dim + 1 :]]
    before = [*joined[:dim], joined[dim] // repeats * times, *joined[dim + 1 :]]
    sizes, lengths = _trailing_sizes(inner, len(spread)), _trailing_sizes(outer, len(joined))
    if repeats != times and (not sizes or inner.leaves[sizes[dim + 1]] != times):
        return "its repeats are not written at its call"
    if repeats != times and not lengths and outer.function in ("reshape", "view"):
        return "its sizes are not written at its call"
    edits = _size_edits(outer, lengths, joined, before), _size_edits(inner, sizes, spread, spread)
    return None if edits == (CallEdit(), CallEdit()) else edits


def _trailing_sizes(call: Call, rank: int) -> list[int]:
    """Where the last ``rank`` integers of a call stand, if it has so many: its sizes."""
    found = [i for i, leaf in enumerate(call.leaves) if isinstance(leaf, int) and not isinstance(leaf, bool)]
    return found[-rank:] if len(found) >= rank else []


def _size_edits(call: Call, leaves: list[int], wanted: list[int], measured: list[int]) -> CallEdit:
    """Written sizes that are not what is ``wanted``; one that the code measured is what ``measured`` says."""
    edits = []
    for leaf, want, reads in zip(leaves, wanted, measured, strict=False):
        value = call.leaves[leaf]
        now = reads if isinstance(value, Measured) else int(value)
        if now not in (-1, want):
            edits.append((leaf, now, want))
    return CallEdit(integers=tuple(edits))
