"""transformers' own tensor parallelism and colrow's plans, run and counted; `make bench-peers` does all."""

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCH = str(Path(__file__).parent / "bench")
RIGHT = {"status": "right"}


@pytest.fixture(scope="module")
def rows() -> Iterator[ModuleType]:
    pytest.importorskip("accelerate")  # transformers' tensor parallelism asks for it
    sys.path.insert(0, BENCH)
    try:
        import peer_rows

        yield peer_rows
    finally:
        sys.path.remove(BENCH)


def counted(forward: dict[str, list[int]], backward: dict[str, list[int]]) -> dict[str, dict[str, list[int]]]:
    return {"forward": forward, "backward": backward}


def measured(**kinds: list[int]) -> dict[str, object]:
    return RIGHT | {"counts": counted(kinds, {})}


def test_one_backward_reduction_serves_all_projections_of_an_input(rows: ModuleType) -> None:
    """transformers reduces the gradient of q, k, v, gate and up one by one; two layers, and the head."""
    row = rows.row_of("llama").facts
    assert row["verdict"] == "no more", row["why"]
    assert rows.reductions(row["peer"]["counts"]["backward"]) == 2 * 5 + 1
    assert rows.reductions(row["pinned"]["counts"]["backward"]) == 2 * 2 + 1
    assert row["pinned"]["whole"] == []  # nothing that transformers splits


def test_low_rank_projections_that_transformers_leaves_whole(rows: ModuleType) -> None:
    row = rows.row_of("deepseek_v3").facts
    assert row["verdict"] == "no more", row["why"]
    whole = "model.layers.*.self_attn.q_b_proj.weight"
    assert whole in row["peer"]["whole"]
    more = row["default"]["extra"]
    assert any(whole in one["for"] for one in more)
    listed = sum(one["count"] for one in more if one["kind"] in rows.REDUCTIONS)
    default, same = (
        sum(rows.reductions(kinds) for kinds in row[part]["counts"].values()) for part in ("default", "pinned")
    )
    assert listed >= default - same > 0


def test_every_type_with_a_plan_is_found(rows: ModuleType) -> None:
    found = rows.types_with_plans()
    assert sum(found.values()) == 144  # of transformers 5.23, the version in constraints.txt
    assert found["llama"] and not found["qwen2_vl"]  # the latter has one for its text model
    assert "gpt2" not in found


@pytest.mark.parametrize(
    ("theirs", "ours", "words"),
    [
        (measured(all_reduce=[2, 20]), measured(all_reduce=[2, 20]), "no more"),
        (measured(all_reduce=[2, 20]), measured(all_reduce=[3, 20]), "MORE forward reductions: 3 against 2"),
        (measured(all_reduce=[2, 20]), measured(reduce_scatter=[2, 21]), "MORE forward bytes: 21 against 20"),
        (measured(all_gather=[9, 20]), measured(all_reduce=[1, 5]), "no more in all forward reductions: 1 against 0"),
        (measured(all_gather=[9, 20]), measured(all_reduce=[1, 21]), "MORE forward bytes: 21 against 20"),
        (measured(all_gather=[1, 20]), measured(all_reduce=[2, 5]), "MORE forward reductions: 2 against 0"),
    ],
)
def test_more_is_told_from_no_more(rows: ModuleType, theirs: dict, ours: dict, words: str) -> None:
    verdict, why = rows.verdict({"peer": theirs, "pinned": ours, "default": ours})
    assert f"{verdict} {why}".startswith(words)
    assert verdict != "no more" or not why


@pytest.mark.parametrize(
    ("peer", "ours", "expected"),
    [
        ("right", "wrong", "OURS WRONG"),
        ("crashes", "wrong", "OURS WRONG"),
        ("right", "crashes", "OURS WRONG"),
        ("right", "refused", "ours refused"),
        ("crashes", "refused", "neither"),
        ("crashes", "right", "peer crashes"),
        ("wrong", "right", "peer wrong"),
        ("nothing", "right", "peer splits nothing"),
    ],
)
def test_a_row_that_is_not_compared(rows: ModuleType, peer: str, ours: str, expected: str) -> None:
    parts = {name: measured() | {"status": status, "why": "so"} for name, status in (("peer", peer), ("default", ours))}
    verdict, _ = rows.verdict(parts)
    assert verdict == expected
    assert (verdict in rows.FAILURES) == (expected in ("OURS WRONG", "ours refused"))


def test_a_wrong_gradient_is_wrong(rows: ModuleType) -> None:
    from peer_runs import Run

    run = Run(counted({}, {}), {"output": ("logits", 1e-7), "gradient": ("weight", 0.5)}, (), ())
    assert rows._facts(run)["status"] == "wrong"
    nan = Run(counted({}, {}), {"output": ("logits", float("nan")), "gradient": ("weight", 0.0)}, (), ())
    assert rows._facts(nan)["status"] == "wrong"
