"""Tables of one's own, scored by the bench as the shipped ones are."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).parent / "bench"
SWITCH = {"topology": "nvswitch", "bytes_per_s_per_rank": 450e9, "multicast": True}


@pytest.fixture
def costs(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    import costs

    yield costs
    for name in [name for name in sys.modules if name.startswith("costs")]:
        del sys.modules[name]


def table(op: str, ranks: int, us: float, **more: object) -> dict[str, object]:
    rows = [{"size_bytes": 1024 << n, "time_us": us * (1 + 2.0**n / 64)} for n in range(12)]
    named = {"hardware": "8x H100 NVSwitch", "software": "nccl 2.99", "n_nodes": 1}
    return {**named, "op": op, "n_gpus": ranks, "rows": rows, **more}


def test_a_file_of_tables_is_scored_and_missed_ceilings_are_named(costs, tmp_path, capsys) -> None:
    path = tmp_path / "tables.json"
    good = [table("all_reduce", n, 10.0 * n, link=SWITCH) for n in (2, 4, 8)]
    path.write_text(json.dumps({"tables": good + [table("all_reduce", 16, 1.0, n_nodes=2)]}))
    (machine,) = costs.from_file(str(path))
    assert (machine.on_nvswitch, sorted(machine.tables["all_reduce"])) == (True, [2, 4, 8])
    assert costs.main([str(path)]) == 1  # ten times too slow for its links
    printed = capsys.readouterr().out
    assert "structural all_reduce, 8x H100 NVSwitch; nccl 2.99" in printed
    assert "2 of 3 ceilings met" in printed


def test_without_a_link_the_structural_model_is_not_scored(costs, tmp_path, capsys) -> None:
    path = tmp_path / "tables.json"
    path.write_text(json.dumps({"tables": [table("alltoall", n, 10.0) for n in (2, 4, 8)]}))
    (machine,) = costs.from_file(str(path))
    assert machine.link is None
    assert machine.on_nvswitch
    assert machine.tables["all_to_all"][4][0][0] == 4 * 1024  # nccl-tests counts one rank's buffer
    assert costs.main([str(path)]) == 0
    assert "Structural model" not in capsys.readouterr().out
