"""Bytes a rank holds under a placement: the additive bound that the solver caps and the plan reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from colrow.cost_models.memory import MemoryBytes, training_bytes

from .graph import VIEWS, Graph, Node, Ref, numel
from .placement import Placement, Shard
from .pricing import Phase
from .storing import Stored
from .strategies import is_leaf


def memory_of(graph: Graph, phase: Phase, context: int) -> Callable[[Node, Stored], MemoryBytes]:
    """Bytes of one value stored in a placement.

    Weights count in every phase; gradients and AdamW's two moments (in the parameters' dtype) in training, as do all
    values that a
    backward pass may read (an upper bound: every floating result that is no view). In inference keys and values are
    cached.
    """
    cached = _cached_values(graph) if phase != "train" else {}

    def of(node: Node, stored: Stored) -> MemoryBytes:
        if node.op in ("parameter", "buffer"):
            copies = isinstance(stored, Shard) and stored.layout.is_replicated  # stored whole, sliced when read
            count = numel(node.shape) if copies else _held(node, stored)
            itemsize = node.dtype.itemsize
            if phase == "train" and node.differentiable:
                trained = training_bytes(count, itemsize)
                return MemoryBytes(count * itemsize, trained.gradients, trained.optimizer)
            return MemoryBytes(count * itemsize)
        if is_leaf(node):
            return MemoryBytes()
        held = _held(node, stored) * node.dtype.itemsize
        if phase == "train":
            return MemoryBytes(activations=held) if node.differentiable and node.op not in VIEWS else MemoryBytes()
        if node.index in cached:
            length = max(1, node.shape[-2]) if len(node.shape) > 1 else 1
            return MemoryBytes(kv_cache=held * (length + context) // length)
        return MemoryBytes()

    return of


def workspace_bytes(graph: Graph, phase: Phase) -> int:
    """Room for what is live at once beside the additive part: three times the largest value, unsplit."""
    del phase
    return 3 * max((n.nbytes for n in graph.nodes if not is_leaf(n)), default=0)


def total_of(graph: Graph, stored: Sequence[Stored], phase: Phase, context: int) -> Mapping[str, int]:
    """Bytes per rank by kind, tied parameters once."""
    of, total = memory_of(graph, phase, context), MemoryBytes(workspace=workspace_bytes(graph, phase))
    counts: Counter[tuple[int, Stored]] = Counter()
    alike: dict[tuple[int, bool], int] = {}  # a copy may differ from its template in whether a gradient comes
    for node in graph.nodes:
        if node.fqn not in graph.ties:
            like = alike.setdefault((node.template, node.differentiable), node.index)
            counts[(like, stored[node.index])] += 1
    for (index, placement), count in counts.items():
        one = of(graph.nodes[index], placement)
        total += MemoryBytes(**{kind: count * nbytes for kind, nbytes in one.by_kind().items()})
    return dict(total.by_kind())


def _held(node: Node, stored: Stored) -> int:
    def count(shape: tuple[int, ...], placement: Placement) -> int:
        size = numel(shape)
        return size * placement.layout.local // placement.layout.size if isinstance(placement, Shard) else size

    if isinstance(stored, tuple):
        return sum(count(shape, placement) for (shape, _), placement in zip(node.outputs, stored, strict=True))
    return count(node.shape, stored)


def _cached_values(graph: Graph) -> dict[int, None]:
    """Keys and values as a cache keeps them: before heads are repeated."""
    found: dict[int, None] = {}
    for node in graph.nodes:
        if node.op != "scaled_dot_product_attention":
            continue
        for ref in node.arguments[1:3]:
            index = ref.index if isinstance(ref, Ref) else -1
            while index >= 0 and graph.nodes[index].op in (
                "reshape",
                "expand",
                "unsqueeze",
                "view",
                "contiguous",
                "clone",
            ):
                index = graph.nodes[index].operands[0]
            found[index] = None
    return found
