"""Stage 6: a solved graph -> edits of parameters and calls, and the collectives they cause."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal

from .call_record import Measured
from .edits import CallEdit, ForwardEdits, ParameterEdit
from .formulation import Formulation
from .graph import Graph, Node, Ref, numel
from .head_groups import held_keys, repeat_edits
from .local_operators import leaves_of, local_form, measured_sizes, merged, own_reductions
from .moves import COMMUNICATES, Move
from .placement import PARTIAL, PARTIAL_GRAD, WHOLE, Partial, Replicate, Shard
from .pricing import Cost
from .returned_values import returned_part
from .roles import canonical
from .rules.pointwise import JOINT
from .sites import Site
from .storing import Stored
from .strategies import Choice, apply_rule, best_choice, is_leaf, reads

Category = Literal["block", "statistic", "parameter_gradient", "embedding", "head", "loss"]


@dataclass(frozen=True)
class Collective:
    """One collective of one step.

    Attributes:
        kind: all_reduce, all_gather, reduce_scatter.
        nbytes: Of the whole buffer over all ranks.
        direction: forward or backward.
        workload: The workload's name.
        site: Path of the module whose forward makes the value.
        block: The outermost block; "" outside.
        forced_by: The operator that needs it, and its module.
        category: What it is for.
        bucket: The block whose gradients it sums, for parameter gradients.
        seconds_ps: Predicted picoseconds.
    """

    kind: str
    nbytes: int
    direction: str
    workload: str
    site: str
    block: str
    forced_by: str
    category: Category
    bucket: str = ""
    ps: int = 0


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
    out.collectives = _collectives(formulation, out, workload)
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


def _collectives(formulation: Formulation, out: Lowered, workload: str) -> list[Collective]:
    graph, pricing = formulation.graph, formulation.pricing
    block_of = graph.block_of()
    users = graph.users()
    hidden = formulation.hidden
    in_blocks = [n.index for n in graph.nodes if not is_leaf(n) and block_of(n.module)]
    first, last = (min(in_blocks), max(in_blocks)) if in_blocks else (0, len(graph.nodes))
    forward: list[Collective] = []
    backward: list[Collective] = []
    linear: dict[object, bool] = {}

    def category(node: Node, nbytes: int) -> Category:
        if not block_of(node.module):
            if in_blocks and node.index < first:
                return "embedding"
            if in_blocks and node.index > last:
                return "head"
            if _from_embedding(formulation, node):
                return "embedding"
        return "statistic" if hidden and nbytes * 8 <= hidden else "block"

    for index, choice in out.choices.items():
        node = graph.nodes[index]
        for nbytes in out.own.get(index, ()):
            ps = pricing.collective("all_reduce", nbytes)
            at, why = (node.module, block_of(node.module)), f"{node.op} of split classes"
            forward.append(Collective("all_reduce", nbytes, "forward", workload, *at, why, "loss", "", ps))
        if choice.move is None:
            continue
        step = choice.move
        nbytes = _moved_bytes(node, step)
        for kind, direction, into in ((step.forward, "forward", forward), (step.backward, "backward", backward)):
            if kind not in COMMUNICATES or (direction == "backward" and not node.differentiable):
                continue
            forced = (
                _forced_by(graph, node, out.choices[index].made, users, linear)
                if direction == "forward"
                else f"gradient of {_named(node)}"
            )
            ps = pricing.collective(kind, nbytes)
            into.append(
                Collective(
                    kind,
                    nbytes,
                    direction,
                    workload,
                    node.module,
                    block_of(node.module),
                    forced,
                    category(node, nbytes),
                    "",
                    ps,
                )
            )
    for path, step in out.edits.split_outputs:
        node = graph.nodes[graph.outputs[graph.output_paths.index(path)]]
        if step.forward == "all_gather":
            nbytes = _moved_bytes(node, step)
            ps = pricing.collective("all_gather", nbytes)
            at, why = (node.module, block_of(node.module)), "the model's output"
            forward.append(Collective("all_gather", nbytes, "forward", workload, *at, why, "head", "", ps))
    return forward + list(reversed(backward)) + _parameter_gradients(formulation, out, workload, block_of)


def _moved_bytes(node: Node, step: Move) -> int:
    """Of the whole buffer over all ranks, padding included."""
    layout = step.layout
    return node.nbytes if layout is None else node.nbytes * layout.local * layout.ranks // layout.size


def _parameter_gradients(
    formulation: Formulation, out: Lowered, workload: str, block_of: Callable[[str], str]
) -> list[Collective]:
    """One reduction per block and dtype of the gradients that are partial."""
    buckets: dict[tuple[str, object], int] = {}
    for node in formulation.graph.nodes:
        if node.op != "parameter" or node.fqn in formulation.graph.ties:
            continue
        stored = out.stored[node.index]
        replicas = isinstance(stored, Shard) and stored.layout.is_replicated
        if stored == PARTIAL_GRAD or replicas:
            key = (block_of(node.fqn), node.dtype)
            buckets[key] = buckets.get(key, 0) + numel(node.shape) * node.dtype.itemsize
    found = []
    for (block, _), nbytes in buckets.items():
        ps = formulation.pricing.collective("all_reduce", nbytes)
        found.append(
            Collective(
                "all_reduce",
                nbytes,
                "backward",
                workload,
                block,
                block,
                "partial gradients of replicated parameters",
                "parameter_gradient",
                block,
                ps,
            )
        )
    return found


def _from_embedding(formulation: Formulation, node: Node) -> bool:
    """Whether the value was looked up, with nothing but elementwise work since."""
    graph, frontier, steps = formulation.graph, [node.index], 0
    while frontier and steps < 32:
        value = graph.nodes[frontier.pop()]
        steps += 1
        if value.op == "embedding":
            return True
        if value.shape == node.shape and not is_leaf(value):
            frontier += [
                i for i in value.operands if graph.nodes[i].shape == node.shape or graph.nodes[i].op == "embedding"
            ]
    return False


def _forced_by(graph: Graph, node: Node, made: Stored, users: list[list[int]], linear: dict[object, bool]) -> str:
    """The operator that needs the move: for a partial sum the first that is not linear in it, else the first reader.

    ``linear`` remembers which operators are; copies are what their templates are.
    """
    frontier, seen = [node.index], {node.index}
    while frontier:
        value = frontier.pop(0)
        for reader in users[value]:
            other = graph.nodes[reader]
            if reader in seen:
                continue
            seen.add(reader)
            if not isinstance(made, Partial):
                return _named(other)
            operands = reads(other)
            key = (other.template, operands.index(value))
            if key not in linear:
                joins = other.op in JOINT
                placed: dict[int, Stored] = {i: PARTIAL if i == value or joins else WHOLE for i in operands}
                linear[key] = apply_rule(graph, other, placed) == PARTIAL
            if not linear[key]:
                return _named(other)
            frontier.append(reader)
    return "the model's output"


def _named(node: Node) -> str:
    return f"{node.op} in {node.module}" if node.module else node.op
