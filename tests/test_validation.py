"""Translation validation: a plan or a rewritten body that is off by one edit is refused, and by name."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache
from unittest.mock import patch

import pytest
import torch
from changed_plans import with_edits
from plain_models import IDS, Decoder

from colrow.cost_models.errors import ColrowError, Infeasible, RankError, ValidationError
from colrow.cost_models.hardware import load_hardware
from colrow.planner import Plan, plan
from colrow.planner.edits import CallEdit
from colrow.planner.layout import even, joined
from colrow.planner.moves import Move
from colrow.planner.replanning import recheck, replan
from colrow.planner.sites import Site
from colrow.planner.trace import trace
from colrow.rewrite import parallel
from colrow.rewrite.counting import count_collectives
from colrow.rewrite.groups import TpGroup
from colrow.rewrite.parallel import edit_bodies, parallelize
from colrow.rewrite.ranks import run_ranks
from colrow.rewrite.schedules import Running
from colrow.rewrite.validation import local_shapes, meta_copy, validate, with_local_shapes

TP = 2
SUM = CallEdit(result=Move("all_reduce", "identity"))
Calls = Mapping[Site, CallEdit]


@cache
def planned() -> tuple[Decoder, Plan]:
    model = Decoder(2)
    return model, plan(model, IDS, tp=TP, phase="train")


def check(made: Plan, calls: Calls) -> None:
    """Validates a body edited by ``calls`` against ``made``."""
    model, _ = planned()
    edited = with_local_shapes(model, made)
    running = Running(made.schedules)
    edit_bodies(edited, with_edits(made, calls=calls), TpGroup("none", 0, TP), running)
    validate(meta_copy(model), edited, made, running)


def sites(of: Callable[[CallEdit], object]) -> list[int]:
    """Which of the plan's edits are of a kind; the second block's are the first's again."""
    found = enumerate(planned()[1].schedules[0].edits.calls.items())
    return [n for n, (site, edit) in found if of(edit) and not site.module.startswith("blocks.1")]


EDITS = sites(lambda e: True)
MOVES = sites(lambda e: e.result)
INTEGERS = sites(lambda e: e.integers)


def without(n: int) -> tuple[Site, Calls]:
    calls = dict(planned()[1].schedules[0].edits.calls)
    site = list(calls)[n]
    del calls[site]
    return site, calls


def changed(n: int, **changes: object) -> tuple[Site, Calls]:
    calls = dict(planned()[1].schedules[0].edits.calls)
    site = list(calls)[n]
    calls[site] = replace(calls[site], **changes)
    return site, calls


def unedited() -> list[Site]:
    """Sites inside blocks that the plan leaves alone, one per operator, results not reshaped."""
    model, made = planned()
    graph = trace(model, IDS)
    found = {
        graph.calls[n.call].site: n for n in graph.nodes if n.call >= 0 and n.op in ("silu", "add", "rsqrt", "mul")
    }
    return [site for site in found if site not in made.schedules[0].edits.calls and site.module.startswith("blocks.0")]


def refused(made: Plan, calls: Calls) -> ColrowError:
    with pytest.raises(ColrowError) as caught:
        check(made, calls)
    return caught.value


def test_the_plan_itself_is_fine() -> None:
    _, made = planned()
    check(made, made.schedules[0].edits.calls)
    assert len(MOVES) == 7 and len(INTEGERS) == 2 and len(EDITS) == 9


@pytest.mark.parametrize("n", EDITS)
def test_an_edit_missing_in_the_plan(n: int) -> None:
    _, made = planned()
    site, less = without(n)
    error = refused(with_edits(made, calls=less), less)
    assert isinstance(error, ValidationError)
    if n in INTEGERS:
        assert site.module in str(error)


@pytest.mark.parametrize("n", MOVES)
def test_a_move_missing_in_the_body_is_named(n: int) -> None:
    site, less = without(n)
    error = refused(planned()[1], less)
    assert isinstance(error, ValidationError) and str(error).startswith(f"{site.module}: ")


@pytest.mark.parametrize("n", INTEGERS)
def test_a_size_left_global_in_the_body(n: int) -> None:
    refused(planned()[1], without(n)[1])


@pytest.mark.parametrize("site", unedited(), ids=lambda s: s.frames[-1].qualname)
def test_a_reduction_too_many(site: Site) -> None:
    _, made = planned()
    more = {**made.schedules[0].edits.calls, site: SUM}
    assert isinstance(refused(with_edits(made, calls=more), more), ValidationError)
    error = refused(made, more)
    assert isinstance(error, ValidationError) and "blocks." in str(error)


def test_moves_exchanged() -> None:
    """The same number of the same collectives, elsewhere."""
    _, made = planned()
    calls = dict(made.schedules[0].edits.calls)
    copies = [s for s in calls if s.module == "blocks.0.second"]
    sums = [s for s in calls if s.module == "blocks.0.mlp.down"]
    (a,), (b,) = copies, sums
    calls[a], calls[b] = calls[b], calls[a]
    assert isinstance(refused(with_edits(made, calls=calls), calls), ValidationError)
    error = refused(made, calls)
    assert isinstance(error, ValidationError) and str(error).startswith("blocks.0.second: another move than planned")


@pytest.mark.parametrize("n", MOVES)
def test_a_wrong_backward_step(n: int) -> None:
    """Right values, wrong gradients: no forward run would tell."""
    _, made = planned()
    step = list(made.schedules[0].edits.calls.values())[n].result
    assert step is not None
    other = "identity" if step.backward != "identity" else "all_reduce"
    site, calls = changed(n, result=replace(step, backward=other))
    assert isinstance(refused(with_edits(made, calls=calls), calls), ValidationError)
    error = refused(made, calls)
    assert isinstance(error, ValidationError) and str(error).startswith(f"{site.module}: ")


@pytest.mark.parametrize("n", INTEGERS)
@pytest.mark.parametrize("off", [1, -1])
def test_an_integer_changed(n: int, off: int) -> None:
    _, made = planned()
    ((leaf, whole, local),) = list(made.schedules[0].edits.calls.values())[n].integers
    site, calls = changed(n, integers=((leaf, whole, local + off),))
    assert site.module in str(refused(with_edits(made, calls=calls), calls))
    refused(made, calls)


def test_the_embedding_run_as_it_was() -> None:
    _, made = planned()
    (n,) = sites(lambda e: e.operator)
    site, calls = changed(n, operator=None)
    assert site.module in str(refused(with_edits(made, calls=calls), calls))
    assert str(refused(made, calls)).startswith("embed: another operator than planned")


def test_a_weight_cut_otherwise() -> None:
    """The same local shape, other rows: shapes alone would not tell."""
    _, made = planned()
    fused = joined((even(16, TP), even(16, TP)))
    parameters = tuple(
        replace(p, edit=replace(p.edit, layout=fused)) if p.edit.fqn == "blocks.0.mlp.up.weight" else p
        for p in made.parameters
    )
    error = refused(replace(made, parameters=parameters), made.schedules[0].edits.calls)
    assert isinstance(error, ValidationError)


def test_a_gradient_that_nobody_sums() -> None:
    _, made = planned()
    edits = made.schedules[0].edits
    wrong = with_edits(made, partial=edits.partial ^ {"blocks.0.first.weight"})
    assert isinstance(refused(wrong, edits.calls), ValidationError)


def test_another_model() -> None:
    _, made = planned()
    with pytest.raises(Infeasible, match=r"blocks\.2\..*not have the same parameters"):
        recheck(trace(Decoder(3), IDS), made, load_hardware(made.hardware))


def test_replanning_a_plan_gives_it_back_and_refuses_a_changed_one() -> None:
    model, made = planned()
    again = replan(model, IDS, made)
    assert (
        again.schedules[0].edits.calls == made.schedules[0].edits.calls
        and again.parameters == made.parameters
        and again.cost == made.cost
    )
    with pytest.raises(Infeasible):
        replan(model, IDS, with_edits(made, calls=without(MOVES[1])[1]))


def test_local_shapes_are_the_planned_ones() -> None:
    model, made = planned()
    edited = with_local_shapes(model, made)
    shapes = {p.edit.fqn: p.local_shape for p in made.parameters}
    assert {name: tuple(p.shape) for name, p in edited.named_parameters()} == shapes
    assert shapes["blocks.0.mlp.up.weight"] == (16, 16) and shapes["blocks.0.first.weight"] == (16,)
    assert all(p.is_meta for p in edited.parameters()) and not any(p.is_meta for p in model.parameters())
    graph = trace(model, IDS)
    solved = recheck(graph, made, load_hardware(made.hardware))
    up = next(n for n in graph.nodes if n.module == "blocks.0.mlp.up")
    assert local_shapes(up, solved.lowered.choices[up.index].made) == ((2, 5, 16),)


def executed(model: Decoder, made: Plan) -> Counter[tuple[str, str]]:
    """What one rank of two communicates in a training step."""

    def run() -> Counter[tuple[str, str]]:
        found = count_collectives(parallelize(copy.deepcopy(model), made), IDS, backward=True)
        return Counter((c.kind, c.direction) for c in found)

    first, second = run_ranks(run, TP)
    assert first == second
    return first


def test_counting_by_the_dispatcher_sees_a_reduction_removed_by_hand() -> None:
    model, made = planned()
    wanted = Counter((c.kind, c.direction) for c in made.collectives)
    assert executed(model, made) == wanted
    _, less = without(sites(lambda e: e.result and e.result.forward == "all_reduce")[1])
    with pytest.raises(RankError, match="the plan is not exact for this model"):
        executed(model, with_edits(made, calls=less))
    with patch.object(parallel, "validate", lambda *_: ((frozenset(trace(model, IDS).output_paths),), {})):
        assert wanted - executed(model, with_edits(made, calls=less)) == {("all_reduce", "forward"): 1}
    assert torch.isfinite(model(**IDS)).all()
