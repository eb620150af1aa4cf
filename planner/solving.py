"""Stage 5: the workloads' problems solved, over one weight layout, and their solutions read back as edits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from colrow.cost_models.hardware import Hardware

from .bytes_per_rank import memory_of, workspace_bytes
from .factor_graph import Solution, evaluate
from .formulation import Formulation, formulate
from .graph import Graph
from .joint import integer_weights, joined, offsets_of, solve_together
from .lowering import Lowered, SiteConflict, lower
from .placement import WHOLE
from .pricing import Pricing
from .recomputation import mark_recomputed
from .site_settings import Options
from .solver import solve
from .workloads import Workload, phase_of


@dataclass(frozen=True)
class Solved:
    """One workload's problem, the solution that it is part of, and its edits."""

    formulation: Formulation
    solution: Solution
    lowered: Lowered


def pricing_of(workload: Workload, tp: int, hardware: Hardware) -> Pricing:
    return Pricing(hardware, tp, phase_of(workload.name), workload.context)


def solve_jointly(
    traced: Sequence[tuple[Workload, Graph]], tp: int, hardware: Hardware, options: Options, cap: int | None
) -> tuple[list[Solved], Options]:
    """Solves for all workloads at once; calls that would need two different edits are frozen, and it is solved
    again."""
    for w, graph in traced:
        mark_recomputed(graph, options.checkpointing == "blocks" and phase_of(w.name) == "train")
    of = [memory_of(graph, phase_of(w.name), w.context) for w, graph in traced]
    heaviest = 0
    if len(traced) > 1:
        dense = [sum(of_one(n, WHOLE).total for n in g.nodes) for of_one, (_, g) in zip(of, traced, strict=True)]
        heaviest = dense.index(max(dense))
    workload, graph = traced[heaviest]
    if cap is not None:
        options = replace(options, memory_cap=cap - workspace_bytes(graph, phase_of(workload.name)))
    weights = integer_weights([w.weight for w, _ in traced])
    while True:
        formulations = [
            formulate(
                graph,
                pricing_of(w, tp, hardware),
                options,
                lambda node, stored, of_one=of_one: of_one(node, stored).total,  # type: ignore[misc]
                penalises=n == 0,
            )
            for n, ((w, graph), of_one) in enumerate(zip(traced, of, strict=True))
        ]
        alone = len(formulations) == 1
        problem = formulations[0].problem if alone else joined(formulations, weights, heaviest)
        solution = solve(problem) if alone else solve_together(formulations, weights, problem)
        if evaluate(problem, solution.assignment) != solution.cost:
            raise AssertionError("re-pricing gives another cost than the solver")
        try:
            solved = []
            for (w, _), formulation, start in zip(traced, formulations, offsets_of(formulations), strict=True):
                assignment = solution.assignment[start : start + len(formulation.problem.sizes)]
                solved.append(Solved(formulation, solution, lower(formulation, assignment, w.name)))
            return solved, options
        except SiteConflict as conflict:
            if not conflict.sites - options.frozen:
                raise
            options = replace(options, frozen=options.frozen | conflict.sites)
