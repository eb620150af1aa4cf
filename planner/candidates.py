"""Which layouts are worth considering for each dim of each weight.

A split of a weight's dim is usable only if the views downstream can carry it: a projection that is viewed as heads
is cut between heads, a
fused ``q, k, v`` in each of its pieces. So layouts start where shapes are split or merged (`_seed`) and spread along
dims that operators
identify (`_links`), in both directions, until nothing new appears. Copies of folded blocks share their template's
candidates.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import chain, islice, product
from typing import Any

from .channel_groups import groups_of
from .graph import LEAVES, Graph, Node, Ref
from .head_groups import shared_heads
from .layout import Layout, balanced, joined
from .placement import WHOLE, Shard
from .roles import canonical
from .rules import RULES, Operation
from .rules.bags import LOOKUPS
from .rules.base import wrapped
from .rules.channels import ALIKE
from .rules.pointwise import CASTS, EACH, FIRST, JOINT, LINEAR_UNARY, NONLINEAR
from .rules.products import FACTORS
from .rules.shapes import view_groups

MAX_SEGMENTS = 6
"""Most pieces of a fused dim that are cut one by one."""
MAX_PER_DIM = 6
"""Most layouts kept per dim, the first found first."""
ROUNDS = 8

_POINTWISE = frozenset(
    {*CASTS, *EACH, *FIRST, *JOINT, *LINEAR_UNARY, *NONLINEAR, "where", "masked_fill", "slice_scatter"}
)
_VIEWS = frozenset({"view", "reshape", "_unsafe_view", "flatten", "unflatten"})
_SPLITS = frozenset({"split", "split_with_sizes", "chunk", "unbind"})

DimKey = tuple[int, int]


@dataclass
class Candidates:
    """Layouts per (node, dim), in order of preference."""

    graph: Graph
    ranks: int
    found: dict[DimKey, dict[Layout, None]] = field(default_factory=dict)
    tied: dict[int, list[int]] = field(default_factory=dict)
    changed: bool = False

    def of(self, node: Node) -> list[Shard]:
        """Splits of ``node`` worth considering."""
        names = [node.template, *self.tied.get(node.template, ())]
        layouts = {
            (d, layout): None for d in range(len(node.shape)) for i in names for layout in self.found.get((i, d), ())
        }
        return [Shard(d, layout) for d, layout in layouts]

    def get(self, index: int, dim: int) -> list[Layout]:
        """Layouts of one dim."""
        return list(self.found.get((index, dim), ()))

    def add(self, index: int, dim: int, layout: Layout | None) -> None:
        """Records a layout, unless the dim has enough or it is cut into too many pieces."""
        if layout is None or len(layout.segments) > MAX_SEGMENTS:
            return
        have = self.found.setdefault((index, dim), {})
        if layout not in have and len(have) < MAX_PER_DIM:
            have[layout] = None
            self.changed = True


def candidates(graph: Graph, ranks: int) -> Candidates:
    """All layouts for ``ranks`` ranks."""
    found = Candidates(graph, ranks)
    for alias, root in canonical(graph).items():
        if alias != root:
            found.tied.setdefault(root, []).append(alias)
    originals = [n for n in graph.nodes if n.template == n.index]
    users = graph.users()
    for node in originals:
        _seed(found, node)
    for _ in range(ROUNDS):
        found.changed = False
        for node in originals:
            _spread(found, node, users)
        for node in reversed(originals):
            _spread(found, node, users)
        if not found.changed:
            break
    return found


def _seed(found: Candidates, node: Node) -> None:
    """Every dim that a view makes or merges may be cut between its elements; so may every dim of a product's weight."""
    ranks, nodes = found.ranks, found.graph.nodes
    if node.op in _VIEWS:
        source = node.operands[0]
        old = nodes[source].shape
        for left, right in view_groups(old, node.shape) or []:
            real_left, real_right = [i for i in left if old[i] > 1], [j for j in right if node.shape[j] > 1]
            if len(real_left) == len(real_right) == 1:
                continue
            for i in real_left:
                found.add(source, i, balanced(old[i], ranks))
            for j in real_right:
                found.add(node.index, j, balanced(node.shape[j], ranks))
    elif node.op in FACTORS or node.op in LOOKUPS or node.op == "group_norm":
        groups = groups_of(node)
        if groups > 1:
            channels = nodes[node.operands[0]].shape[1]
            found.add(node.operands[0], 1, balanced(channels, ranks, channels // groups))
        for index in dict.fromkeys(node.operands):
            operand = nodes[index]
            if operand.op in ("parameter", "_weight_norm") and len(operand.shape) > 1:
                for dim, length in enumerate(operand.shape):
                    found.add(index, dim, balanced(length, ranks))


def _spread(found: Candidates, node: Node, users: list[list[int]]) -> None:
    for (a, dim_a), (b, dim_b) in _links(found.graph, node):
        for layout in found.get(a, dim_a):
            found.add(b, dim_b, layout)
        for layout in found.get(b, dim_b):
            found.add(a, dim_a, layout)
    if node.op in _VIEWS:
        _spread_view(found, node)
    elif node.op == "cat" and _joins_equal_ranks(found.graph, node):
        _spread_pieces(found, node.index, wrapped(_argument(node, 1, "dim", 0), len(node.shape)), _cat_pieces(node))
    elif node.op == "scaled_dot_product_attention":
        _spread_groups(found, node)
    elif node.op == "repeat_heads":
        _spread_repeats(found, node)
    for dim, pieces in _slices(found.graph, node, users).items():
        _spread_pieces(found, node.index, dim, pieces)


def _spread_view(found: Candidates, node: Node) -> None:
    nodes = found.graph.nodes
    source = node.operands[0]
    for a, b in ((source, node.index), (node.index, source)):
        for dim in range(len(nodes[a].shape)):
            for layout in found.get(a, dim):
                for target, made in _views_of(nodes[a].shape, nodes[b].shape, dim, layout):
                    found.add(b, target, made)


def _views_of(old: tuple[int, ...], new: tuple[int, ...], dim: int, layout: Layout) -> Iterator[tuple[int, Layout]]:
    from .rules.shapes import viewed

    made = viewed(old, new, dim, layout)
    if made is not None:
        yield made


def _spread_pieces(found: Candidates, whole: int, dim: int, pieces: list[tuple[int, int]]) -> None:
    """The whole is cut as its pieces are: (node, its dim) in order, or a plain length where nothing is known."""
    options: list[list[Layout]] = []
    for index, at in pieces:
        if index >= 0:
            length = found.graph.nodes[index].shape[at]
            options.append(found.get(index, at) or [balanced(length, found.ranks)])
        else:
            options.append([balanced(at, found.ranks)])
    alike = zip(*options, strict=False)  # all pieces cut in the same way come first
    for choice in chain(alike, islice(product(*options), 16) if len(options) <= 4 else ()):
        found.add(whole, dim, joined(choice))
    for layout in found.get(whole, dim):
        start = 0
        for index, at in pieces:
            length = found.graph.nodes[index].shape[at] if index >= 0 else at
            if index >= 0:
                found.add(index, at, layout.sliced(start, start + length))
            start += length


def _spread_repeats(found: Candidates, node: Node) -> None:
    """Heads and their repeats: cut between groups, or copies shared by the ranks of a group."""
    source, dim, times = node.operands[0], node.arguments[1], node.arguments[2]
    for layout in found.get(source, dim):
        found.add(node.index, dim, layout.scaled(times))
    for layout in found.get(node.index, dim):
        found.add(source, dim, layout.divided(times) or shared_heads(layout, times))
    for d in range(len(node.shape)):
        if d != dim:
            for a, b in ((source, node.index), (node.index, source)):
                for layout in found.get(a, d):
                    found.add(b, d, layout)


def _spread_groups(found: Candidates, node: Node) -> None:
    """Grouped queries: each key head serves several query heads."""
    nodes = found.graph.nodes
    q, k, v = (node.operands[i] for i in range(3))
    dim = len(node.shape) - 3
    if dim < 0 or nodes[q].shape[dim] % nodes[k].shape[dim]:
        return
    groups = nodes[q].shape[dim] // nodes[k].shape[dim]
    for index in (k, v):
        for layout in found.get(index, dim):
            found.add(q, dim, layout.scaled(groups))
        for layout in found.get(q, dim):
            found.add(index, dim, layout.divided(groups) or shared_heads(layout, groups))


def _links(graph: Graph, node: Node) -> Iterator[tuple[DimKey, DimKey]]:
    """Pairs of (node, dim) that an operator splits alike."""
    nodes = graph.nodes
    if node.op in FACTORS:
        whole = Operation(node, nodes, dict.fromkeys(node.operands, WHOLE))
        factors = FACTORS[node.op](whole)
        if factors is None:
            return
        at: dict[str, DimKey] = {}
        named = [(node.index, factors.out), *((ref.index, labels) for ref, labels in factors.operands)]
        for index, labels in named:
            for dim, label in enumerate(labels):
                if label is not None and not label.startswith("b"):
                    yield at.setdefault(label, (index, dim)), (index, dim)
        for index, labels in named:
            for dim, label in enumerate(labels):
                if label is not None and label.startswith("b") and index != node.index:
                    yield (index, dim), (node.index, list(factors.out).index(label))
        if factors.bias is not None:
            yield (node.index, wrapped(factors.bias_dim, len(node.shape))), (factors.bias.index, 0)
    elif node.op in _POINTWISE:
        for index in dict.fromkeys(node.operands):
            offset = len(node.shape) - len(nodes[index].shape)
            for dim, length in enumerate(nodes[index].shape):
                if length == node.shape[dim + offset]:
                    yield (index, dim), (node.index, dim + offset)
    elif node.op == "scaled_dot_product_attention":
        q, k, v = (node.operands[i] for i in range(3))
        for dim in range(len(node.shape) - 2):
            yield (q, dim), (node.index, dim)
            yield (k, dim), (v, dim)
            if nodes[q].shape[dim] == nodes[k].shape[dim]:
                yield (q, dim), (k, dim)
            if len(node.operands) > 3:
                mask = nodes[node.operands[3]]
                place = dim - len(node.shape) + len(mask.shape)
                if place >= 0 and mask.shape[place] != 1:
                    yield (q, dim), (mask.index, place)
    elif node.op in ALIKE:
        whole = Operation(node, nodes, dict.fromkeys(node.operands, WHOLE))
        for ref, dim, out in ALIKE[node.op](whole):
            yield (ref.index, dim), (node.index, out)
    elif node.op in LOOKUPS:
        yield (node.operands[0], 1), (node.index, len(node.shape) - 1)
    elif node.op == "cat" and _joins_equal_ranks(graph, node):
        dim = wrapped(_argument(node, 1, "dim", 0), len(node.shape))
        for index in dict.fromkeys(node.operands):
            for d in range(len(node.shape)):
                if d != dim:
                    yield (index, d), (node.index, d)
    elif (
        node.op in RULES
        and node.op not in _VIEWS
        and node.op != "repeat_heads"
        and node.op not in LEAVES
        and not node.outputs
    ):
        yield from _traced_links(graph, node)


def _traced_links(graph: Graph, node: Node) -> Iterator[tuple[DimKey, DimKey]]:
    """For any other rule with one result: which result dim an even split of each operand dim comes out at."""
    nodes = graph.nodes
    source = node.operands[0] if node.operands else None
    if source is None or nodes[source].outputs:
        return
    for dim, length in enumerate(nodes[source].shape):
        if length < 2:
            continue
        placed = dict.fromkeys(node.operands, WHOLE)
        placed[source] = Shard(dim, balanced(length, 2))  # type: ignore[assignment]
        made = RULES[node.op](Operation(node, nodes, placed))
        if isinstance(made, Shard) and made.layout.size == length:
            yield (source, dim), (node.index, made.dim)


def _slices(graph: Graph, node: Node, users: list[list[int]]) -> dict[int, list[tuple[int, int]]]:
    """For each dim of ``node`` that readers cut into consecutive pieces: the pieces."""
    nodes = graph.nodes
    cuts: dict[int, dict[tuple[int, int], int]] = {}
    for reader in (nodes[u] for u in users[node.index]):
        if reader.template != reader.index:
            continue
        if reader.op == "slice":
            dim = wrapped(_argument(reader, 1, "dim", 0), len(node.shape))
            length = node.shape[dim]
            start, stop, _ = slice(_argument(reader, 2, "start", None), _argument(reader, 3, "end", None)).indices(
                length
            )
            if (start, stop) != (0, length) and start < stop:
                cuts.setdefault(dim, {})[(start, stop)] = reader.index
        elif reader.op == "glu":
            dim = wrapped(_argument(reader, 1, "dim", -1), len(node.shape))
            half = node.shape[dim] // 2
            cuts.setdefault(dim, {}).update({(0, half): reader.index, (half, 2 * half): reader.index})
        elif reader.op in _SPLITS and reader.op != "unbind":
            dim = wrapped(_argument(reader, 2, "dim", 0), len(node.shape))
            start = 0
            pieces = {nodes[u].arguments[1]: u for u in users[reader.index] if nodes[u].op == "getitem"}
            for position, (shape, _) in enumerate(reader.outputs):
                cuts.setdefault(dim, {})[(start, start + shape[dim])] = pieces.get(position, -1)
                start += shape[dim]
    return {dim: _consecutive(node.shape[dim], dim, ranges) for dim, ranges in cuts.items()}


def _consecutive(length: int, dim: int, ranges: dict[tuple[int, int], int]) -> list[tuple[int, int]]:
    bounds = sorted({0, length, *(x for pair in ranges for x in pair)})
    pieces = []
    for start, stop in zip(bounds, bounds[1:], strict=False):
        index = ranges.get((start, stop), -1)
        pieces.append((index, dim) if index >= 0 else (-1, stop - start))
    return pieces


def _cat_pieces(node: Node) -> list[tuple[int, int]]:
    dim = wrapped(_argument(node, 1, "dim", 0), len(node.shape))
    return [(ref.index, dim) for ref in node.arguments[0] if isinstance(ref, Ref)]


def _joins_equal_ranks(graph: Graph, node: Node) -> bool:
    """``cat`` also takes empty 1-D tensors of old, which have no such dim."""
    return all(len(graph.nodes[i].shape) == len(node.shape) for i in node.operands)


def _argument(node: Node, position: int, name: str, default: int | None) -> Any:
    return node.arguments[position] if position < len(node.arguments) else node.keywords.get(name, default)
