"""Measured tables for ``make bench-costs``: those colrow ships, those held out, and files given on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from colrow.cost_models.communication import CollectiveKind
from colrow.cost_models.fit_profiles import load_table, table_names
from colrow.cost_models.measured_curve import Row
from colrow.cost_models.profile import Link

DATA = Path(__file__).parent / "data"
STRUCTURAL_FITTED = ("a100-sxm", "h100-sxm")
"""Machines whose tables the constants of `structural` were fitted to (its docstring)."""


@dataclass(frozen=True)
class Machine:
    """One machine's tables of one implementation.

    Attributes:
        name: Of the profile or the file's entry.
        implementation: `profile.Implementation`.
        software: What was measured.
        link: Within a node; None where not described.
        shipped: Whether colrow ships a profile of it.
        tables: Rows by kind and group size, all on one node.
        named_nvswitch: Whether its name says NVSwitch, of machines whose link is not described.
    """

    name: str
    implementation: str
    software: str
    link: Link | None
    shipped: bool
    tables: dict[CollectiveKind, dict[int, list[Row]]]
    named_nvswitch: bool = False

    @property
    def on_nvswitch(self) -> bool:
        """Whether the ceilings of NCCL tables of NVSwitch machines hold."""
        switched = self.named_nvswitch if self.link is None else self.link.topology == "nvswitch"
        return switched and "nccl" in self.software.lower()

    def rows(self) -> Iterator[tuple[CollectiveKind, int, list[Row]]]:
        """Every table."""
        for kind, by_size in self.tables.items():
            for size, rows in by_size.items():
                yield kind, size, rows


def shipped() -> list[Machine]:
    """Tables behind the shipped profiles, the library first, then other implementations."""
    machines = []
    for name in table_names():
        table = load_table(name)
        if not table["collectives"]:
            continue
        link = Link.model_validate(table["machine"]["link"]) if "link" in table["machine"] else None
        machines.append(
            Machine(name, "library", table["implementation"], link, True, _in_seconds(table["collectives"]))
        )
        for other in table.get("alternatives", []):
            one_node = {size: rows for size, rows in other["rows"].items() if int(size.split("/")[0]) <= 8}
            one_node = {size: rows for size, rows in one_node.items() if "/" not in size}
            tables = _in_seconds({other["kind"]: one_node})
            machines.append(Machine(name, other["name"], other["software"], link, True, tables))
    return machines


def held_out() -> list[Machine]:
    """Machines colrow has no profile of."""
    content = json.loads((DATA / "held_out_tables.json").read_text("utf-8"))
    return [
        Machine(
            table["name"],
            "library",
            table["implementation"],
            None if table["link"] is None else Link.model_validate(table["link"]),
            False,
            _in_seconds(table["collectives"]),
        )
        for table in content["tables"]
    ]


def from_file(path: str) -> list[Machine]:
    """A file of ``{"tables": [{"hardware", "op", "n_gpus", "n_nodes", "software", "rows"}]}``.

    Rows are ``{"size_bytes", "time_us"}``; of several of one size the median is taken. Tables over several nodes are
    left out. An all_to_all's size is taken as nccl-tests reports it, one rank's buffer. Machines with "NVSwitch" in
    their name and NCCL as their software fall under the ceilings. A table may have a ``link`` (`profile.Link`; of one
    machine's tables the first counts): then the structural model is scored as well, of the ``implementation`` it names
    (`profile.Implementation`; else the library).
    """
    content = json.loads(Path(path).read_text("utf-8"))
    machines: dict[tuple[str, str], Machine] = {}
    for table in content["tables"]:
        if table.get("n_nodes", 1) != 1:
            continue
        key = (table["hardware"], table["software"])
        link = Link.model_validate({"source": path, **table["link"]}) if "link" in table else None
        named = "nvswitch" in table["hardware"].lower()
        by = table.get("implementation", "library")
        machine = machines.setdefault(key, Machine("; ".join(key), by, key[1], link, False, {}, named))
        kind: CollectiveKind = "all_to_all" if table["op"] in ("alltoall", "all_to_all") else table["op"]
        scale = table["n_gpus"] if kind == "all_to_all" else 1
        times: dict[int, list[float]] = {}
        for row in table["rows"]:
            times.setdefault(int(row["size_bytes"]) * scale, []).append(row["time_us"] * 1e-6)
        rows = [(size, sorted(found)[len(found) // 2]) for size, found in sorted(times.items())]
        machine.tables.setdefault(kind, {})[table["n_gpus"]] = rows
    return list(machines.values())


def _in_seconds(collectives: dict[str, Any]) -> dict[CollectiveKind, dict[int, list[Row]]]:
    return {
        kind: {  # type: ignore[misc]
            int(size): [(int(nbytes), us * 1e-6) for nbytes, us in rows] for size, rows in by_size.items()
        }
        for kind, by_size in collectives.items()
    }
