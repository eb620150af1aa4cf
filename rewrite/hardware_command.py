"""``colrow hardware``: the profiles there are, how well each is known, and the curves of one."""

from __future__ import annotations

import math
import sys
from statistics import median
from typing import Any

from rich.table import Table
from rich.text import Text

from colrow.cost_models.communication import COLLECTIVE_KINDS, CollectiveKind
from colrow.cost_models.hardware import Hardware, hardware_names, load_hardware
from colrow.cost_models.profile import GroupCurve

from .answers import json_text
from .chart_images import check_drawable, draw
from .charts import Chart, Curve, text_of
from .units import console, empty_table, nbytes, seconds

LIST_SCHEMA = "colrow.hardware_list/1"
SHOW_SCHEMA = "colrow.hardware_show/1"
STEPS_PER_OCTAVE = 2
BEYOND = 4  # curves are shown so many times beyond what was measured
UNMEASURED_RANGE = (2**8, 2**30)  # bytes, where nothing was
LETTERS = "abcdefghijklmnopqrstuvwxyz"

Key = tuple[str, int, int | None]
"""Implementation, ranks, nodes (None: as few as hold them)."""


def hardware_command(as_json: bool) -> None:
    """``colrow hardware``."""
    profiles = [load_hardware(name) for name in hardware_names()]
    if as_json:
        print(json_text({"schema": LIST_SCHEMA, "profiles": [profile_json(p) for p in profiles]}))
        return
    table = empty_table("name", "ranks", "curves", "error, one size left out", "date", "source", numeric=(1,))
    for profile in profiles:
        row = profile_json(profile)
        error = row["left_out_median_rel_error"]
        shown = "not known" if error is None else f"median {error:.1%}, worst {row['left_out_max_rel_error']:.0%}"
        curves = f"{row['measured_curves']} of {row['measured_curves'] + row['structural_curves']} measured"
        basis = "structural" if row["basis"] == "structural" else curves
        table.add_row(profile.name, str(profile.ranks_per_node), basis, shown, profile.date, short_source(profile))
    out = console(sys.stdout)
    out.print(table)
    out.print(Text("\nranks: of one node. structural: from the links by formula, nothing measured."))
    out.print(Text("colrow hardware show NAME has sources and curves; --hardware also takes a file of your own."))


def short_source(profile: Hardware) -> str:
    """Who measured: a repository, or the first words."""
    first = profile.source.split()[0]
    if first.startswith("https://"):
        return "/".join(first.split("/")[3:5])
    return profile.source.partition(":")[0]


def show_hardware_command(name: str, out: str | None, as_json: bool) -> None:
    """``colrow hardware show NAME``."""
    check_drawable(out)
    profile = load_hardware(name)
    charts = charts_of(profile)
    if out is not None:
        draw(charts, out)
        print(f"charts written to {out}", file=sys.stderr)
    if as_json:
        print(json_text({"schema": SHOW_SCHEMA, **profile_json(profile), "curves": curves_json(profile)}))
        return
    page = console(sys.stdout)
    page.print(Text(f"{profile.name}: {profile.description}", style="bold"))
    page.print(_facts(profile))
    for chart in charts:
        page.print()
        page.print(Text(text_of(chart)), soft_wrap=True)


def profile_json(profile: Hardware) -> dict[str, Any]:
    """What a profile is and how well it is known."""
    groups = [group for kind in COLLECTIVE_KINDS for group in getattr(profile.collectives, kind).groups]
    measured = [group for group in groups if group.basis == "measured"]
    fit = [group.median_rel_error for group in measured if group.median_rel_error is not None]
    left_out = [g.left_out_median_rel_error for g in measured if g.left_out_median_rel_error is not None]
    worst = [g.left_out_max_rel_error for g in measured if g.left_out_max_rel_error is not None]
    return {
        "name": profile.name,
        "description": profile.description,
        "basis": profile.basis,
        "measured_curves": len(measured),
        "structural_curves": len(groups) - len(measured),
        "median_rel_error": median(fit) if fit else None,
        "left_out_median_rel_error": median(left_out) if left_out else None,
        "left_out_max_rel_error": max(worst, default=None),
        "ranks_per_node": profile.ranks_per_node,
        "across_nodes": profile.inter_node is not None,
        "memory_gb": profile.memory_gb,
        "source": profile.source,
        "licence": profile.licence,
        "date": profile.date,
    }


def curve_keys(profile: Hardware, kind: CollectiveKind) -> list[Key]:
    """The curves of a kind, and two nodes by formula where the profile has a network between them and no curve."""
    collective = getattr(profile.collectives, kind)
    keys: list[Key] = [("library", group.size, group.nodes) for group in collective.groups]
    if profile.inter_node is not None and all(size <= profile.ranks_per_node for _, size, _ in keys):
        keys.append(("library", 2 * profile.ranks_per_node, None))
    return keys + [(other.name, group.size, group.nodes) for other in collective.alternatives for group in other.groups]


def curves_json(profile: Hardware) -> list[dict[str, Any]]:
    """Every curve as points."""
    return [
        {"kind": kind, "size": size, "nodes": nodes, "implementation": implementation, "points": [
            {"bytes": at, "seconds": seconds, "finding": finding}
            for at, seconds, finding in _points(profile, kind, (implementation, size, nodes))
        ]}
        for kind in COLLECTIVE_KINDS for implementation, size, nodes in curve_keys(profile, kind)
    ]  # fmt: skip


def charts_of(profile: Hardware) -> list[Chart]:
    """Time against size: of each kind, and of each other implementation of it; a curve per group."""
    charts = []
    for kind in COLLECTIVE_KINDS:
        keys = curve_keys(profile, kind)
        for implementation in dict.fromkeys(key[0] for key in keys):
            own = [key for key in keys if key[0] == implementation]
            curves = [_curve(profile, kind, key, LETTERS[n % len(LETTERS)]) for n, key in enumerate(own)]
            by = "" if implementation == "library" else f" by {implementation}"
            title = f"{kind}{by} on {profile.name}"
            charts.append(Chart(title, "bytes of the whole tensor", "time", curves, nbytes, seconds, "not measured"))
    return charts


def _curve(profile: Hardware, kind: CollectiveKind, key: Key, letter: str) -> Curve:
    """The mark is the number of ranks where that is one digit on one node, else ``letter``."""
    _, size, nodes = key
    label = f"{size} ranks" + f", {nodes} nodes" * bool(nodes)
    mark = str(size) if size < 10 and not nodes else letter
    points = _points(profile, kind, key)
    return Curve(label, mark, [(at, s) for at, s, _ in points], [not finding for _, _, finding in points])


def _points(profile: Hardware, kind: CollectiveKind, key: Key) -> list[tuple[int, float, str]]:
    """(bytes, seconds, what it is if not a value between measured ones)."""
    implementation, size, nodes = key
    groups = [group for group in getattr(profile.collectives, kind).groups if group.max_bytes]
    smallest = max(1, min((g.min_bytes for g in groups), default=UNMEASURED_RANGE[0]) // BEYOND)
    octaves = math.log2(BEYOND * max((g.max_bytes for g in groups), default=UNMEASURED_RANGE[1]) / smallest)
    sizes = [round(smallest * 2 ** (n / STEPS_PER_OCTAVE)) for n in range(math.ceil(octaves * STEPS_PER_OCTAVE) + 1)]
    found = [(at, profile.predict(kind, at, size, implementation, nodes)) for at in dict.fromkeys(sizes)]
    return [(at, prediction.seconds, prediction.finding) for at, prediction in found]


def _facts(profile: Hardware) -> Table:
    rates = profile.compute
    flops = {dtype: peak * rates.efficiency.get(dtype, rates.efficiency["float32"])
             for dtype, peak in rates.peak_flops_per_s.items()}  # fmt: skip
    memory = profile.memory
    facts = Table.grid(padding=(0, 2))
    facts.add_row("source", profile.source)
    facts.add_row("licence", f"{profile.licence}, {profile.date}" + f", commit {profile.commit}" * bool(profile.commit))
    facts.add_row("node", f"{profile.ranks_per_node} ranks of {profile.memory_gb:g} GB")
    rates_text = ", ".join(f"{dtype} {value / 1e12:.3g} TFLOPS" for dtype, value in sorted(flops.items()))
    facts.add_row("matmul", f"{rates_text}. {rates.source}")
    facts.add_row("memory", f"{memory.bandwidth_bytes_per_s * memory.efficiency / 1e9:.4g} GB/s. {memory.source}")
    facts.add_row("launch", f"{seconds(profile.launch_overhead_s)}. {profile.launch_source}")
    if profile.inter_node is not None:
        between = profile.inter_node
        speed = f"{between.bytes_per_s_per_rank / 1e9:.4g} GB/s per rank, {seconds(between.latency_s)} a hop"
        facts.add_row("nodes", f"{speed}. {between.source}")
    if profile.link is not None:
        link = profile.link
        speed = f"{link.topology}, {link.bytes_per_s_per_rank / 1e9:.4g} GB/s per rank"
        facts.add_row("link", f"{speed}. {link.source}")
    for kind in COLLECTIVE_KINDS:
        collective = getattr(profile.collectives, kind)
        for group in collective.groups:
            facts.add_row(kind, f"{_group_text(group)} ({collective.implementation})")
        for other in collective.alternatives:
            facts.add_row(f"{other.name}", f"{kind} by {other.software}; {other.source}; {other.licence}, {other.date}")
            for group in other.groups:
                facts.add_row("", _group_text(group))
    return facts


def _group_text(group: GroupCurve) -> str:
    nodes = f" on {group.nodes} nodes" if group.nodes else ""
    if group.basis == "structural":
        return f"{group.size} ranks{nodes}: structural"
    text = f"{group.size} ranks{nodes}: measured, {nbytes(group.min_bytes)} to {nbytes(group.max_bytes)}"
    if group.left_out_median_rel_error is None or group.left_out_max_rel_error is None:
        return text
    worst = f"worst {group.left_out_max_rel_error:.0%}"
    return f"{text}, error with one size left out: median {group.left_out_median_rel_error:.1%}, {worst}"
