"""How many bytes are alive at once: values from where they are made to where they are last read, gradients likewise.

Forward, a value that the backward pass needs stays; backward, what is kept goes in the order in which it came. A value
counts as stored on this rank (``nbytes``, per node); leaves, being there all the time, do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from .graph import Graph
from .held_values import held_until
from .saved_values import base_values, kept_inside, recomputed_values, saved_values
from .strategies import is_leaf


def forward_peak_bytes(graph: Graph, nbytes: Sequence[int]) -> int:
    """Most bytes alive at once where no backward pass follows."""
    bases = base_values(graph)
    last = _last_readers(graph, bases)
    change = [0] * (len(graph.nodes) + 2)
    for index in _made(graph, bases):
        change[index] += nbytes[index]
        change[last[index] + 1] -= nbytes[index]
    return max(accumulate(change))


def training_peak_bytes(graph: Graph, nbytes: Sequence[int]) -> tuple[int, int]:
    """What is kept at the end of a forward pass, and the most alive at once in it and the backward pass after it.

    A weight's new gradient counts while it is added to the one there is; those are counted elsewhere. What a
    checkpointed block makes anew is alive from then until the block's backward pass is over with it.
    """
    nodes, bases = graph.nodes, base_values(graph)
    saved, remade = saved_values(graph), recomputed_values(graph)
    last = _last_readers(graph, bases)
    stop_of = {index: stop for start, stop in graph.checkpointed for index in range(start, stop)}
    size = len(nodes) + 2
    forward, backward, again, stays_until, gradients = ([0] * size for _ in range(5))
    kept = 0
    for index in _made(graph, bases):
        node, held, stop = nodes[index], nbytes[index], stop_of.get(index)
        inside = held if kept_inside(node) else 0
        stays = held if node.template in saved else 0
        lasting = inside + stays if stop is None else stays
        kept += lasting
        forward[index] += held + inside
        forward[last[index] + 1] -= held - stays
        backward[index] += lasting
        stays_until[index] += lasting
        if stop is not None:
            forward[index + 1] -= inside
            made_again = inside + (held if node.template in remade else 0)
            for live, end in ((backward, stop), (again, stop)):
                live[index] += made_again
                live[end] -= made_again
            if node.recomputed and not stays and node.template not in remade:
                again[index] += held
                again[min(last[index] + 1, stop)] -= held
        if node.differentiable:
            for live in (backward, gradients):
                live[index] += held
                live[last[index] + 1] -= held
        added = _gradients(graph, index, nbytes)
        backward[index] += added
        backward[index + 1] -= added
    peak = max(*accumulate(forward), *accumulate(backward))
    if graph.checkpointed:
        anew, there, coming = ([*accumulate(live)] for live in (again, stays_until, gradients))
        for start, stop in graph.checkpointed:
            peak = max(peak, there[stop - 1] + coming[stop] + max(anew[start:stop]))
    return kept, peak


def _gradients(graph: Graph, index: int, nbytes: Sequence[int]) -> int:
    """Bytes of the parameters that an operator reads."""
    return sum(nbytes[i] for i in graph.nodes[index].operands if graph.nodes[i].op == "parameter")


def _made(graph: Graph, bases: Sequence[int]) -> list[int]:
    return [node.index for node in graph.nodes if bases[node.index] == node.index and not is_leaf(node)]


def _last_readers(graph: Graph, bases: Sequence[int]) -> list[int]:
    """The last node at which a value or a view of it is alive: its last reader, or later where the model's code holds
    it longer; for what the model returns the end."""
    last = list(range(len(graph.nodes)))
    for node in graph.nodes:
        for index in node.operands:
            last[bases[index]] = node.index
    for index, until in held_until(graph).items():
        last[bases[index]] = max(last[bases[index]], until)
    for index in graph.outputs:
        last[bases[index]] = len(graph.nodes)
    return last
