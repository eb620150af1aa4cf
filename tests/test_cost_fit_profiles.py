"""The committed profiles are what the shipped tables give, and tables without a licence are refused."""

import json
from importlib import resources

import pytest

from colrow.cost_models.fit_profiles import load_table, profile_json, ring_scaled, same_link_bytes, table_names
from colrow.cost_models.hardware import hardware_names


def same(committed: object, regenerated: object) -> bool:
    """Equal in everything but the last digits of floats, which a linear programme's solver may round otherwise."""
    match committed:
        case dict():
            return (
                isinstance(regenerated, dict)
                and list(committed) == list(regenerated)
                and all(same(value, regenerated[key]) for key, value in committed.items())
            )
        case list():
            return (
                isinstance(regenerated, list)
                and len(committed) == len(regenerated)
                and all(map(same, committed, regenerated))
            )
        case float():
            return isinstance(regenerated, float) and regenerated == pytest.approx(committed, rel=1e-4, abs=0)
        case _:
            return type(committed) is type(regenerated) and committed == regenerated


@pytest.mark.parametrize("name", table_names())
def test_committed_profile_equals_the_regenerated_one(name: str) -> None:
    committed = (resources.files("colrow.cost_models") / "profiles" / f"{name}.json").read_text("utf-8")
    assert same(json.loads(committed), json.loads(profile_json(load_table(name))))


def test_every_profile_has_its_table() -> None:
    assert table_names() == hardware_names()


@pytest.mark.parametrize("name", table_names())
def test_tables_name_source_licence_and_date_and_ascend(name: str) -> None:
    table = load_table(name)
    assert table["source"] and table["licence"] and table["date"] and table["notes"]
    for by_size in table["collectives"].values():
        for rows in by_size.values():
            sizes = [nbytes for nbytes, _ in rows]
            assert len(rows) >= 12 and sizes == sorted(set(sizes)) and all(us > 0 for _, us in rows)


def test_a_table_without_a_licence_or_of_another_version_is_refused() -> None:
    table = load_table("gloo-cpu")
    with pytest.raises(ValueError, match="without a licence"):
        profile_json({**table, "licence": ""})
    with pytest.raises(ValueError, match="schema"):
        profile_json({**table, "schema": "colrow.table/9"})


ALL_GATHER_4 = {
    "size": 4,
    "basis": "measured",
    "min_bytes": 512,
    "max_bytes": 2**20,
    "latency_s": 1e-5,
    "segments": [{"from_bytes": 0, "s_per_byte": 3e-10}, {"from_bytes": 3000, "s_per_byte": 3e-11}],
}


def test_broadcast_sends_a_third_more_per_link_than_all_gather_of_four() -> None:
    group = same_link_bytes("broadcast", ALL_GATHER_4)
    assert group["basis"] == "structural" and group["latency_s"] == 1e-5
    assert group["segments"][0]["s_per_byte"] == pytest.approx(4e-10)
    assert group["segments"][1] == {"from_bytes": 2250, "s_per_byte": pytest.approx(4e-11)}


def test_ring_scaling_from_two_ranks() -> None:
    two = {**ALL_GATHER_4, "size": 2}
    eight = ring_scaled("all_reduce", two, 8)
    # 14 steps for 2, and 2 * 7/8 of the tensor for 2 * 1/2.
    assert eight["latency_s"] == pytest.approx(7e-5) and eight["basis"] == "structural"
    assert eight["segments"][0]["s_per_byte"] == pytest.approx(3e-10 * 1.75)
    tree = ring_scaled("broadcast", two, 8)
    assert tree["latency_s"] == pytest.approx(3e-5) and tree["segments"][0]["s_per_byte"] == pytest.approx(9e-10)
