"""Repeated groups of variables: each distinct one is eliminated once.

The interior of a group meets the rest of the graph only through its boundary, so eliminating the interior leaves exact
tables over the boundary. These depend on nothing but the tables that touch the interior and the positions at which they
do: two groups in which both are equal get the same messages and the same back pointers, and only the names of the
variables differ. Nothing is approximated, so a folded solve costs what the unfolded one costs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Generic

from .elimination import Algebra, Eliminated, T, decode, eliminate
from .factor_graph import Interned
from .ordering import schedule
from .presolve import Reduced, Term, ascending, reduce_domains


@dataclass(frozen=True, eq=False)
class Graph:
    """A problem with interned tables; factors before ``first_memory`` are costs, the others bytes."""

    sizes: tuple[int, ...]
    factors: tuple[Interned, ...]
    first_memory: int
    groups: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, eq=False)
class Template(Generic[T]):
    """The elimination of one distinct group in local variables: interior positions first, then the boundary."""

    reduced: Reduced
    eliminated: Eliminated[T]


@dataclass(frozen=True, eq=False)
class Instance(Generic[T]):
    """One group: its template and the variable of the problem behind each local one."""

    template: Template[T]
    variables: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Folded(Generic[T]):
    """The graph without the groups' interiors.

    Attributes:
        instances: The folded groups.
        terms: Terms that touch no folded interior.
        messages: (instance, table number in its template, variables of the table's dims, table).
        distinct: Number of distinct templates.
        cost_offset: Constant cost found inside the groups.
        memory_offset: Constant bytes found inside the groups.
        interior: Variables eliminated inside groups.
    """

    instances: tuple[Instance[T], ...]
    terms: tuple[Term, ...]
    messages: tuple[tuple[int, int, tuple[int, ...], T], ...]
    distinct: int
    cost_offset: int
    memory_offset: int
    interior: frozenset[int]


def as_terms(graph: Graph, indices: Iterable[int], local: dict[int, int] | None = None) -> list[Term]:
    """Factors as terms over ascending variables (numbered by ``local`` if given)."""
    terms = []
    for index in indices:
        factor = graph.factors[index]
        variables = factor.variables if local is None else tuple([local[v] for v in factor.variables])
        scope, table = ascending(variables, factor.table)
        terms.append(Term(scope, table) if index < graph.first_memory else Term(scope, table * 0, table))
    return terms


def fold(graph: Graph, algebra: Algebra[T], limit: int) -> Folded[T]:
    """Eliminate the groups' interiors, equal groups once.

    Variables of a factor that touches several groups count as boundary, and a group whose interior needs a joined table
    of more than ``limit`` entries is left unfolded: both only change speed.

    Raises:
        Infeasible: The interior of some group has no assignment.
    """
    group_of = {v: number for number, group in enumerate(graph.groups) for v in group}
    for factor in graph.factors:
        if len({group_of[v] for v in factor.variables if v in group_of}) > 1:
            for v in factor.variables:
                group_of.pop(v, None)
    touching: list[list[int]] = [[] for _ in graph.groups]
    outside: list[int] = []
    for index, factor in enumerate(graph.factors):
        home = next((group_of[v] for v in factor.variables if v in group_of), None)
        (outside if home is None else touching[home]).append(index)

    templates: dict[tuple[tuple[int, ...], ...], Template[T] | None] = {}
    instances: list[Instance[T]] = []
    messages: list[tuple[int, int, tuple[int, ...], T]] = []
    interior: set[int] = set()
    cost = memory = 0
    for group, indices in zip(graph.groups, touching, strict=True):
        inner = [v for v in group if v in group_of]
        if not inner:
            continue
        local = {v: position for position, v in enumerate(inner)}
        signature: list[tuple[int, ...]] = [tuple([graph.sizes[v] for v in inner])]
        for index in indices:
            factor = graph.factors[index]
            names = [local.setdefault(v, len(local)) for v in factor.variables]
            signature.append((factor.key, index < graph.first_memory, *names))
        key = tuple(signature)
        if key not in templates:
            templates[key] = _template(graph, algebra, indices, local, len(inner), limit)
        template = templates[key]
        if template is None:
            outside.extend(indices)
            continue
        variables = tuple(local)
        interior.update(inner)
        cost, memory = cost + template.reduced.cost_offset, memory + template.reduced.memory_offset
        for number, scope, table in template.eliminated.leftovers:
            messages.append((len(instances), number, tuple([variables[k] for k in scope]), table))
        instances.append(Instance(template, variables))
    terms = as_terms(graph, sorted(outside))
    distinct = sum(template is not None for template in templates.values())
    return Folded(tuple(instances), tuple(terms), tuple(messages), distinct, cost, memory, frozenset(interior))


def unfold(algebra: Algebra[T], instance: Instance[T], assignment: dict[int, int], chosen: dict[int, int]) -> None:
    """Assign a folded group's interior, given its boundary in ``assignment`` and the labels chosen in its messages."""
    template, variables = instance.template, instance.variables
    local = {k: assignment[v] for k, v in enumerate(variables) if k not in template.reduced.kept}
    decode(algebra, template.eliminated, local, chosen)
    for k, kept in template.reduced.kept.items():
        assignment[variables[k]] = int(kept[local.get(k, 0)])


def _template(
    graph: Graph, algebra: Algebra[T], indices: Sequence[int], local: dict[int, int], inner: int, limit: int
) -> Template[T] | None:
    sizes = [graph.sizes[v] for v in local]
    reduced = reduce_domains(sizes, as_terms(graph, indices, local), range(inner))
    order = schedule([term.scope for term in reduced.terms], reduced.sizes, range(inner), limit)
    if order.remaining:
        return None
    tables = [(term.scope, algebra.lift(term)) for term in reduced.terms]
    return Template(reduced, eliminate(algebra, reduced.sizes, tables, order))
