"""Regenerate ``profiles/*.json`` from ``tables/*.json``: python -m colrow.cost_models.fit_profiles.

A table holds what was measured or read from a datasheet, with its source and licence; a profile holds what
`hardware.Hardware` reads. This script adds nothing but the curves of `measured_curve` and, for kinds and group sizes
without rows, curves derived by formula and marked ``structural``, by the table's ``unmeasured`` rule:

- ``switch`` (NCCL tables): broadcast from all_gather at the size that puts the same bytes on a rank's link,
  ``t(S) = all_gather(S * traffic_share(broadcast, n) / traffic_share(all_gather, n))``.
- ``ring`` (gloo): groups of 4 and 8 from 2 ranks, the latency by the ratio of steps (2(n-1) for all_reduce, n-1 for
  all_gather, reduce_scatter and all_to_all, log2 n for broadcast) and each slope by the ratio of bytes a rank sends
  (for broadcast, of steps: its tree sends the whole message in each). Every rank is taken to have its own core.
- ``link``: every kind in groups of 2, 4 and 8 from the machine's ``link`` (`structural`), for machines without rows.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from importlib import resources
from math import ceil, log2
from pathlib import Path
from typing import Any

from .communication import COLLECTIVE_KINDS, CollectiveKind, inter_node_s, traffic_share
from .hardware import SCHEMA, parse_hardware
from .measured_curve import curve_through
from .measured_curve import rounded as rounded
from .profile import Link
from .structural import envelope, structural_lines

TABLE_SCHEMA = "colrow.table/1"
RING_SIZES = (4, 8)
LINK_SIZES = (2, 4, 8)

ALTERNATIVE_KEYS = ("name", "software", "source", "commit", "licence", "date")

SEGMENT = re.compile(r'\{\s+("from_bytes": \d+),\s+("s_per_byte": [\d.e-]+)\s+\}')
"""A segment as json.dumps indents it; profiles hold each on one line."""

GroupJson = dict[str, Any]


def profile_json(table: Mapping[str, Any]) -> str:
    """The text of one profile, from the content of its table (layout: any file under ``tables/``).

    Raises:
        ValueError: Not a table of this version, or one without a licence.
        HardwareError: The result is not a valid profile.
    """
    if table.get("schema") != TABLE_SCHEMA:
        raise ValueError(f"{table.get('name')}: schema must be {TABLE_SCHEMA}, got {table.get('schema')!r}")
    if not table.get("licence"):
        raise ValueError(f"{table['name']}: a table without a licence is not used")
    groups = {kind: measured_groups(rows) for kind, rows in table["collectives"].items()}
    match table["unmeasured"]:
        case "switch":
            for kind in COLLECTIVE_KINDS:
                if kind not in groups:
                    groups[kind] = [same_link_bytes(kind, group) for group in groups["all_gather"]]
        case "ring":
            for kind in COLLECTIVE_KINDS:
                groups[kind] += [ring_scaled(kind, groups[kind][0], size) for size in RING_SIZES]
        case "link":
            link = Link.model_validate(table["machine"]["link"])
            for kind in COLLECTIVE_KINDS:
                groups[kind] = [from_link(kind, size, link) for size in LINK_SIZES]
            for kind in COLLECTIVE_KINDS if table.get("nodes", 1) > 1 else ():
                groups[kind].append(over_nodes(kind, groups[kind][-1], table["nodes"], table["machine"]["inter_node"]))
    content = {
        "schema": SCHEMA,
        **{key: table[key] for key in ("name", "source", "commit", "licence", "date")},
        **table["machine"],
        "collectives": {
            kind: {
                "implementation": table["implementation"],
                "groups": groups[kind],
                "alternatives": [
                    {**{key: other[key] for key in ALTERNATIVE_KEYS}, "groups": measured_groups(other["rows"])}
                    for other in table.get("alternatives", [])
                    if other["kind"] == kind
                ],
            }
            for kind in COLLECTIVE_KINDS
        },
    }
    text = SEGMENT.sub(r"{\1, \2}", json.dumps(content, indent=1)) + "\n"
    parse_hardware(text, where=f"table {table['name']}")
    return text


def measured_groups(rows_by_size: Mapping[str, list[list[float]]]) -> list[GroupJson]:
    """A curve through each group's rows: ``{"2": [[bytes, us], ...]}`` -> curves, ascending.

    A key is the group's size, or ``size/nodes`` where its ranks are spread over more nodes than would hold them.
    """
    groups = []
    for key in sorted(rows_by_size, key=lambda key: [int(part) for part in key.split("/")]):
        size, _, nodes = key.partition("/")
        rows = [(int(nbytes), us * 1e-6) for nbytes, us in rows_by_size[key]]
        curve = curve_through(rows)
        groups.append(
            {
                "size": int(size),
                **({"nodes": int(nodes)} if nodes else {}),
                "basis": "measured",
                "min_bytes": min(nbytes for nbytes, _ in rows),
                "max_bytes": max(nbytes for nbytes, _ in rows),
                "latency_s": curve.latency_s,
                "segments": [
                    {"from_bytes": start, "s_per_byte": slope}
                    for start, slope in zip(curve.starts, curve.slopes_s_per_byte, strict=True)
                ],
                "median_rel_error": curve.median_rel_error,
                "max_rel_error": curve.max_rel_error,
                "left_out_median_rel_error": curve.left_out_median_rel_error,
                "left_out_max_rel_error": curve.left_out_max_rel_error,
            }
        )
    return groups


def same_link_bytes(kind: CollectiveKind, all_gather: GroupJson) -> GroupJson:
    """An unmeasured kind, from the all_gather that moves as many bytes over the busiest link."""
    size = all_gather["size"]
    per_byte = traffic_share(kind, size) / traffic_share("all_gather", size)
    return {
        "size": size,
        "basis": "structural",
        "min_bytes": round(all_gather["min_bytes"] / per_byte),
        "max_bytes": round(all_gather["max_bytes"] / per_byte),
        "latency_s": all_gather["latency_s"],
        "segments": [
            {
                "from_bytes": round(segment["from_bytes"] / per_byte),
                "s_per_byte": rounded(segment["s_per_byte"] * per_byte),
            }
            for segment in all_gather["segments"]
        ],
    }


def ring_scaled(kind: CollectiveKind, two: GroupJson, size: int) -> GroupJson:
    """A larger group, from the measured one of two ranks."""
    steps = ceil(log2(size)) if kind == "broadcast" else size - 1
    per_byte = steps if kind == "broadcast" else traffic_share(kind, size) / traffic_share(kind, 2)
    return {
        "size": size,
        "basis": "structural",
        "min_bytes": two["min_bytes"],
        "max_bytes": two["max_bytes"],
        "latency_s": rounded(two["latency_s"] * steps),
        "segments": [
            {"from_bytes": segment["from_bytes"], "s_per_byte": rounded(segment["s_per_byte"] * per_byte)}
            for segment in two["segments"]
        ],
    }


def over_nodes(kind: CollectiveKind, within: GroupJson, nodes: int, inter_node: Mapping[str, Any]) -> GroupJson:
    """All ranks of several nodes, from a full node's group: `communication.inter_node_s` on top, as routes add it."""
    between = inter_node_s(kind, nodes, within["size"], inter_node["latency_s"], inter_node["bytes_per_s_per_rank"])
    per_byte = (between(1e12) - between(0)) / 1e12
    return {
        **within,
        "size": nodes * within["size"],
        "latency_s": rounded(within["latency_s"] + between(0)),
        "segments": [
            {**segment, "s_per_byte": rounded(segment["s_per_byte"] + per_byte)} for segment in within["segments"]
        ],
    }


def from_link(kind: CollectiveKind, size: int, link: Link) -> GroupJson:
    """A group of a machine without rows, from its links."""
    latency_s, starts, slopes = envelope(structural_lines(kind, size, link))
    return {
        "size": size,
        "basis": "structural",
        "min_bytes": 0,
        "max_bytes": 0,
        "latency_s": rounded(latency_s),
        "segments": [
            {"from_bytes": start, "s_per_byte": rounded(slope)} for start, slope in zip(starts, slopes, strict=True)
        ],
    }


def load_table(name: str) -> dict[str, Any]:
    """The content of ``tables/<name>.json``."""
    content: dict[str, Any] = json.loads((resources.files(__package__) / "tables" / f"{name}.json").read_text("utf-8"))
    return content


def table_names() -> list[str]:
    """Names of the tables that ship with colrow, sorted."""
    folder = resources.files(__package__) / "tables"
    return sorted(entry.name.removesuffix(".json") for entry in folder.iterdir() if entry.name.endswith(".json"))


def main() -> None:
    """Write every profile beside this file."""
    folder = Path(__file__).parent / "profiles"
    folder.mkdir(exist_ok=True)
    for name in table_names():
        path = folder / f"{name}.json"
        path.write_text(profile_json(load_table(name)), encoding="utf-8")
        print(f"wrote {path.name}")


if __name__ == "__main__":
    main()
