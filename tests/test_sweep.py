"""`colrow sweep`: what it predicts, where it crosses over, and what it says in the end."""

from __future__ import annotations

import json
from dataclasses import replace
from functools import cache

import pytest
import torch
from click.testing import CliRunner
from torch import nn

from colrow.cost_models.hardware import load_hardware
from colrow.planner import Plan, plan
from colrow.planner.plan_model import PlannedCost
from colrow.rewrite.cli import main
from colrow.rewrite.sweep_command import charts_of
from colrow.rewrite.sweep_crossovers import crossovers, difference
from colrow.rewrite.sweep_points import Axes, Point, Setting, sweep_points, without_repeats
from colrow.rewrite.sweep_verdict import efficiency, verdict

L40S, H100 = load_hardware("l40s-pcie"), load_hardware("h100-sxm")
FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def small():
    return nn.Sequential(Block(16), Block(16)), (torch.randn(8, 16),)

def large():
    with torch.device("meta"):
        return nn.Sequential(Block(8192), Block(8192)), (torch.empty(4096, 8192, device="cpu"),)
"""
SMALL, LARGE = "sweep_models:small", "sweep_models:large"


@pytest.fixture
def colrow(cwd):
    (cwd / "sweep_models.py").write_text(FACTORY)

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, ["sweep", *map(str, arguments)])
        assert result.exit_code == code, result.output
        return result

    return run


@cache
def planned() -> Plan:
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16))
    return plan(model, (torch.randn(8, 16),), tp=2)


def point(tp=1, compute=1.0, comm=0.0, *, hardware="l40s-pcie", batch=1, seq=8, speed=1.0, fits=True, **more):
    cost = PlannedCost(compute + comm, compute, comm, compute + comm, True)
    made = replace(planned(), tp=tp, cost=cost)
    parts = {"empty_s": 0.0, "transfer_s": comm, "tokens": 8} | more
    return Point(Setting(hardware, speed, batch, seq, tp), made, "", fits, **parts)


# ---- points


def test_every_combination_is_planned_and_its_parts_sum_to_the_total(colrow):
    found = json.loads(colrow(LARGE, "--tp", "1,2,4", "--hardware", "h100-sxm,l40s-pcie", "--json").stdout)
    assert found["schema"] == "colrow.sweep/1"
    points = {(p["hardware"], p["tp"]): p for p in found["points"]}
    assert set(points) == {(name, tp) for name in ("h100-sxm", "l40s-pcie") for tp in (1, 2, 4)}
    for (_, tp), p in points.items():
        assert p["step_s"] == pytest.approx(p["compute_s"] + p["comm_s"])
        parts = p["comm_latency_s"] + p["comm_transfer_s"] + p["comm_local_moves_s"]
        assert parts == pytest.approx(p["comm_s"], rel=1e-6)
        assert p["tokens_per_s"] == pytest.approx(4096 / p["step_s"])
        assert (p["comm_s"] == 0) == (p["ratio"] == 0) == (tp == 1)
        assert p["efficiency"] == pytest.approx(points[p["hardware"], 1]["step_s"] / p["step_s"] / tp)
        assert p["proven"] is True
    slow, fast = points["l40s-pcie", 4], points["h100-sxm", 4]
    assert slow["ratio"] > 1 > fast["ratio"]


def test_r_is_one_at_the_link_speed_it_names(colrow):
    first = json.loads(colrow(LARGE, "--tp", 4, "--hardware", "l40s-pcie", "--json").stdout)["points"][0]
    speed = first["link_speed_where_ratio_is_one"]
    again = json.loads(colrow(LARGE, "--tp", 4, "--hardware", "l40s-pcie", "--link-speed", speed, "--json").stdout)
    assert again["points"][0]["ratio"] == pytest.approx(1, rel=1e-3)
    assert again["points"][0]["link_speed_where_ratio_is_one"] == pytest.approx(speed, rel=1e-3)


def test_what_does_not_fit_is_predicted_all_the_same_and_said(colrow):
    ran = colrow(LARGE, "--tp", "1,2,4", "--memory-gb", 3)
    assert "does not fit" in ran.stdout
    found = json.loads(colrow(LARGE, "--tp", "1,2,4", "--memory-gb", 3, "--json").stdout)
    fits = [p["fits"] for p in found["points"]]
    assert fits == [p["memory_bytes"] <= 3e9 for p in found["points"]]
    assert True in fits
    assert False in fits
    assert found["verdicts"][0]["tp"] in [p["tp"] for p in found["points"] if p["fits"]]


def test_a_group_that_a_profile_has_no_link_for_is_a_row_with_the_reason(colrow):
    found = json.loads(colrow(SMALL, "--tp", "2,16", "--hardware", "gloo-cpu", "--json").stdout)
    assert found["points"][0]["refusal"] is None
    assert "gloo-cpu" in found["points"][1]["refusal"]
    page = colrow(SMALL, "--tp", "2,16", "--hardware", "gloo-cpu").stdout
    assert "No plan at tp 16 on gloo-cpu: hardware gloo-cpu: the group is larger than a node" in page


def test_a_models_batch_and_length_are_those_asked_for():
    axes = Axes((1, 2), (1, 2), (16, 32), (H100,))
    points = list(sweep_points("hf:gpt2", "decode", "bf16", replace(axes, batch=(2,), seq=(16,))))
    assert [(p.setting.batch, p.setting.seq, p.setting.tp, p.tokens) for p in points] == [(2, 16, 1, 2), (2, 16, 2, 2)]


def test_axes_are_sorted_and_without_repeats():
    axes = without_repeats(Axes((8, 1, 8), (2, 1), (5,), (L40S, H100, L40S), (1.0, 0.5)))
    assert (axes.tp, axes.batch, axes.link_speed, axes.hardware) == ((1, 8), (1, 2), (0.5, 1.0), (L40S, H100))


# ---- crossovers


def test_r_crossing_one_is_found_and_placed_between():
    points = [point(8, 1.0, comm, batch=batch) for batch, comm in ((1, 4.0), (4, 1.0 / 4), (16, 0.1))]
    (found,) = [c for c in crossovers(points) if c.what == "ratio"]
    assert (found.axis, found.before.batch, found.after.batch) == ("batch", 1, 4)
    assert found.at == pytest.approx(2.0)


@pytest.mark.parametrize("axis", ["batch", "seq", "link_speed"])
def test_a_plan_that_changes_is_found_along_every_axis(axis):
    one = point(2, 1.0, 0.5)
    other = replace(one, setting=replace(one.setting, **{axis: 64}))
    assert crossovers([one, other]) == []
    assert other.plan is not None
    other_parameter = replace(other.plan.parameters[0], placement="vocab")
    changed = replace(other, plan=replace(other.plan, parameters=(other_parameter, *other.plan.parameters[1:])))
    (found,) = crossovers([one, changed])
    assert (found.axis, found.what, found.at) == (axis, "plan", None)
    assert "-> vocab" in found.change


def test_another_tp_or_machine_is_no_change_of_plan():
    one = point(2, 1.0, 0.5)
    other_parameter = replace(one.plan.parameters[0], placement="vocab")
    changed = replace(one.plan, parameters=(other_parameter, *one.plan.parameters[1:]))
    assert difference(one.plan, changed)
    assert crossovers([one, replace(one, plan=changed, setting=replace(one.setting, tp=4))]) == []
    assert crossovers([one, replace(one, plan=changed, setting=replace(one.setting, hardware="h100-sxm"))]) == []


# ---- the verdict


def test_the_fastest_is_used_and_its_efficiency_said():
    said = verdict([point(1, 8.0), point(2, 4.0, 0.2), point(4, 2.0, 0.4), point(8, 1.0, 3.0)], L40S)
    assert (said.tp, said.pays) == (4, True)
    assert "Use tp 4: 3.33x as fast as tp 1" in said.words
    assert "efficiency 83%" in said.words
    assert "tp 8 takes 1.67x as long (R = 3)" in said.words


def test_a_few_percent_are_not_worth_twice_the_ranks():
    assert verdict([point(1, 8.0), point(2, 4.0, 0.2), point(4, 2.0, 2.1)], L40S).tp == 2


def test_latency_bought_with_throughput_is_said():
    words = verdict([point(1, 8.0), point(8, 1.0, 2.0)], L40S).words
    assert "as 8 copies of tp 1 the same ranks do 3.0x as much per second" in words


def test_it_does_not_pay_because_the_step_is_small():
    said = verdict([point(1, 1e-3), point(2, 5e-4, 9e-4, empty_s=8e-4, transfer_s=1e-4)], L40S)
    assert (said.tp, said.pays) == (1, False)
    assert "does not pay here: use tp 1. It fits on one GPU" in said.words
    words = "too small: 1.00 ms of compute, and at tp 2 its collectives take 900 us, the latency alone 800 us;"
    assert words in said.words


def test_a_fast_link_is_not_blamed_for_small_messages():
    small = point(2, 5e-4, 9e-4, empty_s=1e-4, transfer_s=8e-4, bulk_s=1e-4)
    assert "too small" in verdict([point(1, 1e-3), small], H100).words
    large = replace(small, bulk_s=6e-4)
    assert "The link is too slow for it (NVSwitch, 450 GB/s a rank)" in verdict([point(1, 1e-3), large], H100).words


def test_it_does_not_pay_because_the_link_is_slow():
    said = verdict([point(1, 1.0), point(2, 0.4, 2.0, empty_s=0.1, transfer_s=1.9, bulk_s=1.8)], L40S)
    assert (said.tp, said.pays) == (1, False)
    assert "The link is too slow for it (" in said.words
    assert "PCIe" in said.words
    assert "it would break even at 3.8x its bandwidth" in said.words  # 0.5 s are left for 1.9 s of bytes
    late = verdict([point(1, 1.0), point(2, 0.4, 2.0, empty_s=0.7, transfer_s=1.3, bulk_s=1.2)], L40S)
    assert "no bandwidth would make up for the latency" in late.words


def test_memory_may_ask_for_more_ranks_than_time_does():
    said = verdict([point(1, 1.0, fits=False), point(2, 0.6, 1.0), point(4, 0.3, 3.0)], L40S)
    assert (said.tp, said.pays) == (2, False)
    assert "The model needs tp 2" in said.words
    assert "pays no further than memory asks here: use tp 2. It fits on 2 ranks" in said.words


def test_nothing_fits():
    said = verdict([point(1, 1.0, fits=False), point(2, 0.6, 1.0, fits=False)], L40S)
    assert said.tp is None
    assert "Nothing fits: tp 1 needs" in said.words


def test_what_crossing_nodes_costs_is_said(colrow):
    words = colrow(LARGE, "--tp", "8,16", "--hardware", "h100-sxm").stdout
    words = " ".join(words.split())
    assert "tp 16 spans 2 nodes and takes" in words
    assert words.count("(by formula, not measured: expect more)") == 2
    spread = verdict([point(8, 1.0, 1.0, hardware="h100-sxm", two_nodes_s=6.0)], H100).words
    assert "tp 8 would take 6.00 s, 3.00x as long (by formula, not measured: expect more)." in spread
    known = verdict([point(8, 1.0, 1.0, hardware="h100-sxm", two_nodes_s=6.0, two_nodes_measured=True)], H100).words
    assert "would take 6.00 s, 3.00x as long." in known
    alone = verdict([point(1, 1.0), point(2, 0.9, 0.3, two_nodes_s=3.6)], H100)
    assert alone.tp == 1
    assert "Spread over two nodes, tp 2 would take 3.60 s, 3.00x as long" in alone.words


def test_efficiency_is_speed_per_rank():
    assert efficiency(point(4, 1.0, 1.0), point(2, 3.0)) == pytest.approx(0.75)


# ---- the answer


def test_the_page_has_a_table_charts_crossovers_and_words(colrow, cwd):
    pytest.importorskip("matplotlib")
    ran = colrow(LARGE, "--tp", "1,2,8", "--hardware", "l40s-pcie", "--link-speed", "1,100", "--out", "sweep.svg")
    for words in (
        "R = 1 at",
        "Step time on l40s-pcie",
        "Crossovers",
        "R crosses one between tp",
        "In short, on l40s-pcie",
    ):
        assert words in ran.stdout
    heads = next(line for line in ran.stdout.splitlines() if "tokens/s" in line)
    assert [head for head in ("R", "R = 1 at", "memory", "efficiency") if f"  {head}  " in heads] == [
        "R",
        "R = 1 at",
        "memory",
        "efficiency",
    ]
    assert (cwd / "sweep.svg").read_text().startswith("<?xml")


def test_charts_are_of_what_varies():
    points = [point(tp, 1.0 / tp, 0.1 * (tp - 1), batch=batch) for batch in (1, 4) for tp in (1, 2)]
    titles = [chart.title for chart in charts_of(points, "prefill")]
    assert titles == ["Step time on l40s-pcie", "R = T_comm / T_comp on l40s-pcie, length 8"]
    assert charts_of(points[:1], "prefill") == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--tp", "1,two"], "not a list of positive numbers"),
        (["--tp", "0,2"], "not a list of positive numbers"),
        (["--link-speed", "inf"], "not a list of positive numbers"),
        (["--hardware", "h100-sxm,tpu"], "unknown profile"),
        (["--phase", "warmup"], "warmup"),
        (["--out", "x.gif"], "need .png or .svg"),
    ],
)
def test_wrong_use_exits_2(colrow, arguments, words):
    result = colrow(SMALL, *arguments, code=2)
    assert words in result.stderr
    assert result.stdout == ""
