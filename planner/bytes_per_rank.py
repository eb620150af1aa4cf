"""Bytes a rank holds under a placement: the additive bound that the solver caps and the plan reports."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from colrow.cost_models.memory import MemoryBytes, training_bytes

from .graph import Graph, Node, Ref, numel
from .live_values import forward_peak_bytes, training_peak_bytes
from .placement import Placement, Shard
from .pricing import Phase, Pricing
from .saved_values import base_values, kept_inside, saved_values
from .storing import Stored
from .strategies import is_leaf


def memory_of(graph: Graph, phase: Phase, context: int) -> Callable[[Node, Stored], MemoryBytes]:
    """Bytes of one value stored in a placement.

    Weights count in every phase; gradients and AdamW's two moments (in the parameters' dtype) in training, as do the
    values that autograd keeps for the backward pass (`saved_values`). In inference keys and values are cached.
    """
    cached, trains = _cached_values(graph) if phase != "train" else {}, is_trained(graph)
    saved, bases = (saved_values(graph), base_values(graph)) if phase == "train" else (set(), [])
    anew = {index for start, stop in graph.checkpointed for index in range(start, stop)}

    def of(node: Node, stored: Stored) -> MemoryBytes:
        if node.op in ("parameter", "buffer"):
            return _kept(node, stored, phase == "train" and trains(node))
        if is_leaf(node):
            return MemoryBytes()
        held = _held(node, stored) * node.dtype.itemsize
        if phase == "train":
            own = bases[node.index] == node.index and node.template in saved
            return MemoryBytes(activations=held * (own + (kept_inside(node) and node.index not in anew)))
        if node.index in cached:
            length = max(1, node.shape[-2]) if len(node.shape) > 1 else 1
            return MemoryBytes(kv_cache=held * (length + context) // length)
        return MemoryBytes()

    return of


def is_trained(graph: Graph) -> Callable[[Node], bool]:
    """Whether a gradient comes to a parameter, under one of its names if it is tied."""
    if not graph.ties:
        return lambda node: node.op == "parameter" and node.differentiable
    reached = (n.fqn for n in graph.nodes if n.op == "parameter" and n.differentiable)
    names = {graph.ties.get(name, name) for name in reached}
    return lambda node: node.op == "parameter" and graph.ties.get(node.fqn, node.fqn) in names


def optimizer_ps(pricing: Pricing, node: Node, stored: Stored) -> int:
    """Picoseconds that a trained parameter stored so adds to the optimiser's step: its traffic on one rank."""
    held = _kept(node, stored, pricing.phase == "train")
    return pricing.optimizer_step(held.gradients, held.optimizer) if held.optimizer else 0


def optimizer_step_ps(pricing: Pricing, graph: Graph, stored: Sequence[Stored]) -> int:
    """Picoseconds of the optimiser's step over a rank's parameters, tied ones once, its launch among them."""
    trains = is_trained(graph)
    trained = [n for n in graph.nodes if n.op == "parameter" and n.fqn not in graph.ties and trains(n)]
    if pricing.phase != "train" or not trained:
        return 0
    return pricing.launch() + sum(optimizer_ps(pricing, node, stored[node.index]) for node in trained)


def _kept(node: Node, stored: Stored, trained: bool) -> MemoryBytes:
    """A parameter or buffer, and what training keeps beside it."""
    copies = isinstance(stored, Shard) and stored.layout.is_replicated  # stored whole, sliced when read
    count = numel(node.shape) if copies else _held(node, stored)
    if trained:
        return training_bytes(count, node.dtype.itemsize)
    return MemoryBytes(count * node.dtype.itemsize)


def workspace_bytes(graph: Graph, phase: Phase) -> int:
    """Room left, before placements are known, for what is live at once beside the additive part and for buffers of
    collectives: three times the largest value, unsplit. `total_of` counts it when they are."""
    del phase
    return 3 * max((n.nbytes for n in graph.nodes if n.template == n.index and not is_leaf(n)), default=0)


def total_of(
    graph: Graph, stored: Sequence[Stored], phase: Phase, context: int, communication: int = 0
) -> Mapping[str, int]:
    """Bytes per rank by kind, tied parameters once; ``communication``: buffers of the largest collective."""
    of = memory_of(graph, phase, context)
    held = _held_by_node(graph, stored)
    if phase == "train":
        kept, peak = training_peak_bytes(graph, held)
        total = MemoryBytes(workspace=peak - kept, communication=communication)
    else:
        total = MemoryBytes(workspace=forward_peak_bytes(graph, held), communication=communication)
    counts: Counter[tuple[int, int]] = Counter()
    placements = {id(placement): placement for placement in stored}  # hashing one takes longer than all else here
    alike: dict[tuple[int, bool, bool], int] = {}  # a copy may differ from its template in whether a gradient comes
    trains = is_trained(graph)
    for node in graph.nodes:
        if node.fqn not in graph.ties:
            like = alike.setdefault((node.template, node.differentiable, trains(node)), node.index)
            counts[(like, id(stored[node.index]))] += 1
    for (index, placement), count in counts.items():
        one = of(graph.nodes[index], placements[placement])
        total += MemoryBytes(**{kind: count * nbytes for kind, nbytes in one.by_kind().items()})
    return dict(total.by_kind())


def _held_by_node(graph: Graph, stored: Sequence[Stored]) -> list[int]:
    """Bytes of every value as it is stored; copies of a node stored alike hold as much."""
    alike: dict[tuple[int, int], int] = {}
    held = []
    for node, placement in zip(graph.nodes, stored, strict=True):
        key = (node.template, id(placement))
        if key not in alike:
            alike[key] = _held(node, placement) * node.dtype.itemsize
        held.append(alike[key])
    return held


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
                "repeat_heads",
            ):
                index = graph.nodes[index].operands[0]
            found[index] = None
    return found
