"""The command line: answers on stdout, the rest on stderr, exit codes, and no torch before a command runs."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib import resources
from importlib.metadata import version

import pytest
from click.testing import CliRunner
from small_plans import small_plan

from colrow.cost_models.errors import Infeasible, MemoryCapError
from colrow.planner import Plan
from colrow.planner.plan_file import dumps, read
from colrow.rewrite import commands
from colrow.rewrite.cli import main

FACTORY = """
import torch
from torch import nn

class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(8, 32), nn.Linear(32, 8)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))

def mlp():
    return nn.Sequential(Block(), Block()), (torch.randn(4, 8),)

def other():
    return nn.Sequential(Block(), Block()), (torch.randn(5, 8),)

def sequence():
    return nn.Sequential(nn.LayerNorm(8), Block(), nn.LayerNorm(8), Block()), (torch.randn(2, 4, 8),)

def broken():
    raise RuntimeError("out of order")
"""
SOURCE = "cli_models:mlp"


@pytest.fixture
def colrow(cwd):
    """Runs the command line in an empty folder that holds a module of small models."""
    (cwd / "cli_models.py").write_text(FACTORY)

    def run(*arguments, code=0):
        result = CliRunner().invoke(main, [str(a) for a in arguments])
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture
def saved(cwd):
    small_plan().save(cwd / "plan.json")
    return cwd / "plan.json"


# ---- without a command's work


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["plan"],
        ["show"],
        ["check"],
        ["verify"],
        ["run"],
        ["hardware"],
        ["hardware", "show"],
        ["sweep"],
        ["calibrate"],
    ],
)
def test_help_does_not_import_torch(arguments):
    code = (
        "import sys; from colrow.rewrite.cli import main; main([*sys.argv[1:], '--help'], standalone_mode=False);"
        "sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)) * 9)"
    )
    ran = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert "Usage:" in ran.stdout


def test_version(colrow):
    assert colrow("--version").stdout.split()[-1] == version("colrow")


CONTRACT = {
    "plan": "--tp --phase --batch --seq --context --dtype --hardware --memory-gb --sequence-parallel --replicate --pin "
    "--checkpointing --from --out --json",
    "show": "--json",
    "check": "--max-all-reduces --max-all-reduces-per-block --max-bytes --direction --min-sharded --require-proven "
    "--json",
    "verify": "--tp --plan --small --ranks --json",
    "run": "--tp --plan --prompt-ids --tokens",
    "sweep": "--tp --batch --seq --hardware --link-speed --phase --dtype --sequence-parallel --memory-gb --out --json "
    "--checkpointing",
    "calibrate": "--ranks --out --json",
    "hardware": "--json",
}


@pytest.mark.parametrize("command", CONTRACT)
def test_the_options_are_those_of_the_contract(command):
    options = {name for parameter in main.commands[command].params for name in parameter.opts if name.startswith("--")}
    assert options - {"--debug"} == set(CONTRACT[command].split())


@pytest.mark.parametrize(
    "arguments",
    [
        ["plot"],
        ["plan"],
        ["plan", SOURCE, "--tp", "0"],
        ["plan", SOURCE, "--tp", "two"],
        ["plan", SOURCE, "--phase", "warmup"],
        ["plan", SOURCE, "--memory-gb", "0"],
        ["plan", SOURCE, "--pin", "lm_head"],
        ["plan", SOURCE, "--pin", "lm_head=diagonal"],
        ["plan", SOURCE, "--from", "x.json", "--tp", "2"],
        ["check", "plan.json", "--min-sharded", "1.5"],
        ["check", "plan.json", "--direction", "both"],
        ["verify", SOURCE],
        ["run", SOURCE],
        ["run", SOURCE, "--tp", "2", "--prompt-ids", "1,b"],
    ],
    ids=" ".join,
)
def test_wrong_use_exits_2(colrow, arguments):
    assert colrow(*arguments, code=2).stdout == ""


# ---- plan and show


def test_plan_prints_and_writes_a_plan(colrow, cwd):
    result = colrow("plan", SOURCE, "--tp", 2, "--phase", "train", "--out", "plan.json")
    assert "Sequential on 2 ranks of h100-sxm" in result.stdout
    assert "plan written to plan.json" in result.stderr
    assert [path.name for path in cwd.glob("plan*")] == ["plan.json"]
    assert colrow("show", "plan.json").stdout == result.stdout


def test_the_same_input_gives_the_same_file(colrow, cwd):
    for name in ("a", "b"):
        colrow("plan", SOURCE, "--tp", 2, "--out", name)
    assert (cwd / "a").read_bytes() == (cwd / "b").read_bytes()


def test_json_is_the_whole_of_stdout(colrow, cwd):
    printed = json.loads(colrow("plan", SOURCE, "--tp", 2, "--out", "plan.json", "--json").stdout)
    plan = Plan.load(cwd / "plan.json")
    assert printed["schema"] == "colrow.show/1"
    assert printed["layers"] == dict(plan.layers)
    assert printed["digest"] == plan.digest
    assert len(printed["collectives"]) == len(plan.collectives) > 0
    assert printed["schedules"][0]["collectives"] == printed["collectives"]
    assert json.loads(colrow("show", "plan.json", "--json").stdout) == printed


def test_json_has_what_stands_in_and_when(colrow, saved):
    plan = small_plan()
    split, whole = json.loads(colrow("show", saved, "--json").stdout)["schedules"]
    assert [s["workload"] for s in (split, whole)] == ["train", "train"]
    assert split["lengths"] == [{"input": "ids", "dim": 1, "exactly": None}, {"input": "x", "dim": 2, "exactly": 8}]
    assert whole["stands_in"] and not whole["lengths"] and not split["stands_in"]
    assert [s["cost"]["total_s"] for s in (split, whole)] == [s.cost.total_s for s in plan.schedules]
    assert [s["collectives"][0]["kind"] for s in (split, whole)] == ["reduce_scatter", "all_reduce"]


def test_options_reach_the_planner(colrow, cwd, monkeypatch):
    seen = {}

    def fake(model, inputs, **options):
        seen.update(options)
        return small_plan()

    monkeypatch.setattr(commands, "make_plan", fake)
    options = "--tp 4 --phase decode --context 9 --hardware l40s-pcie --memory-gb 3.5 --replicate auto"
    pins = "--pin *.up=column --pin a=b=row --sequence-parallel auto"
    colrow("plan", SOURCE, *options.split(), *pins.split())
    hardware = seen.pop("hardware")
    assert hardware.name == "l40s-pcie"
    assert seen == {
        "tp": 4,
        "phase": "decode",
        "context": 9,
        "sequence_parallel": "auto",
        "checkpointing": "none",
        "replicate": "auto",
        "memory_gb": 3.5,
        "pin": {"*.up": "column", "a=b": "row"},
    }


def test_without_tp_the_smallest_that_fits_is_named_and_used(colrow, monkeypatch):
    tried = []

    def fake(model, inputs, tp, **options):
        tried.append(tp)
        if tp < 4:
            raise MemoryCapError("model", "does not fit", need="tp >= 4")
        return small_plan(tp=tp)

    monkeypatch.setattr(commands, "make_plan", fake)
    first, rest = colrow("plan", SOURCE, "--memory-gb", 5).stdout.split("\n", 1)
    assert first == "smallest tp that fits 5 GB per rank: 4"
    assert "on 4 ranks" in rest
    assert tried == [1, 4]
    quiet = colrow("plan", SOURCE, "--json")
    assert json.loads(quiet.stdout)["tp"] == 4
    assert "80 GB per rank: 4" in quiet.stderr


def test_no_tp_fits(colrow, monkeypatch):
    def fake(*_, **__):
        raise MemoryCapError("model", "does not fit", need="a smaller batch or more memory")

    monkeypatch.setattr(commands, "make_plan", fake)
    assert "a smaller batch" in colrow("plan", SOURCE, code=1).stderr


def test_one_rank_is_enough_for_a_small_model(colrow):
    assert colrow("plan", SOURCE).stdout.startswith("smallest tp that fits 80 GB per rank: 1\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nothing:here"], "cannot be imported"),
        (["missing.json"], "no such file"),
        (["cli_models:broken"], "out of order"),
        ([SOURCE, "--hardware", "tpu"], "unknown profile"),
        ([SOURCE, "--tp", "2", "--out", "no/such/plan.json"], "no such folder"),
        ([SOURCE, "--tp", "2", "--pin", "nowhere=row"], "no parameter of the model has such a path"),
    ],
)
def test_unusable_input_exits_2_in_one_line(colrow, arguments, words):
    result = colrow("plan", *arguments, code=2)
    assert words in result.stderr
    assert result.stderr.startswith("colrow: ")
    assert result.stderr.count("\n") == 1
    assert result.stdout == ""


# ---- --from


@pytest.fixture
def edited(colrow, cwd):
    """Writes a plan with some text replaced, as a hand edit."""
    colrow("plan", SOURCE, "--tp", 2, "--phase", "train", "--out", "plan.json")

    def edit(old, new):
        text = (cwd / "plan.json").read_text()
        assert old in text
        (cwd / "edited.json").write_text(text.replace(old, new))
        return "edited.json"

    return edit


def test_an_edited_plan_is_refused_until_it_is_signed_again(colrow, cwd, edited):
    file = edited('"hardware": "h100-sxm"', '"hardware": "a100-sxm"')
    assert "edited by hand" in colrow("show", file, code=2).stderr
    colrow("plan", SOURCE, "--from", file, "--out", "signed.json")
    before, after = read(cwd / "plan.json"), read(cwd / "signed.json")
    assert (after.hardware, after.parameters) == ("a100-sxm", before.parameters)
    assert [s.edits for s in after.schedules] == [s.edits for s in before.schedules]
    assert after.cost.total_s > before.cost.total_s  # priced again


def test_a_plan_that_splits_the_sequence_is_signed_again_with_what_stands_in(colrow, cwd):
    colrow("plan", "cli_models:sequence", "--tp", 2, "--sequence-parallel", "on", "--out", "plan.json")
    text = (cwd / "plan.json").read_text()
    (cwd / "edited.json").write_text(text.replace('"hardware": "h100-sxm"', '"hardware": "a100-sxm"'))
    colrow("plan", "cli_models:sequence", "--from", "edited.json", "--out", "signed.json")
    before, after = read(cwd / "plan.json"), read(cwd / "signed.json")
    assert [bool(s.lengths) for s in after.schedules] == [True, False]
    assert [(s.edits, s.lengths, s.stands_in) for s in after.schedules] == [
        (s.edits, s.lengths, s.stands_in) for s in before.schedules
    ]
    assert all(a.cost.total_s > b.cost.total_s for a, b in zip(after.schedules, before.schedules, strict=True))


def test_an_edited_plan_is_priced_for_a_profile_of_ones_own(colrow, cwd, edited):
    content = json.loads((resources.files("colrow.cost_models") / "profiles" / "l40s-pcie.json").read_text())
    (cwd / "mine.json").write_text(json.dumps(content | {"name": "mine"}))
    file = edited('"hardware": "h100-sxm"', '"hardware": "mine"')
    assert "unknown profile; got 'mine'" in colrow("plan", SOURCE, "--from", file, code=2).stderr
    colrow("plan", SOURCE, "--from", file, "--hardware", "mine.json", "--out", "signed.json")
    colrow("plan", SOURCE, "--from", file, "--hardware", "l40s-pcie", "--out", "shipped.json")
    signed, shipped = read(cwd / "signed.json"), read(cwd / "shipped.json")
    assert (signed.hardware, signed.cost) == ("mine", shipped.cost)
    assert signed.cost != read(cwd / "plan.json").cost


def test_an_edit_that_computes_something_else_is_refused(colrow, cwd, edited):
    file = edited('"forward": "all_reduce", "backward": "identity"', '"forward": "identity", "backward": "identity"')
    assert colrow("plan", SOURCE, "--from", file, "--out", "signed.json", code=1).stderr.startswith("colrow: ")
    assert not (cwd / "signed.json").exists()


def test_an_edited_plan_of_other_inputs_is_refused(colrow, edited):
    file = edited('"hardware": "h100-sxm"', '"hardware": "a100-sxm"')
    refusal = colrow("plan", "cli_models:other", "--from", file, code=2).stderr
    assert "input 0: not what the plan was made for; got (5, 8), need (4, 8)" in refusal


# ---- check


def test_check_passes_and_prints_what_the_plan_has(colrow, saved):
    out = colrow("check", saved, "--max-all-reduces-per-block", 2, "--min-sharded", 0.9, "--require-proven").stdout
    rows = [line.split() for line in out.splitlines()]
    assert ["--max-all-reduces-per-block", "2", "<=", "2", "ok", "layers.0"] in rows
    assert ["--require-proven", "proven", "proven", "ok"] in rows


def test_check_fails_with_1(colrow, saved):
    result = colrow("check", saved, "--max-all-reduces", 2, "--direction", "forward", "--max-bytes", 10**9, code=1)
    assert "--max-all-reduces (forward)" in result.stdout
    assert "FAILED" in result.stdout
    assert "got 3, need 2" in result.stderr


def test_check_in_json(colrow, saved):
    result = json.loads(colrow("check", saved, "--max-bytes", 1, "--min-sharded", 0.5, "--json", code=1).stdout)
    assert (result["schema"], result["ok"]) == ("colrow.check/1", False)
    assert [(c["limit"], c["ok"]) for c in result["checks"]] == [("max-bytes", False), ("min-sharded", True)]
    assert result["digest"] == small_plan().digest


def test_check_without_limits_checks_the_file(colrow, saved):
    assert "unedited" in colrow("check", saved).stdout
    saved.write_text(dumps(small_plan()).replace('"tp": 2', '"tp": 3'))
    assert "edited by hand" in colrow("check", saved, code=2).stderr


# ---- verify and run


def test_verify_runs_the_rewritten_model(colrow):
    result = colrow("verify", SOURCE, "--tp", 2)
    assert "right on 2 ranks" in result.stdout
    report = json.loads(colrow("verify", SOURCE, "--tp", 2, "--json").stdout)
    assert report["schema"] == "colrow.verify/1"
    assert report["ok"] is True


def test_an_infinite_error_is_null_in_json(colrow, monkeypatch):
    from colrow.rewrite import verification

    report = verification.Report(2, 1e-9, {"0": float("inf")}, {"w": float("nan")}, {}, (), (), {}, (), (), ())
    monkeypatch.setattr(verification, "verify", lambda *_, **__: report)
    printed = colrow("verify", SOURCE, "--tp", 2, "--json", code=1).stdout
    found = json.loads(printed, parse_constant=pytest.fail)
    assert (found["ok"], found["forward_max_rel_error"], found["gradient_errors"]) == (False, None, {"w": None})


def test_verify_takes_a_plan(colrow):
    colrow("plan", SOURCE, "--tp", 2, "--phase", "train", "--dtype", "fp32", "--out", "plan.json")
    assert "right on 2 ranks" in colrow("verify", SOURCE, "--plan", "plan.json").stdout
    assert "another number of ranks" in colrow("verify", SOURCE, "--plan", "plan.json", "--tp", 3, code=2).stderr


def test_run_is_handed_its_arguments(colrow, monkeypatch, saved):
    from colrow.rewrite import running

    calls = []
    monkeypatch.setattr(running, "run", lambda source, **options: calls.append((source, options)))
    colrow("run", SOURCE, "--tp", 2, "--prompt-ids", "1, 15043 7")
    colrow("run", SOURCE, "--plan", saved, "--tokens", 5)
    assert calls == [
        (SOURCE, {"tp": 2, "plan": None, "prompt_ids": [1, 15043, 7], "tokens": None}),
        (SOURCE, {"tp": 2, "plan": small_plan(), "prompt_ids": None, "tokens": 5}),
    ]


# ---- errors


def failing(error):
    def command(*_, **__):
        raise error

    return command


def test_an_internal_error_is_one_line_and_3(colrow, saved, monkeypatch):
    monkeypatch.setattr(commands, "show_command", failing(KeyError("a\nb")))
    stderr = colrow("show", saved, code=3).stderr
    assert stderr.count("\n") == 1
    assert stderr.startswith("colrow: internal error: KeyError")


@pytest.mark.parametrize("arguments", [["--debug", "show"], ["show", "--debug"]])
def test_debug_shows_the_traceback(colrow, saved, monkeypatch, arguments):
    monkeypatch.setattr(commands, "show_command", failing(ZeroDivisionError("oh")))
    stderr = colrow(*arguments, saved, code=3).stderr
    assert "Traceback" in stderr
    assert "in command" in stderr
    assert stderr.splitlines()[-1] == "colrow: internal error: ZeroDivisionError: oh"


def test_an_error_carries_its_exit_code(colrow, saved, monkeypatch):
    error = Infeasible("rank 1", "killed by SIGKILL")
    error.exit_code = 137
    monkeypatch.setattr(commands, "show_command", failing(error))
    assert colrow("show", saved, code=137).stderr == "colrow: rank 1: killed by SIGKILL.\n"
