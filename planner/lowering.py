"""Stage 6: a solved graph -> edits of parameters and calls, and the collectives they cause."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from .edits import CallEdit, ForwardEdits, ParameterEdit
from .formulation import Formulation
from .graph import Graph, Node, Ref
from .head_groups import held_keys, repeat_edits
from .local_operators import leaves_of, local_form, measured_sizes, merged, own_reductions
from .measured import Measured
from .placement import PARTIAL_GRAD, Replicate, Shard
from .planned_collectives import Collective, planned_collectives
from .pricing import Cost
from .returned_values import returned_part
from .roles import canonical
from .sites import Site
from .storing import Stored
from .strategies import Choice, best_choice, is_leaf, reads


class SiteConflict(Exception):
    """One call expression would need two different edits."""

    def __init__(self, sites: frozenset[object]) -> None:
        super().__init__("conflicting edits")
        self.sites = sites


@dataclass
class Lowered:
    """Everything the rewriter does.

    Attributes:
        parameters: Every parameter's layout, in the model's order.
        edits: What the forward does; calls in graph order.
        collectives: Of one step, forward then backward.
        stored: Stored placement per node.
        choices: What was chosen per operator node.
        own: Bytes of the all_reduces that operators' local forms make themselves.
        cost: Sum over operators and collectives.
    """

    parameters: list[ParameterEdit] = field(default_factory=list)
    edits: ForwardEdits = ForwardEdits()
    collectives: list[Collective] = field(default_factory=list)
    stored: list[Stored] = field(default_factory=list)
    choices: dict[int, Choice] = field(default_factory=dict)
    own: dict[int, tuple[int, ...]] = field(default_factory=dict)
    compute: Cost = Cost()
    communication: Cost = Cost()


def lower(formulation: Formulation, assignment: tuple[int, ...], workload: str) -> Lowered:
    """Reads the solver's assignment back.

    Raises:
        SiteConflict: Two calls of one site were given different edits.
    """
    graph, out = formulation.graph, Lowered()
    domains, variable = formulation.domains, formulation.variable
    out.stored = [domains[v][assignment[v]] if domains[v] else PARTIAL_GRAD for v in variable]
    lifted: set[int] = set()
    made: dict[object, Choice] = {}
    shared: dict[object, SharedEdit] = {}
    edits: dict[Site, list[tuple[int, CallEdit]]] = {}
    measuring = {n.template for n in graph.nodes if n.template == n.index and _measured_in(graph, n)}
    for node in graph.nodes:
        if is_leaf(node):
            continue
        operands = reads(node)
        choice = _choice(formulation, node, operands, out.stored, made)
        out.choices[node.index] = choice
        for index, conversion in zip(operands, choice.operands, strict=True):
            if conversion.move is not None and graph.nodes[index].op == "parameter":
                lifted.add(index)
        edit = _shared_edit(formulation, out, node, choice, measuring, shared)
        if edit is not None and node.call >= 0:
            edits.setdefault(graph.calls[node.call].site, []).append((node.call, edit))
        if node.op == "repeat_heads":
            _edit_repeat(formulation, node, choice, edits)
    counts = Counter(map(id, out.choices.values()))
    for choice in {id(c): c for c in out.choices.values()}.values():
        out.compute += choice.compute.times(counts[id(choice)])
        out.communication += choice.communication.times(counts[id(choice)])
    leaves = {node.fqn: node for node in graph.nodes if node.op == "parameter"}
    out.parameters = [_parameter(leaves[name], out.stored[leaves[name].index]) for name in graph.parameters]
    is_read = {index for node in graph.nodes for index in node.operands}
    same = canonical(graph) if graph.ties else {}
    roots = {same[index] for index in lifted if index in same}
    lifted |= {i for i, root in same.items() if root in roots and i not in is_read}  # names that nobody reads
    returned = list(zip(graph.output_paths, graph.outputs, strict=True))
    out.edits = ForwardEdits(
        calls=_merged_calls(formulation, edits),
        partial=frozenset(name for name in graph.parameters if out.stored[leaves[name].index] == PARTIAL_GRAD),
        lifted=frozenset(name for name in graph.parameters if leaves[name].index in lifted),
        inputs=tuple(node.fqn for node in graph.nodes if node.op == "input" and node.differentiable),
        outputs=tuple(path for path, index in returned if out.stored[index] == PARTIAL_GRAD),
        split_outputs=tuple(
            (path, returned_part(stored, formulation.whole_outputs))
            for path, index in returned
            for stored in [out.stored[index]]
            if isinstance(stored, Shard)
        ),
    )
    out.collectives = planned_collectives(
        formulation, out.stored, out.choices, out.own, out.edits.split_outputs, workload
    )
    return out


def _choice(
    formulation: Formulation, node: Node, reads: tuple[int, ...], stored: list[Stored], made: dict[object, Choice]
) -> Choice:
    """The node's choice; copies of one operator with equal placements share it."""
    setting, result = formulation.settings[node.index], stored[node.index]
    operands = [stored[i] for i in reads]
    key = (node.template, id(result), id(setting), *map(id, operands))
    found = made.get(key)
    if found is None:
        pricing, slices = formulation.pricing, formulation.slices[node.index]
        found = best_choice(formulation.graph, node, operands, result, setting, pricing, slices)
        made[key] = found
    return found


def _measured_in(graph: Graph, node: Node) -> list[Ref]:
    """The values whose lengths the node's call was given."""
    leaves = graph.calls[node.call].leaves if node.call >= 0 else ()
    found = [origin for leaf in leaves if type(leaf) is Measured for origin in leaf.origins()]
    return [origin for origin in found if isinstance(origin, Ref)]


SharedEdit = tuple[CallEdit | None, tuple[int, ...]]


def _shared_edit(
    formulation: Formulation,
    out: Lowered,
    node: Node,
    choice: Choice,
    measuring: set[int],
    shared: dict[object, SharedEdit],
) -> CallEdit | None:
    """The node's edit; copies of one operator with one choice share it, if they measure lengths of values stored
    alike. ``measuring``: the templates that measure any."""
    origins = _measured_in(formulation.graph, node) if node.template in measuring else ()
    key = (node.template, id(choice), *[id(out.stored[origin.index]) for origin in origins])
    found = shared.get(key)
    if found is None:
        found = shared[key] = _edit(formulation, out, node, choice), out.own.get(node.index, ())
    edit, reductions = found
    if reductions:
        out.own[node.index] = reductions
    return edit


def _edit(formulation: Formulation, out: Lowered, node: Node, choice: Choice) -> CallEdit | None:
    graph = formulation.graph
    call = graph.calls[node.call] if formulation.settings[node.index].editable else None
    placed = {i: c.effective for i, c in zip(reads(node), choice.operands, strict=True)}
    form = local_form(node, call, placed, choice.made)
    assert not isinstance(form, str), form
    arguments = [
        (leaf, conversion.move)
        for index, conversion in zip(reads(node), choice.operands, strict=True)
        if conversion.move is not None and graph.nodes[index].op != "parameter" and call is not None
        for leaf in leaves_of(call, index)
    ]
    parts = [CallEdit(arguments=tuple(arguments), result=choice.move)] if arguments or choice.move else []
    if form is not None:
        parts.append(form)
        reductions = own_reductions(node, form, graph.nodes)
        if reductions:
            out.own[node.index] = reductions
    if call is not None:
        read = measured_sizes(node, call, choice.made, lambda index: out.stored[index])
        parts += [read] if read is not None else []
    return merged(parts) if parts else None


def _edit_repeat(
    formulation: Formulation, node: Node, choice: Choice, edits: dict[Site, list[tuple[int, CallEdit]]]
) -> None:
    length = node.shape[node.arguments[1]] // node.arguments[2]
    keys = held_keys(choice.operands[0].effective, length, formulation.pricing.ranks)
    if keys is None or node.call < 0 or node.inner_call < 0 or isinstance(choice.made, tuple):
        return
    calls = formulation.graph.calls
    both = repeat_edits(node, calls[node.call], calls[node.inner_call], keys, choice.made)
    assert not isinstance(both, str), both
    for index, edit in zip((node.call, node.inner_call), both or (), strict=False):
        if edit != CallEdit():
            edits.setdefault(calls[index].site, []).append((index, edit))


def _merged_calls(formulation: Formulation, edits: dict[Site, list[tuple[int, CallEdit]]]) -> dict[Site, CallEdit]:
    """One edit per site; every call of a site must want the same."""
    calls_of = formulation.graph.calls_of()
    conflicts: set[object] = set()
    calls: dict[Site, CallEdit] = {}
    for site, found in edits.items():
        per_call: dict[int, list[CallEdit]] = {}
        for call, edit in found:
            per_call.setdefault(call, []).append(edit)
        try:
            merged_edits = {merged(parts) for parts in per_call.values()}
        except ValueError:
            merged_edits = set()
        if len(merged_edits) != 1 or set(per_call) != set(calls_of[site]):
            conflicts.add((site.module, site.frames))
        else:
            calls[site] = merged_edits.pop()
    if conflicts:
        raise SiteConflict(frozenset(conflicts))
    return calls


def _parameter(node: Node, stored: Stored) -> ParameterEdit:
    match stored:
        case Shard(dim, layout):
            return ParameterEdit(node.fqn, dim, layout)
        case Replicate():
            return ParameterEdit(node.fqn)
        case _:
            raise AssertionError(f"parameter {node.fqn} stored as {stored}")
