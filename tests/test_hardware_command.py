"""`colrow hardware`: profiles, how well each is known, and the curves of one."""

from __future__ import annotations

import json
from importlib import resources

import pytest
from click.testing import CliRunner

from colrow.cost_models.communication import COLLECTIVE_KINDS
from colrow.cost_models.hardware import hardware_names, load_hardware
from colrow.rewrite.cli import main
from colrow.rewrite.hardware_command import charts_of


def colrow(*arguments, code=0):
    result = CliRunner().invoke(main, ["hardware", *map(str, arguments)])
    assert result.exit_code == code, result.output
    return result


def test_the_list_has_every_profile():
    printed = colrow().stdout
    found = json.loads(colrow("--json").stdout)
    assert found["schema"] == "colrow.hardware_list/1"
    assert [profile["name"] for profile in found["profiles"]] == hardware_names()
    assert all(name in printed for name in hardware_names())


def test_a_profile_says_what_is_measured_and_what_is_structural():
    found = {profile["name"]: profile for profile in json.loads(colrow("--json").stdout)["profiles"]}
    for name, profile in found.items():
        groups = [g for kind in COLLECTIVE_KINDS for g in getattr(load_hardware(name).collectives, kind).groups]
        assert profile["measured_curves"] == sum(group.basis == "measured" for group in groups)
        assert profile["measured_curves"] + profile["structural_curves"] == len(groups)
        assert (profile["left_out_median_rel_error"] is None) == (profile["basis"] == "structural")
        assert (profile["basis"] == "structural") == (profile["measured_curves"] == 0)


def test_show_has_a_chart_a_source_and_an_error_for_every_kind():
    printed = colrow("show", "a100-sxm").stdout
    profile = load_hardware("a100-sxm")
    assert profile.source.split()[0] in printed
    for kind in COLLECTIVE_KINDS:
        assert f"{kind} on a100-sxm" in printed
    for group in profile.collectives.all_reduce.groups:
        assert f"{group.size} ranks: {group.basis}" in printed


@pytest.mark.parametrize("name", hardware_names())
def test_every_implementation_has_a_chart_of_its_own_with_distinct_marks(name):
    profile = load_hardware(name)
    charts = charts_of(profile)
    assert len(charts) == sum(len(profile.implementations(kind)) for kind in COLLECTIVE_KINDS)
    assert len({chart.title for chart in charts}) == len(charts)
    for chart in charts:
        marks = [curve.mark for curve in chart.curves]
        assert len(set(marks)) == len(marks)
    shown = [len(getattr(profile.collectives, kind).alternatives) for kind in COLLECTIVE_KINDS]
    printed = colrow("show", name).stdout
    for other in profile.collectives.all_reduce.alternatives:
        assert f"all_reduce by {other.name} on {name}" in printed
    assert sum(shown) == len(charts) - len(COLLECTIVE_KINDS)


def test_show_in_json_has_the_curves_and_marks_what_is_beyond_the_measurements():
    found = json.loads(colrow("show", "h100-sxm", "--json").stdout)
    assert found["schema"] == "colrow.hardware_show/1"
    profile = load_hardware("h100-sxm")
    curves = {(c["kind"], c["size"], c["implementation"]): c["points"] for c in found["curves"]}
    assert {kind for kind, _, _ in curves} == set(COLLECTIVE_KINDS)
    for point in curves["all_reduce", 8, "library"]:
        assert point["seconds"] == profile.collective_s("all_reduce", point["bytes"], 8)
        assert (point["finding"] == "") == profile.predicts_within("all_reduce", point["bytes"], 8)
    assert {point["finding"] == "" for point in curves["all_reduce", 8, "library"]} == {True, False}
    assert all("2 nodes by formula" in point["finding"] for point in curves["all_reduce", 16, "library"])
    for other in profile.collectives.all_reduce.alternatives:
        first = curves["all_reduce", other.groups[0].size, other.name][9]
        assert first["seconds"] == profile.collective_s("all_reduce", first["bytes"], other.groups[0].size, other.name)


@pytest.mark.parametrize("name", hardware_names())
def test_every_profile_is_shown(name):
    printed = colrow("show", name).stdout
    assert all(f"{kind} on {name}" in printed for kind in COLLECTIVE_KINDS)


def test_show_takes_a_file_and_draws(cwd):
    pytest.importorskip("matplotlib")
    text = (resources.files("colrow.cost_models") / "profiles" / "gloo-cpu.json").read_text()
    (cwd / "mine.json").write_text(text.replace('"name": "gloo-cpu"', '"name": "mine"'))
    ran = colrow("show", "mine.json", "--out", "mine.svg")
    assert "all_reduce on mine" in ran.stdout
    assert "charts written to mine.svg" in ran.stderr
    drawn = (cwd / "mine.svg").read_text()
    assert drawn.startswith("<?xml")
    assert "<!-- not measured -->" in drawn  # what dotted lines are


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["show", "tpu"], "unknown profile; got 'tpu'"),
        (["show", "nothing.json"], "cannot read the hardware profile"),
        (["show", "gloo-cpu", "--out", "x.gif"], "need .png or .svg"),
        (["show", "gloo-cpu", "--out", "no/such/x.png"], "no such folder"),
    ],
)
def test_wrong_use_exits_2_in_one_line(cwd, arguments, words):
    result = colrow(*arguments, code=2)
    assert words in result.stderr
    assert (result.stdout, result.stderr.count("\n")) == ("", 1)
