"""Random modules: a few of the fuzzer's, every failure it ever found, and that it sees what is wrong."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from fuzz.check import Outcome, check
from fuzz.modules import generate
from fuzz.reduce import reduced
from fuzz.report import UNREACHED, missed, report

from colrow.planner import planning
from colrow.planner.plan_model import Plan
from colrow.planner.rules import RULES

FOUND = sorted((Path(__file__).parent / "fuzz" / "found").glob("*.py"))
SEEDS = range(9000, 9024)  # not among the 2,000 of `make fuzz`


@pytest.mark.parametrize("seed", SEEDS)
def test_a_random_module(seed: int, tmp_path: Path) -> None:
    path = tmp_path / f"module_{seed}.py"
    path.write_text(generate(seed).source)
    outcome = check(path, seed, whole_verify=seed % 8 == 0)
    assert outcome.status in ("right", "invalid"), f"seed {seed}, {outcome.status}: {outcome.reason}"


@pytest.mark.parametrize("path", FOUND, ids=lambda path: path.stem)
def test_what_was_found_stays_mended(path: Path) -> None:
    outcome = check(path)
    assert outcome.status == "right", outcome.reason
    assert outcome.split == 1.0 and outcome.rules


def test_a_seed_is_one_module() -> None:
    assert generate(5).source == generate(5).source != generate(6).source


def _module(tmp_path: Path) -> Path:
    path = tmp_path / "module.py"
    path.write_text(FOUND[0].read_text())
    return path


def test_a_collective_that_is_not_planned_is_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def forgetful(*arguments: object, **keywords: object) -> Plan:
        made = planning.plan(*arguments, **keywords)  # type: ignore[arg-type]
        schedules = tuple(dataclasses.replace(s, collectives=s.collectives[1:]) for s in made.schedules)
        return dataclasses.replace(made, schedules=schedules)

    monkeypatch.setattr("fuzz.check.plan", forgetful)
    assert check(_module(tmp_path)).status == "wrong"


def test_a_wrong_rule_is_seen_and_made_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A softmax that may run along its split dim."""
    monkeypatch.setitem(RULES, "softmax", RULES["tanh"])
    source = FOUND[0].read_text().replace("x.shape[-1]", "24")
    head, _, _ = source.partition("class ")
    source = head + (
        "class Model(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up = nn.Linear(24, 32)\n"
        "        self.unused = nn.Linear(24, 24)\n"
        "        self.down = nn.Linear(32, 24)\n"
        "\n"
        "    def forward(self, x):\n"
        "        y = self.up(x)\n"
        "        y = torch.tanh(y)\n"
        "        y = F.softmax(y, -1)\n"
        "        return self.down(y)\n"
    )
    path = tmp_path / "module.py"
    path.write_text(source)
    outcome = check(path)
    assert outcome.status == "wrong" and "output" in outcome.reason
    small = reduced(source, rounds=1)
    assert "softmax" in small and "tanh" not in small and "unused" not in small


def test_the_report_names_goals_that_are_missed() -> None:
    hits = dict.fromkeys((name for name in RULES if name not in UNREACHED), 20)
    moves = {
        "all_reduce/all_reduce": 20, "all_reduce/identity": 20, "all_gather/reduce_scatter": 20,
        "all_gather/slice": 20, "slice/pad": 20, "lift/lift": 20, "lift/identity": 20, "identity/all_reduce": 20,
        "identity/lift": 20,
    }  # fmt: skip
    fine = Outcome(0, "right", tp=2, split=1.0, rules=hits, whole=hits, moves=moves)
    assert not missed([fine])
    assert "goals: all met" in report([fine])
    rare = Outcome(0, "right", tp=2, split=1.0, rules=hits, whole=hits, moves=moves | {"slice/pad": 19})
    assert missed([rare]) == ["hit fewer than 20 times: slice/pad 19"]
    assert "1 modules wrong" in missed([fine, Outcome(1, "wrong", "output", tp=2, split=1.0)])
    assert any("refused" in line for line in missed([fine, Outcome(1, "refused", "x", tp=2)]))
    assert any("replicated" in line for line in missed([fine, Outcome(1, "right", tp=2)]))
