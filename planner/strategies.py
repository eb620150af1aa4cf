"""Stage 3: every operator's choices, as cost tables over the stored placements of its operands and its result.

A value has one *stored* placement, which all its readers share: it is made in some placement (`Made`), moved at most
once where it is made,
and each reader may then change it locally for itself (`conversions`: slice, lift). So what is wanted in one
placement by several readers is
moved once, and the space is realised by edits of two kinds only: of a call's result, of a call's arguments.

How gradients are placed follows from the forward placements:
- a replicated operand of an operator whose result is split or partial receives a partial gradient on each rank;
- an operator with all operands replicated passes a whole gradient on whole, and a partial gradient on partial
(gradients are linear).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

import numpy as np

from .factor_graph import INFEASIBLE, Table
from .graph import LEAVES, VIEWS, Graph, Node
from .head_groups import held_keys, serves
from .local_operators import local_form, own_reductions
from .moves import Move, move
from .padding import HAZARDS
from .placement import PARTIAL, PARTIAL_GRAD, WHOLE, Partial, Replicate, Shard
from .pricing import Cost, Pricing
from .rules import RULES, Operation
from .rules.products import FACTORS
from .sequence import is_elastic, keeps_tokens, works_on_tokens
from .storing import Domain, Setting, Stored, beside_time, price_move, stored_domain

MAX_SLICES = 4


@dataclass(frozen=True)
class Conversion:
    """How one reader sees a stored value.

    Attributes:
        effective: What the operator computes on; replicated ones without regard to gradients.
        gradient: What gradient the value accepts through this reading.
        move: The local change, if any.
    """

    effective: Stored
    gradient: Literal["whole", "partial", "any"]
    move: Move | None = None


@dataclass(frozen=True)
class Choice:
    """One way to run an operator: how each operand is read, in which placement the result is made, how it is moved."""

    operands: tuple[Conversion, ...]
    made: Stored
    stored: Stored
    move: Move | None
    compute: Cost
    communication: Cost

    @property
    def cost(self) -> Cost:
        """Both parts."""
        return self.compute + self.communication


def reads(node: Node) -> tuple[int, ...]:
    """Distinct operands in order."""
    operands = node.operands
    return operands if len(operands) < 2 or len(set(operands)) == len(operands) else tuple(dict.fromkeys(operands))


def conversions(value: Node, stored: Stored, convertible: bool, slices: Sequence[Shard]) -> Iterator[Conversion]:
    """All ways in which a reader may see ``stored``."""
    if isinstance(stored, tuple):
        yield Conversion(stored, "any")
        return
    match stored:
        case Replicate(partial_grad=accepts):
            yield Conversion(WHOLE, "any" if not value.differentiable else "partial" if accepts else "whole")
            if not convertible:
                return
            if value.differentiable and accepts and value.op != "parameter":
                yield Conversion(WHOLE, "whole", move(PARTIAL_GRAD, WHOLE))
            source = PARTIAL_GRAD if accepts or not value.differentiable else WHOLE
            if value.dtype.is_floating_point:
                yield Conversion(PARTIAL, "any", move(source, PARTIAL))
            if value.op != "parameter" and (accepts or not value.differentiable):
                for shard in slices:
                    yield Conversion(shard, "any", move(PARTIAL_GRAD, shard))
        case Shard() | Partial():
            yield Conversion(stored, "any")


def choices(
    graph: Graph,
    node: Node,
    stored: Sequence[Stored],
    setting: Setting,
    pricing: Pricing,
    slices: Sequence[Sequence[Shard]],
) -> Iterator[tuple[tuple[Conversion, ...], Stored, Cost, Cost]]:
    """All ways to make ``node`` from operands stored as ``stored``: readings, placement made, compute, local
    changes."""
    nodes = graph.nodes
    operands = reads(node)
    call = graph.calls[node.call] if setting.editable else None
    by_index = {i: nodes[i] for i in operands}
    options = [
        list(conversions(nodes[i], s, c, sl))
        for i, s, c, sl in zip(operands, stored, setting.convertible, slices, strict=True)
    ]
    for combination in product(*options):
        placed = {i: conversion.effective for i, conversion in zip(operands, combination, strict=True)}
        if setting.fixed is not None and tuple(c.move for c in combination) != setting.fixed[0]:
            continue
        base = apply_rule(graph, node, placed)
        if base is None or not keeps_tokens(node, placed, base):
            continue
        form = local_form(node, call, placed, base)
        if isinstance(form, str):
            continue
        if _sums_padding(graph, node, placed, base) or _breaks_on_padding(node, combination, base, setting):
            continue
        changes = Cost()
        for i, conversion in zip(operands, combination, strict=True):
            if conversion.move is not None:
                changes += pricing.move(conversion.move, nodes[i].nbytes, free=nodes[i].op == "parameter")
        for nbytes in own_reductions(node, form, nodes):
            changes += Cost(pricing.collective("all_reduce", nbytes))
        single = None if isinstance(base, tuple) else base
        compute = pricing.compute(node, by_index, {i: p for i, p in placed.items() if not isinstance(p, tuple)}, single)
        if node.recomputed:
            compute, changes = compute.again(), changes.again()
        values = [nodes[i] for i in operands]
        for made in _with_gradients(node, base, combination, values):
            yield combination, made, compute, changes
        for born in setting.births:
            if _may_be_born(node, placed, base, born) and not isinstance(local_form(node, call, placed, born), str):
                for made in _with_gradients(node, born, combination, values):
                    yield combination, made, compute, changes


def _sums_padding(graph: Graph, node: Node, placed: dict[int, Stored], base: Stored) -> bool:
    """Whether a product sums over padding that no operand is sure to hold zeros in (weights do)."""
    if node.op not in FACTORS or not isinstance(base, Partial):
        return False
    split = [i for i, p in placed.items() if isinstance(p, Shard) and p.layout.is_padded]
    return bool(split) and not any(_is_weight(graph, i) for i in split)


def _breaks_on_padding(node: Node, combination: Sequence[Conversion], base: Stored, setting: Setting) -> bool:
    """Whether 0 / 0 or the like would come of padding: of what it holds here, or of the zeros behind a cut."""
    if node.op not in HAZARDS or not isinstance(base, Shard) or not base.layout.is_padded:
        return False
    return base.dim in setting.fragile or any(c.move is not None and c.move.forward == "slice" for c in combination)


def _is_weight(graph: Graph, index: int) -> bool:
    """A parameter, or views and casts of one."""
    node = graph.nodes[index]
    while node.op in VIEWS or node.op == "to":
        node = graph.nodes[node.operands[0]]
    return node.op == "parameter"


def _may_be_born(node: Node, placed: dict[int, Stored], base: Stored, born: Shard) -> bool:
    """Whether each rank may make its part of ``born`` from what it holds."""
    if node.op == "expand":
        return base == WHOLE
    keys = placed[node.operands[0]]
    _, dim, times = node.arguments
    held = held_keys(keys, node.shape[dim] // times, born.layout.ranks)
    if held is None or base == born or born.dim != dim or (isinstance(keys, Shard) and keys.dim != dim):
        return False
    return serves(held, born.layout, times)


def apply_rule(graph: Graph, node: Node, placed: dict[int, Stored]) -> Stored | None:
    """The operator's rule, or for an operator without one: replicated in, replicated out."""
    rule = RULES.get(node.op) or RULES.get(node.op.rstrip("_"))
    if rule is None:
        if any(not isinstance(p, Replicate) for s in placed.values() for p in (s if isinstance(s, tuple) else (s,))):
            return None
        return (WHOLE,) * len(node.outputs) if node.outputs else WHOLE
    made = rule(Operation(node, graph.nodes, placed))
    if made is not None and node.outputs and not isinstance(made, tuple):
        return (made,) * len(node.outputs)
    return made


def _with_gradients(
    node: Node, base: Stored, combination: Sequence[Conversion], operands: Sequence[Node]
) -> Iterator[Stored]:
    """The placements made, gradients included, that agree with what the operands accept."""
    if node.op == "getitem":
        source = combination[0].effective
        yield source[node.arguments[1]] if isinstance(source, tuple) else source
        return
    wholes = [
        c.gradient
        for c, value in zip(combination, operands, strict=True)
        if c.effective == WHOLE and value.differentiable
    ]
    parts = base if isinstance(base, tuple) else (base,)
    if not all(isinstance(p, Replicate) for p in parts):
        if all(gradient != "whole" for gradient in wholes):
            yield base
        return
    tuples = [c.effective for c in combination if isinstance(c.effective, tuple)]
    if not node.differentiable:
        yield base
        return
    if all(gradient != "partial" for gradient in wholes) and not tuples:
        yield base
    cut = any(isinstance(c.effective, Shard) and v.differentiable for c, v in zip(combination, operands, strict=True))
    if all(gradient != "whole" for gradient in wholes) and not tuples and not cut:
        yield tuple(PARTIAL_GRAD for _ in base) if isinstance(base, tuple) else PARTIAL_GRAD


@dataclass(frozen=True)
class Choices:
    """One operator's table.

    Attributes:
        domain: Stored placements of the result, in order of preference.
        table: Objective (weighed picoseconds) over the operands' domains and ``domain``; `INFEASIBLE` where impossible.
    """

    domain: Domain
    table: Table


def tabulate(
    graph: Graph,
    node: Node,
    domains: Sequence[Domain],
    setting: Setting,
    pricing: Pricing,
    slices: Sequence[Sequence[Shard]],
) -> Choices:
    """The operator's cost table; minimised over readings and over the placement made."""
    found: list[tuple[tuple[int, ...], Stored, int]] = []
    order: dict[Stored, None] = {}
    for index in np.ndindex(*(len(d) for d in domains)):
        best: dict[Stored, int] = {}
        stored = [d[i] for d, i in zip(domains, index, strict=True)]
        for combination, made, compute, changes in choices(graph, node, stored, setting, pricing, slices):
            price = pricing.weighed(compute + changes) + setting.slice_ps * cuts(graph, node, combination)
            if price < best.get(made, INFEASIBLE):
                best[made] = price
        for made, price in best.items():
            order.setdefault(made)
            found.append((index, made, price))
    domain = stored_domain(node, list(order), setting)
    table = np.full((*(len(d) for d in domains), len(domain)), INFEASIBLE, dtype=np.int64)
    moves = {(made, target): price_move(node, made, target, setting, pricing) for made in order for target in domain}
    for index, made, price in found:
        for at, target in enumerate(domain):
            extra = moves[(made, target)]
            if extra is not None:
                total = price + pricing.weighed(extra) + beside_time(made, target, setting)
                table[(*index, at)] = min(table[(*index, at)], total)
    return Choices(domain, table)


def cuts(graph: Graph, node: Node, combination: Sequence[Conversion]) -> int:
    """How many activations are cut for this reader, otherwise than along the sequence."""
    return sum(
        c.move is not None
        and c.move.forward == "slice"
        and not is_elastic(c.effective)
        and graph.nodes[i].differentiable
        for i, c in zip(reads(node), combination, strict=True)
    )


def best_choice(
    graph: Graph,
    node: Node,
    stored: Sequence[Stored],
    result: Stored,
    setting: Setting,
    pricing: Pricing,
    slices: Sequence[Sequence[Shard]],
) -> Choice:
    """The choice behind a table entry: the first of least price."""
    best: tuple[int, Choice] | None = None
    for combination, made, compute, changes in choices(graph, node, stored, setting, pricing, slices):
        extra = price_move(node, made, result, setting, pricing)
        if extra is None:
            continue
        price = pricing.weighed(compute + changes) + pricing.weighed(extra)
        price += beside_time(made, result, setting)
        price += setting.slice_ps * cuts(graph, node, combination)
        if best is None or price < best[0]:
            step = None if isinstance(made, tuple) or isinstance(result, tuple) else move(made, result)
            best = price, Choice(combination, made, result, step, compute, changes + extra)
    if best is None:
        raise AssertionError(f"no choice at {node.op} of {node.module}")
    return best[1]


def slice_options(
    graph: Graph, node: Node, domains: Sequence[Domain], sequences: Mapping[tuple[int, ...], Shard]
) -> list[list[Shard]]:
    """For each operand, the splits that other operands may have along dims of equal length, counted from the right,
    and that along the sequence where the operator works on each token by itself."""
    operands = reads(node)
    options: list[list[Shard]] = []
    for i, index in enumerate(operands):
        shape = graph.nodes[index].shape
        found: dict[Shard, None] = {}
        for j, other in enumerate(operands):
            offset = len(graph.nodes[other].shape) - len(shape)
            for stored in domains[j] if j != i else ():
                if (
                    isinstance(stored, Shard)
                    and stored.dim >= offset
                    and shape[stored.dim - offset : stored.dim - offset + 1] == (stored.layout.size,)
                ):
                    found[Shard(stored.dim - offset, stored.layout)] = None
        if shape in sequences and works_on_tokens(node):
            found.setdefault(sequences[shape])
        options.append(list(found)[:MAX_SLICES])
    return options


def fixed_slices(setting: Setting) -> list[list[Shard]]:
    """For each operand, the one split that a given plan cuts it into, if it does."""
    moves = setting.fixed[0] if setting.fixed is not None else ()
    return [
        [Shard(m.dim, m.layout)] if m is not None and m.forward == "slice" and m.layout is not None else []
        for m in moves
    ]


def is_leaf(node: Node) -> bool:
    """Parameters, buffers, inputs and constants."""
    return node.op in LEAVES
