"""Plan files: read back as they were, the same bytes every time, and refused when they are not what was written."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields, replace

import pytest
import torch
from changed_plans import with_edits, with_schedule
from small_plans import BLOCKS, TP, WORKLOAD, linear_site, small_plan
from torch import nn

from colrow.cost_models.errors import PlanFileError
from colrow.planner import Plan, plan
from colrow.planner.edits import CallEdit, ForwardEdits, OperatorEdit, ParameterEdit
from colrow.planner.layout import Layout, Segment, even
from colrow.planner.moves import Move
from colrow.planner.plan_document import (
    CallEntry,
    CollectiveEntry,
    CostEntry,
    LengthEntry,
    MoveEntry,
    OperatorEntry,
    ParameterEntry,
    PlanDocument,
    ScheduleEntry,
    SegmentEntry,
)
from colrow.planner.plan_file import SCHEMA, digest_of, dumps, read
from colrow.planner.plan_model import PlannedCost, PlannedParameter, Schedule
from colrow.planner.planned_collectives import Collective
from colrow.planner.workloads import Length, Workload


def rigid(calls):
    """The same calls, with the sequence cut at the planned length only."""

    def move(one):
        layout = one.layout and replace(one.layout, elastic=False)
        return replace(one, layout=layout)

    return {
        site: replace(
            edit,
            arguments=tuple((leaf, move(one)) for leaf, one in edit.arguments),
            result=edit.result and move(edit.result),
        )
        for site, edit in calls.items()
    }


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


def real_plan(tp=TP):
    return plan(nn.Sequential(*(Block() for _ in range(4))), (torch.zeros(2, 8),), tp=tp, phase="train")


@pytest.fixture
def saved(tmp_path):
    """A saved plan and a way to change its text."""
    path = tmp_path / "plan.json"
    small_plan().save(path)

    def edit(change, signed=False):
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        return read(path, verify_digest=not signed)

    edit.path = path
    return edit


@pytest.mark.parametrize("make", [small_plan, real_plan])
def test_a_plan_is_read_back(make, tmp_path):
    made = make()
    made.save(tmp_path / "plan.json")
    back = Plan.load(tmp_path / "plan.json")
    assert back == made
    assert [p.edit.fqn for p in back.parameters] == [p.edit.fqn for p in made.parameters]
    assert back.digest == made.digest
    assert dumps(back) == dumps(made)


@pytest.mark.parametrize(
    "reorder", [reversed, lambda ps: sorted(ps, key=lambda p: p.edit.fqn), lambda ps: [*ps[3:], *ps[:3]]]
)
def test_any_order_of_parameters_is_kept(reorder, tmp_path):
    made = small_plan(parameters=tuple(reorder(small_plan().parameters)))
    made.save(tmp_path / "plan.json")
    assert read(tmp_path / "plan.json") == made


def test_the_order_of_equal_mappings_does_not_matter():
    made = small_plan()
    calls = dict(reversed(made.schedules[0].edits.calls.items()))
    backwards = replace(with_edits(made, calls=calls), assumptions=dict(reversed(made.assumptions.items())))
    assert backwards == made
    assert dumps(backwards) == dumps(made)


@pytest.mark.parametrize(
    "change",
    [
        {"name": "Other"},
        {"tp": 2, "cost": replace(small_plan().cost, proven=False)},
        {"findings": ()},
        {"schedules": small_plan().schedules[::-1]},
        {"parameters": small_plan().parameters[:-1]},
        {"ties": {}},
        {"memory_bytes": {"weights": 1}},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_is_signed(change):
    assert digest_of(small_plan(**change)) != digest_of(small_plan())


@pytest.mark.parametrize(
    "change",
    [
        {"workload": replace(WORKLOAD, weight=3.0)},
        {"workload": replace(WORKLOAD, context=9)},
        {"workload": replace(WORKLOAD, values=())},
        {"workload": replace(WORKLOAD, inputs=WORKLOAD.inputs[:1])},
        {"collectives": small_plan().collectives[1:]},
        {"cost": replace(small_plan().cost, proven=False)},
        {"lengths": (Length("ids", 1), Length("x", 2))},
        {"stands_in": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_a_schedule_is_signed(change):
    assert digest_of(with_schedule(small_plan(), **change)) != digest_of(small_plan())


@pytest.mark.parametrize(
    "change",
    [
        {"calls": {linear_site("layers.0.attn.o"): CallEdit()}},
        {"calls": rigid(small_plan().schedules[0].edits.calls)},
        {"partial": frozenset()},
        {"lifted": frozenset()},
        {"inputs": ()},
        {"outputs": ()},
        {"split_outputs": small_plan().schedules[0].edits.split_outputs[:1]},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_field_of_the_edits_is_signed(change):
    assert digest_of(with_edits(small_plan(), **change)) != digest_of(small_plan())


EDITS = {"partial": {"reads"}, "lifted": {"reads"}}
EDITS |= {"inputs": {"partial_inputs"}, "outputs": {"partial_outputs"}}
WORKLOADS = {"name": {"workload"}, "phase": set(), "inputs": {"inputs"}}  # the phase is in the name


@pytest.mark.parametrize(
    ("kind", "entry", "renamed"),
    [
        (Plan, PlanDocument, {}),
        (PlannedCost, CostEntry, {}),
        (PlannedParameter, ParameterEntry, {"is_weight": {"weight"}, "edit": {"dim", "split"}}),
        (Collective, CollectiveEntry, {}),
        (CallEdit, CallEntry, {}),
        (Move, MoveEntry, {"layout": {"split", "elastic"}}),
        (OperatorEdit, OperatorEntry, {"layout": {"split"}}),
        (Segment, SegmentEntry, {}),
        (Length, LengthEntry, {}),
        (
            Schedule,
            ScheduleEntry,
            {
                "edits": set().union(*(EDITS.get(f.name, {f.name}) for f in fields(ForwardEdits))),
                "workload": set().union(*(WORKLOADS.get(f.name, {f.name}) for f in fields(Workload))),
            },
        ),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_the_file_has_every_field(kind, entry, renamed):
    names = set().union(*(renamed.get(field.name, {field.name}) for field in fields(kind) if field.compare))
    assert set(entry.model_fields) - {"at", "parameter_order"} == names


def test_statistics_are_not_content():
    assert dumps(small_plan(statistics={"nodes": 7})) == dumps(small_plan())


def test_the_file_reads_well():
    lines = dumps(small_plan()).splitlines()
    shown = [line.strip().rstrip(",") for line in lines]
    qkv = '"placement": "column", "shape": [16, 8], "dtype": "float32", "weight": true, "dim": 0, "split": [8, 4, 4]'
    assert f'"layers.{{0-2}}.attn.qkv.weight": {{{qkv}}}' in shown
    assert '"split": [{"length": 6, "local": 4, "owned": ["0:4", "4:6"]}]' in dumps(small_plan())
    assert '"split": [{"length": 4, "local": 4, "owned": ["0:4", "0:4"]}]' in dumps(small_plan())
    assert any(line.startswith('"layers.{0-2}.attn.o": [{"at": "torch.nn.modules.linear:Linear') for line in shown)
    assert sum('"over": "layers.{' in line for line in lines) == 5  # findings; twice: backward, parameter gradients


def test_size_does_not_grow_with_depth():
    def deep(blocks):
        model = nn.Sequential(*(nn.Linear(8, 8, bias=False) for _ in range(blocks)))
        return plan(model, (torch.zeros(2, 8),), tp=1)

    assert len(dumps(deep(24))) < len(dumps(deep(6))) + 100


def test_another_process_reads_and_writes_the_same(tmp_path):
    made = real_plan()
    made.save(tmp_path / "plan.json")
    code = (
        "import sys; from pathlib import Path; from colrow.planner.plan_file import dumps, read;"
        "path = Path(sys.argv[1]); assert dumps(read(path)) == path.read_text(); print(read(path).digest)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "plan.json")], capture_output=True, text=True, cwd=tmp_path
    )
    assert ran.stdout.strip() == made.digest, ran.stderr


def test_planning_twice_gives_the_same_bytes():
    assert dumps(real_plan()) == dumps(real_plan())


# ---- refusals


def refused(path, *words, **options):
    with pytest.raises(PlanFileError) as caught:
        read(path, **options)
    message = str(caught.value)
    assert str(path) in message
    for word in words:
        assert word in message, message


def test_missing(tmp_path):
    refused(tmp_path / "no.json", "no such file", "colrow plan SOURCE --out FILE")


def test_a_folder(tmp_path):
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
def test_truncated(saved, share):
    text = saved.path.read_text()
    saved.path.write_text(text[: int(len(text) * share)])
    refused(saved.path, "truncated")


@pytest.mark.parametrize("text", ["[]", "{}", '{"schema": "colrow.hardware/1"}', "7"])
def test_not_a_plan(saved, text):
    saved.path.write_text(text)
    refused(saved.path, "not a plan", SCHEMA)


def test_bytes_that_are_no_text(saved):
    saved.path.write_bytes(b"\xff\xfe\x00")
    refused(saved.path, "not JSON")


def test_another_version(saved):
    saved.path.write_text(saved.path.read_text().replace(SCHEMA, "colrow.plan/9"))
    refused(saved.path, "another version", SCHEMA)


def test_an_edit_is_noticed(saved):
    saved.path.write_text(saved.path.read_text().replace('"nbytes": 4096', '"nbytes": 4095'))
    refused(saved.path, "edited by hand", "--from")
    edited = read(saved.path, verify_digest=False)
    assert [s.collectives[BLOCKS + 1].nbytes for s in edited.schedules] == [4095, 4095]


def test_reformatting_is_no_edit(saved):
    saved.path.write_text(json.dumps(json.loads(saved.path.read_text()), indent=7))
    assert read(saved.path) == small_plan()


def test_a_name_given_twice(saved):
    saved.path.write_text(saved.path.read_text().replace('"name": "Small",', '"name": "Small", "name": "Other",'))
    refused(saved.path, "name", "twice")


def attn_o(content):
    return content["parameters"]["layers.{0-2}.attn.o.weight"]


def odd(content):
    return content["parameters"]["odd.weight"]["split"][0]


def repeat(content):
    return next(item for item in schedule(content)["collectives"] if "over" in item)


def schedule(content):
    return content["schedules"][0]


def elastic(content):
    return schedule(content)["calls"]["."][0]["result"]


def calls(content):
    return schedule(content)["calls"]["layers.{0-2}.attn.o"]


@pytest.mark.parametrize(
    ("change", "field", "wrong"),
    [
        (lambda c: c.pop("schedules"), "schedules", "field required"),
        (lambda c: c.update(schedules=[]), "schedules", "at least 1 item"),
        (lambda c: schedule(c).pop("inputs"), "schedules.0.inputs", "field required"),
        (lambda c: schedule(c).update(speed=9), "schedules.0.speed", "extra inputs"),
        (lambda c: schedule(c).update(workload="serve"), "schedules.0.workload", "names no phase"),
        (lambda c: schedule(c)["lengths"][0].update(dim=-1), "schedules.0.lengths.0.dim", "greater than or equal"),
        (lambda c: schedule(c).update(stands_in=True), "schedules.0.stands_in", "stands in for none"),
        (lambda c: c["schedules"].pop(), "schedules.0.lengths", "no schedule stands in"),
        (lambda c: c["schedules"][1].pop("stands_in"), "schedules.0.lengths", "no schedule stands in"),
        (lambda c: schedule(c).pop("lengths"), "schedules.1.stands_in", "stands in for none"),
        (lambda c: c["schedules"].append(c["schedules"][1]), "schedules.2.stands_in", "stands in for none"),
        (
            lambda c: c["schedules"][1].update(lengths=schedule(c)["lengths"]),
            "schedules.1.lengths",
            "takes any lengths",
        ),
        (lambda c: c["schedules"][1].update(workload="decode"), "schedules.1.workload", "stands in for train"),
        (lambda c: schedule(c)["reads"].update({"layers.{0-}.x": {}}), "schedules.0.reads", "range"),
        (
            lambda c: schedule(c)["reads"].update(nothing={"lifted": True}),
            "schedules.0.reads.nothing",
            "no such parameter",
        ),
        (lambda c: elastic(c).update(elastic=1), "result.elastic", "valid boolean"),
        (lambda c: c.update(speed=9), "speed", "extra inputs"),
        (lambda c: c.update(tp="2"), "tp", "valid integer"),
        (lambda c: c.update(tp=0), "tp", "greater than or equal to 1"),
        (lambda c: attn_o(c).update(placement="rows"), "parameters.layers.{0-2}.attn.o.weight.placement", "'row'"),
        (lambda c: attn_o(c).update(spilt=[8]), "parameters.layers.{0-2}.attn.o.weight.spilt", "extra inputs"),
        (lambda c: attn_o(c).update(split=[4]), "parameters.layers.0.attn.o.weight.split", "covers 4 of a dim of 8"),
        (lambda c: attn_o(c).update(dim=2), "parameters.layers.0.attn.o.weight.split", "covers 8 of a dim of none"),
        (lambda c: attn_o(c).update(split=[]), "parameters.layers.0.attn.o.weight.split", "no segments"),
        (lambda c: attn_o(c).pop("dim"), "parameters.layers.0.attn.o.weight", "dim and split go together"),
        (lambda c: attn_o(c).update(placement="replicated"), "parameters.layers.0.attn.o.weight", "has no dim"),
        (lambda c: odd(c).update(owned=["0:6"]), "parameters.odd.weight.split.0.owned", "need 2"),
        (lambda c: odd(c).update(owned=["0:4", "4:9"]), "parameters.odd.weight.split.0.owned.1", "not within 0:6"),
        (lambda c: odd(c).update(owned=["0:6", ""]), "parameters.odd.weight.split.0.owned.0", "the local length 4"),
        (lambda c: odd(c).update(owned=["0:4", "x"]), "parameters.odd.weight.split.0.owned", "invalid literal"),
        (lambda c: repeat(c).update(over="layers"), "schedules.0.collectives", "no range"),
        (lambda c: repeat(c)["each"][0].update(kind=3), "schedules.0.collectives.5.each.0.kind", "valid string"),
        (lambda c: c.update(parameter_order="0-3"), "parameter_order", "not an order of"),
        (lambda c: schedule(c)["calls"].update({"layers.{0-}.x": []}), "schedules.0.calls", "range"),
        (lambda c: calls(c)[0].update(at="here"), "schedules.0.calls.layers.0.attn.o.0.at", "not a place"),
        (lambda c: calls(c).extend(calls(c)), "schedules.0.calls.layers.0.attn.o.1", "edited twice"),
        (lambda c: calls(c)[0]["result"].update(forward="send"), "attn.o.0.result.forward", "'all_gather'"),
    ],
)
def test_a_wrong_field_is_named(saved, change, field, wrong):
    with pytest.raises(PlanFileError) as caught:
        saved(change, signed=True)
    assert field in str(caught.value)
    assert wrong in str(caught.value).lower()
    with pytest.raises(PlanFileError):  # and unsigned edits never get that far
        read(saved.path)


def test_an_edit_of_a_layout_is_read(saved):
    def even_heads(content):
        content["parameters"]["odd.weight"]["split"] = [6]

    edited = saved(even_heads, signed=True)
    changed = next(p for p in edited.parameters if p.edit.fqn == "odd.weight")
    assert changed.edit == ParameterEdit("odd.weight", 0, even(6, TP))
    assert edited.digest != small_plan().digest


def test_layouts_that_only_look_even_are_spelled_out(tmp_path):
    swapped = Layout((Segment(8, (((4, 8),), ((0, 4),)), 4),))
    parameters = tuple(
        replace(p, edit=replace(p.edit, layout=swapped)) if p.edit.fqn == "layers.1.attn.o.weight" else p
        for p in small_plan().parameters
    )
    made = small_plan(parameters=parameters)
    made.save(tmp_path / "plan.json")
    assert read(tmp_path / "plan.json") == made
