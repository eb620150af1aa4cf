"""``colrow hardware``: the profiles there are, how well each is known, and the curves of one."""

from __future__ import annotations

import math
import sys
from typing import Any

from rich.table import Table
from rich.text import Text

from colrow.cost_models.communication import COLLECTIVE_KINDS, CollectiveKind
from colrow.cost_models.hardware import Hardware, hardware_names, load_hardware

from .answers import json_text
from .chart_images import check_drawable, draw
from .charts import Chart, Curve, text_of
from .units import console, empty_table, nbytes, seconds

LIST_SCHEMA = "colrow.hardware_list/1"
SHOW_SCHEMA = "colrow.hardware_show/1"
STEPS_PER_OCTAVE = 2
BEYOND = 4  # curves are shown so many times beyond what was measured


def hardware_command(as_json: bool) -> None:
    """``colrow hardware``."""
    profiles = [load_hardware(name) for name in hardware_names()]
    if as_json:
        print(json_text({"schema": LIST_SCHEMA, "profiles": [profile_json(p) for p in profiles]}))
        return
    table = empty_table("name", "kind", "ranks per node", "curves", "error of the fit", "date", numeric=(2,))
    for profile in profiles:
        row = profile_json(profile)
        error = row["median_rel_error"]
        shown = "-" if error is None else f"median {error:.1%}, worst {row['max_rel_error']:.0%}"
        table.add_row(profile.name, profile.description, str(profile.ranks_per_node), row["basis"], shown, profile.date)
    out = console(sys.stdout)
    out.print(table)
    out.print(Text("\ncolrow hardware show NAME has sources and curves; --hardware also takes a file of your own."))


def show_hardware_command(name: str, out: str | None, as_json: bool) -> None:
    """``colrow hardware show NAME``."""
    check_drawable(out)
    profile = load_hardware(name)
    charts = [chart_of(profile, kind) for kind in COLLECTIVE_KINDS]
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
    medians = [group.median_rel_error for group in measured if group.median_rel_error is not None]
    worst = [group.max_rel_error for group in measured if group.max_rel_error is not None]
    return {
        "name": profile.name,
        "description": profile.description,
        "basis": "measured" if len(measured) == len(groups) else "structural" if not measured else
        f"{len(measured)} of {len(groups)} measured",
        "measured_curves": len(measured),
        "structural_curves": len(groups) - len(measured),
        "median_rel_error": sorted(medians)[len(medians) // 2] if medians else None,
        "max_rel_error": max(worst, default=None),
        "ranks_per_node": profile.ranks_per_node,
        "across_nodes": profile.inter_node is not None,
        "memory_gb": profile.memory_gb,
        "source": profile.source,
        "licence": profile.licence,
        "date": profile.date,
    }  # fmt: skip


def curves_json(profile: Hardware) -> list[dict[str, Any]]:
    """Every curve as points."""
    return [
        {"kind": kind, "size": size, "points": [
            {"bytes": at, "seconds": profile.collective_s(kind, at, size),
             "within_measured_range": profile.predicts_within(kind, at, size)}
            for at in _sizes_in_bytes(profile, kind)
        ]}
        for kind in COLLECTIVE_KINDS for size in group_sizes(profile, kind)
    ]  # fmt: skip


def group_sizes(profile: Hardware, kind: CollectiveKind) -> list[int]:
    """The group sizes with a curve of their own, and two nodes where the profile has a network between them."""
    sizes = [group.size for group in getattr(profile.collectives, kind).groups if group.size <= profile.ranks_per_node]
    return sizes + ([2 * profile.ranks_per_node] if profile.inter_node is not None else [])


def chart_of(profile: Hardware, kind: CollectiveKind) -> Chart:
    """Time against size of one kind, a curve per group size."""
    curves: list[Curve] = []
    for size in group_sizes(profile, kind):
        sizes = _sizes_in_bytes(profile, kind)
        points = [(float(at), profile.collective_s(kind, at, size)) for at in sizes]
        label = f"{size} ranks" if size <= profile.ranks_per_node else f"{size} ranks, two nodes"
        mark = str(size)[-1] if size < 10 else "abcdefghijklmnopqrstuvwxyz"[len(curves)]
        curves.append(Curve(label, mark, points, [profile.predicts_within(kind, at, size) for at in sizes]))
    return Chart(f"{kind} on {profile.name}", "bytes of the whole tensor", "time", curves, nbytes, seconds)


def _sizes_in_bytes(profile: Hardware, kind: CollectiveKind) -> list[int]:
    groups = getattr(profile.collectives, kind).groups
    smallest = max(1, min(group.min_bytes for group in groups) // BEYOND)
    octaves = math.log2(BEYOND * max(group.max_bytes for group in groups) / smallest)
    return [round(smallest * 2 ** (n / STEPS_PER_OCTAVE)) for n in range(math.ceil(octaves * STEPS_PER_OCTAVE) + 1)]


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
    for kind in COLLECTIVE_KINDS:
        collective = getattr(profile.collectives, kind)
        for group in collective.groups:
            measured = f"{group.size} ranks: {group.basis}, {nbytes(group.min_bytes)} to {nbytes(group.max_bytes)}"
            error = "" if group.median_rel_error is None else f", median error of the fit {group.median_rel_error:.1%}"
            worst = "" if group.max_rel_error is None else f", worst {group.max_rel_error:.0%}"
            facts.add_row(kind, f"{measured}{error}{worst} ({collective.implementation})")
    return facts
