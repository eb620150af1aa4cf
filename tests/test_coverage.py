"""``colrow coverage``: rows and statuses, limited children, resuming, the page, and the check of committed rows."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch
from torch import nn

from colrow.cost_models.errors import UsageError
from colrow.rewrite import coverage_rows
from colrow.rewrite.coverage import chosen_sources, coverage, is_due
from colrow.rewrite.coverage_check import chosen, difference
from colrow.rewrite.coverage_children import Limits, run_limited
from colrow.rewrite.coverage_page import alike, page
from colrow.rewrite.coverage_rows import STAGES, Row, StageResult, Status, code_digests, load_rows, save_rows

LIMITS = Limits(60, int(4e9))


def factory() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """Two layers that split as column and row."""
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 16)), (torch.randn(2, 3, 16),)


def on_values() -> tuple[nn.Module, tuple[torch.Tensor]]:
    """A model that cannot be traced."""

    class OnValues(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return input if input.sum() > 0 else super().forward(input)

    return OnValues(8, 8), (torch.randn(2, 8),)


def row(**stages: Status) -> Row:
    return Row("hf:any", {stage: StageResult(status, code="new") for stage, status in stages.items()})


@pytest.mark.parametrize(
    ("stages", "status"),
    [
        ({}, Status.NOT_RUN),
        ({"trace": Status.OK}, Status.TRACED),
        ({"trace": Status.OK, "plan": Status.OK}, Status.PLANNED),
        ({"trace": Status.NOT_BUILT}, Status.NOT_BUILT),
        ({"trace": Status.OK, "plan": Status.TIMED_OUT, "verify": Status.WRONG}, Status.WRONG),
        ({"trace": Status.OK, "plan": Status.OK, "verify": Status.TIMED_OUT}, Status.TIMED_OUT),
        (dict.fromkeys(STAGES, Status.OK), Status.VERIFIED),
        ({**dict.fromkeys(STAGES, Status.OK), "generate": Status.NOT_APPLICABLE}, Status.VERIFIED),
    ],
)
def test_a_row_is_as_good_as_its_worst_stage(stages: dict[str, Status], status: Status) -> None:
    assert row(**stages).status is status


def test_what_older_code_made_is_stale_and_due() -> None:
    codes = dict.fromkeys(STAGES, "newer")
    made = row(trace=Status.OK)
    assert made.is_stale(codes) and not made.is_stale(dict.fromkeys(STAGES, "new"))
    assert is_due(made, "trace", "newer", ()) and not is_due(made, "trace", "new", ())
    assert is_due(made, "verify", "new", ()) and not is_due(row(trace=Status.NOT_BUILT), "verify", "new", ())
    assert is_due(made, "trace", "new", (Status.OK,)) and not is_due(made, "trace", "newer", (Status.WRONG,))
    assert not is_due(row(trace=Status.NO_MODEL), "plan", "new", ())


def test_digests_are_blind_to_words_and_see_code() -> None:
    one = coverage_rows._without_words('"""Doc."""\ndef f():\n    """Says."""\n    return 1  # why\n')
    assert one == coverage_rows._without_words("def f():\n    return 1\n")
    assert one != coverage_rows._without_words("def f():\n    return 2\n")


def test_rows_come_back_from_the_file(tmp_path: Path) -> None:
    rows = {"hf:any": row(trace=Status.OK, verify=Status.WRONG), "hf:a": Row("hf:a")}
    save_rows(tmp_path / "coverage.json", rows)
    again = load_rows(tmp_path / "coverage.json")
    assert list(again) == ["hf:a", "hf:any"] and again == rows


def _hang() -> StageResult:
    time.sleep(100)
    raise AssertionError


def _burn() -> StageResult:
    while True:
        pass


def _eat() -> StageResult:
    from colrow.rewrite.coverage_stages import _status_of

    try:
        torch.ones(int(1e9))
    except RuntimeError as error:
        return StageResult(_status_of(error))
    raise AssertionError


def _crash() -> StageResult:
    import os

    os.kill(os.getpid(), 11)
    raise AssertionError


def test_a_child_that_fails_costs_its_own_result_only() -> None:
    tasks = [lambda: StageResult(Status.OK), _hang, _burn, _eat, _crash, lambda: StageResult(Status.WRONG)]
    found = dict(run_limited(tasks, Limits(1, int(2e9)), 2))
    assert [found[i].status for i in range(len(tasks))] == [
        Status.OK, Status.TIMED_OUT, Status.TIMED_OUT, Status.MEMORY, Status.CRASHED, Status.WRONG,
    ]  # fmt: skip


def test_factories_are_covered_and_resumed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sources = ["tests.test_coverage:factory", "tests.test_coverage:on_values"]
    coverage(sources, folder=tmp_path, limits=LIMITS, stages=("trace", "plan", "verify"))
    rows = load_rows(tmp_path / "coverage.json")
    assert rows[sources[0]].status is Status.PLANNED  # generate was not asked for
    assert rows[sources[0]].result("verify").facts["4"]["split"] == 1.0
    assert list(rows[sources[0]].result("plan").facts["placements"].values()) == [["*.weight"]]
    assert rows[sources[1]].status is Status.NOT_TRACED
    assert "trace 2/2" in capfd.readouterr().err
    coverage(sources, folder=tmp_path, limits=LIMITS, stages=("trace", "verify"))
    assert capfd.readouterr().err == ""
    text = (tmp_path / "COVERAGE.md").read_text()
    assert "not traced" in text and "tests.test_coverage:factory" in text


def test_unknown_types_are_refused() -> None:
    with pytest.raises(UsageError, match="hf:lamma"):
        chosen_sources(["hf:lamma"])
    assert chosen_sources(["hf:llama", "a.b:c"]) == ["hf:llama", "a.b:c"]


def test_the_page_counts_and_groups() -> None:
    failed = StageResult(Status.NOT_TRACED, "A: torch cannot trace this model, 17 of 3")
    rows = {name: Row(f"hf:{name}", {"trace": failed}) for name in ("a", "b")}
    rows["c"] = Row("hf:c", {"trace": StageResult(Status.NO_MODEL)})
    text = page(rows, code_digests(), {"transformers": "5", "torch": "2"})
    assert "3 types, 1 of them outside" in text and "| 2: a, b |" in text
    assert alike("x 12 of 1e-05") == alike("x 7 of 3e-01")


def test_the_check_picks_by_commit_and_names_what_differs() -> None:
    codes = dict.fromkeys(STAGES, "new")
    rows = {f"hf:{i}": Row(f"hf:{i}", {"trace": StageResult(Status.OK, code="new", cpu_s=5.0)}) for i in range(40)}
    picked = chosen(rows, "abc", codes)
    assert len(picked) == 12 and picked == chosen(rows, "abc", codes) != chosen(rows, "abd", codes)
    assert chosen(rows, "abc", dict.fromkeys(STAGES, "newer")) == []  # stale rows are not the code's fault
    kept = StageResult(Status.OK, facts={"nodes": 3, "2": {"error": "1e-16", "split": 1.0}})
    same = StageResult(Status.OK, facts={"nodes": 3, "2": {"error": "3e-16", "split": 1.0}})
    assert difference(same, kept) == ""
    assert "nodes" in difference(StageResult(Status.OK, facts={"nodes": 4, "2": same.facts["2"]}), kept)
    assert "wrong is" in difference(StageResult(Status.WRONG), kept)


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    file = tmp_path / "coverage.json"
    facts = {"2": {"split": float("nan"), "whole": [float("inf"), 1.5]}}
    save_rows(file, {"hf:any": Row("hf:any", {"trace": StageResult(Status.OK, facts=facts)})})
    assert load_rows(file)["hf:any"].result("trace").facts == {"2": {"split": None, "whole": [None, 1.5]}}
