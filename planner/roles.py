"""What each parameter is to the graph: a matmul, embedding or expert weight, or something else."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from .graph import LEAVES, VIEWS, Graph, Node, numel
from .opaque import OPERATOR as OPAQUE
from .placement import WHOLE
from .rules import Operation
from .rules.bags import LOOKUPS
from .rules.products import FACTORS

SMALL_SHARE = 0.01
"""Weights under this share of their block's matmul bytes may stay replicated (DESIGN section 3, "the space")."""

LOW_RANK_SHARE = 0.1
"""Likewise for the down projection of a low-rank pair: splitting it takes a reduction of its own."""
_THROUGH = VIEWS | {"to", "contiguous", "clone", "index", "type_as", "_weight_norm"}


@dataclass(frozen=True)
class Weight:
    """A parameter that a product or an embedding reads, or a module that could not be traced.

    Attributes:
        index: Its (canonical) node.
        readers: The products and embeddings that read it, views in between left out.
        block: Path of its outermost block; "" outside blocks.
        share: Its share of that block's matmul bytes.
        is_low_rank_input: It projects down to less than half its input, for another product of the block to project up.
    """

    index: int
    readers: tuple[int, ...]
    block: str
    share: float
    is_low_rank_input: bool = False

    @property
    def may_stay_whole(self) -> bool:
        """Whether it may stay replicated although it could be split."""
        return self.share < (LOW_RANK_SHARE if self.is_low_rank_input else SMALL_SHARE)


def canonical(graph: Graph) -> dict[int, int]:
    """Leaf node -> the node that stands for its tied group."""
    by_name = {n.fqn: n.index for n in graph.nodes if n.op == "parameter"}
    same: dict[int, int] = {}
    first: dict[str, int] = {}
    for name, index in by_name.items():
        root = graph.ties.get(name, name)
        same[index] = first.setdefault(root, index)
    return same


def crossing(graph: Graph) -> list[int]:
    """Differentiable values that one block makes and another, or what no block contains, reads."""
    nodes, block_of = graph.nodes, graph.block_of()
    blocks = [block_of(node.module) for node in nodes]
    read_outside = {i for node in nodes for i in node.operands if blocks[i] != blocks[node.index]}
    return sorted(i for i in read_outside if nodes[i].differentiable and nodes[i].op not in LEAVES)


def hidden_bytes(graph: Graph, crossings: list[int]) -> int:
    """Bytes of the hidden state: of the values that cross from block to block, the size that most have; 0 without
    blocks."""
    sizes = Counter(graph.nodes[index].nbytes for index in crossings)
    return max(sizes, key=lambda nbytes: (sizes[nbytes], nbytes), default=0)


def weights(graph: Graph) -> dict[int, Weight]:
    """All weights of products and embeddings, by canonical node."""
    users, same, block_of = graph.users(), canonical(graph), graph.block_of()
    readers: dict[int, list[int]] = {}
    for node in graph.nodes:
        if node.op == "parameter" and len(node.shape) > 1:
            found = _products(graph, node, users)
            if found:
                readers.setdefault(same[node.index], []).extend(found)
    total: dict[str, int] = {}
    for index in readers:
        total[block_of(graph.nodes[index].fqn)] = (
            total.get(block_of(graph.nodes[index].fqn), 0) + graph.nodes[index].nbytes
        )
    narrows: dict[int, bool] = {}  # template of a product -> whether it projects down

    def projects_down(product: int) -> bool:
        template = graph.nodes[product].template
        if template not in narrows:
            narrows[template] = _projects_down(graph, product, users)
        return narrows[template]

    return {
        index: Weight(
            index,
            tuple(dict.fromkeys(found)),
            block,
            graph.nodes[index].nbytes / max(1, total[block]),
            bool(block) and all(map(projects_down, found)),
        )
        for index, found in readers.items()
        for block in [block_of(graph.nodes[index].fqn)]
    }


def _projects_down(graph: Graph, product: int, users: list[list[int]]) -> bool:
    """Whether a product's result is less than half as wide as its input and only other products' operands take it
    up."""
    node = graph.nodes[product]
    if node.op not in ("linear", "addmm"):
        return False
    source = graph.nodes[node.operands[0] if node.op == "linear" else node.operands[1]]
    width = node.shape[-1]
    if 2 * width >= source.shape[-1]:
        return False
    frontier, seen, products = [product], {product}, 0
    while frontier and len(seen) < 64:
        for reader in users[frontier.pop()]:
            other = graph.nodes[reader]
            if reader in seen:
                continue
            seen.add(reader)
            if other.op in ("linear", "addmm"):
                products += other.shape[-1] > width
            elif other.op not in FACTORS and other.shape[-1:] and other.shape[-1] <= width:
                frontier.append(reader)
    return products > 0


def _products(graph: Graph, weight: Node, users: list[list[int]]) -> list[int]:
    found, frontier, seen = [], [weight.index], {weight.index}
    while frontier:
        for reader in users[frontier.pop()]:
            node = graph.nodes[reader]
            if reader in seen:
                continue
            seen.add(reader)
            if node.op in FACTORS or node.op in LOOKUPS or node.op == OPAQUE:
                if numel(weight.shape) > 1:
                    found.append(reader)
            elif node.op in _THROUGH:
                frontier.append(reader)
    return found


def label_of(graph: Graph, product: Node, operand: int, dim: int) -> str:
    """``column`` if an operand's ``dim`` appears in the product's result, ``row`` if it is summed, ``vocab`` for an
    embedding's rows."""
    if product.op in LOOKUPS:
        return "vocab" if dim == 0 else "column"
    factors = FACTORS[product.op](Operation(product, graph.nodes, dict.fromkeys(product.operands, WHOLE)))
    if factors is None:
        return "column"
    labels = next(labels for ref, labels in factors.operands if ref.index == operand)
    return "column" if labels[dim] in factors.out else "row"
