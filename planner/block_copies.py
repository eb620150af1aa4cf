"""A folded block's nodes, put into the graph once more under another name for every copy of the block.

What is equal in all copies is found out once, when the template is made; a copy only renames and renumbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from .graph import LEAVES, Call, Graph, Node, Ref, mapped, references
from .head_groups import FUSED
from .measured import Measured
from .sites import Site


@dataclass
class Template:
    """The nodes of a block that was traced.

    Attributes:
        fqn: Its path.
        entries: Values that go in.
        exits: Values that come out.
        outer: Values that its nodes read and others made, in order of first use: parameters mostly.
        nodes: Its operators, each with whether its arguments hold no values inside others.
        calls: Its API calls, in order of first use, each with whether its leaves hold none either.
        whole: Those of its nodes that share memory with a tensor changed in place.
    """

    fqn: str
    entries: list[int]
    exits: list[int]
    outer: list[int]
    nodes: list[tuple[Node, bool]]
    calls: list[tuple[int, Call, bool]]
    whole: list[int]


def template_of(graph: Graph, fqn: str, start: int, entries: list[int], exits: list[int]) -> Template:
    """The template whose nodes are those of ``graph`` from ``start`` on."""
    own = [node for node in graph.nodes[start:] if node.op != FUSED]
    nodes = [node for node in own if node.op not in LEAVES]
    calls = dict.fromkeys(call for node in nodes for call in (node.inner_call, node.call) if call >= 0)
    outer = dict.fromkeys(i for node in own for i in node.operands if i < start)
    outer |= dict.fromkeys(node.index for node in own if node.op in LEAVES)
    outer |= dict.fromkeys(i for call in calls for i in _values(graph.calls[call].leaves) if i < start)
    return Template(
        fqn,
        entries,
        exits,
        list(outer),
        [(node, _is_flat(node.arguments) and not node.keywords) for node in nodes],
        [(index, graph.calls[index], _is_flat(graph.calls[index].leaves)) for index in calls],
        [node.index for node in nodes if node.index in graph.whole],
    )


def append_copy(
    graph: Graph, template: Template, fqn: str, entries: list[int], leaf: Callable[[Node, str], int]
) -> list[Ref]:
    """Appends a copy of the template's nodes, its parameters renamed and its inputs replaced.

    Args:
        graph: Extended in place.
        template: What is copied.
        fqn: Path of the copy.
        entries: The values that go in.
        leaf: Finds or makes the leaf like a given one under another name.

    Returns:
        The values that come out.
    """
    to = dict(zip(template.entries, entries, strict=True))
    own, inner = template.fqn, f"{template.fqn}."
    paths: dict[str, str] = {}

    def renamed(path: str) -> str:
        if path not in paths:
            paths[path] = fqn + path[len(own) :] if path == own or path.startswith(inner) else path
        return paths[path]

    for index in template.outer:  # all leaves first, so that the copy's own nodes are one range
        if index not in to:
            outer = graph.nodes[index]
            name = renamed(outer.fqn)
            to[index] = index if name == outer.fqn else leaf(outer, name)
    refs = {old: Ref(new) for old, new in to.items()}
    first, nodes = len(graph.nodes), graph.nodes
    for offset, (node, _) in enumerate(template.nodes):
        refs[node.index] = Ref(first + offset)

    def moved(item: Any) -> Any:
        if isinstance(item, Measured):
            return item.resolved(lambda origin: refs.get(origin.index, origin))
        return refs.get(item.index, item) if isinstance(item, Ref) else item

    calls: dict[int, int] = {-1: -1}
    for old, call, flat in template.calls:
        calls[old] = len(graph.calls)
        leaves = (
            [refs.get(a.index, a) if type(a) is Ref else a for a in call.leaves] if flat else map(moved, call.leaves)
        )
        graph.calls.append(Call(Site(renamed(call.site.module), call.site.frames), call.function, tuple(leaves)))
    for node, flat in template.nodes:
        if flat:
            arguments: tuple[Any, ...] = tuple([refs[a.index] if type(a) is Ref else a for a in node.arguments])
            keywords = node.keywords
        else:
            arguments, keywords = mapped(node.arguments, moved), mapped(node.keywords, moved)
        operands = tuple([refs[i].index for i in node.operands])
        both = calls[node.call], calls[node.inner_call]
        nodes.append(node.copied(len(nodes), arguments, keywords, operands, both, renamed(node.module)))
    graph.whole.update(refs[index].index for index in template.whole)
    return [refs[index] for index in template.exits]


def _values(leaves: tuple[Any, ...]) -> Iterator[int]:
    """Values among a call's leaves, and those that its lengths were measured on."""
    for leaf in leaves:
        yield from references(list(leaf.origins()) if isinstance(leaf, Measured) else leaf)


def _is_flat(items: tuple[Any, ...]) -> bool:
    """Whether values stand in ``items`` themselves; what is nested holds constants only."""
    return not any(isinstance(a, Measured) or (not isinstance(a, Ref) and _holds_values(a)) for a in items)


def _holds_values(tree: Any) -> bool:
    if isinstance(tree, slice):
        tree = (tree.start, tree.stop, tree.step)
    if isinstance(tree, (tuple, list, dict)):
        return any(map(_holds_values, tree.values() if isinstance(tree, dict) else tree))
    return isinstance(tree, (Ref, Measured))
