"""``colrow sweep``: predictions over tp, batch, length and machines, where they cross over, and what to do."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

from rich.console import Console
from rich.table import Table
from rich.text import Text

from colrow.cost_models.hardware import Hardware, load_hardware

from .answers import json_text
from .chart_images import check_drawable, draw
from .charts import Chart, Curve, text_of
from .sweep_crossovers import Crossover, crossovers
from .sweep_points import Axes, Point, Setting, sweep_points, without_repeats
from .sweep_verdict import Verdict, efficiency, verdict
from .units import console, empty_table, nbytes, seconds

SCHEMA = "colrow.sweep/1"
MARKS = "12345678abcdefghijklmnopqrstuvwxyz"
VARIED = ("batch", "seq", "link_speed")
WORDS = {"batch": "batch", "seq": "length", "link_speed": "link speed", "tp": "tp"}


def sweep_command(
    source: str,
    tp: tuple[int, ...],
    batch: tuple[int, ...],
    seq: tuple[int, ...],
    hardware: tuple[str, ...],
    link_speed: tuple[float, ...],
    phase: Literal["prefill", "decode", "train"],
    dtype: str,
    sequence_parallel: str,
    checkpointing: Literal["none", "blocks"],
    memory_gb: float | None,
    out: str | None,
    as_json: bool,
) -> None:
    """``colrow sweep``."""
    check_drawable(out)
    profiles = tuple(load_hardware(name) for name in hardware)
    axes = without_repeats(Axes(tp, batch, seq, profiles, link_speed))
    splits: dict[str, bool | Literal["auto"]] = {"off": False, "on": True, "auto": "auto"}
    with Console(stderr=True).status("") as status:
        points = list(
            sweep_points(
                source, phase, dtype, axes, splits[sequence_parallel], memory_gb, checkpointing, said=status.update
            )
        )
    found = crossovers(points)
    verdicts = _verdicts(points, {profile.name: profile for profile in axes.hardware})
    charts = charts_of(points, phase)
    if out is not None:
        draw(charts, out)
        print(f"charts written to {out}", file=sys.stderr)
    if as_json:
        print(json_text(sweep_json(source, phase, points, found, verdicts)))
        return
    page = console(sys.stdout)
    page.print(Text(f"{source}, {phase}, {dtype}: predicted, per step", style="bold"))
    for hardware_name in dict.fromkeys(p.setting.hardware for p in points):
        page.print()
        page.print(_table(hardware_name, [p for p in points if p.setting.hardware == hardware_name]))
    for chart in charts:
        page.print()
        page.print(Text(text_of(chart)), soft_wrap=True)
    page.print()
    page.print(Text("\n".join(_notes(points))))
    if found:
        page.print(Text("\n".join(["", "Crossovers", *(f"  {_words(one, points)}" for one in found)])))
    for at, said in verdicts:
        page.print()
        page.print(Text(_place(at, points), style="bold"))
        page.print(Text(said.words))
    if len(verdicts) > 1:
        page.print()
        page.print(Text("\n".join(in_short(verdicts)), style="bold"))


def _verdicts(points: Sequence[Point], profiles: dict[str, Hardware]) -> list[tuple[Setting, Verdict]]:
    """One per machine, link speed, batch and length; the setting is that of its first point."""
    groups: dict[tuple[object, ...], list[Point]] = {}
    for point in points:
        s = point.setting
        groups.setdefault((s.hardware, s.link_speed, s.batch, s.seq), []).append(point)
    return [(group[0].setting, verdict(group, profiles[group[0].setting.hardware])) for group in groups.values()]


def in_short(verdicts: Sequence[tuple[Setting, Verdict]]) -> list[str]:
    """One line per machine: which tp, at how many of its settings."""
    lines = []
    for name in dict.fromkeys(at.hardware for at, _ in verdicts):
        found = [said for at, said in verdicts if at.hardware == name]
        counts = Counter("nothing fits" if said.tp is None else f"tp {said.tp}" for said in found)
        each = [tp if len(counts) == 1 else f"{tp} at {n} of {len(found)} settings" for tp, n in counts.most_common()]
        lines.append(f"In short, on {name}: {', '.join(each)}.")
    return lines


def smallest_of(point: Point, points: Sequence[Point]) -> Point:
    """What a point's efficiency is relative to: the smallest tp that fits, else the smallest, all else equal."""
    s = point.setting
    alike = [
        p for p in points
        if p.plan is not None
        and (p.setting.hardware, p.setting.link_speed, p.setting.batch, p.setting.seq)
        == (s.hardware, s.link_speed, s.batch, s.seq)
    ]  # fmt: skip
    return min(alike, key=lambda p: (not p.fits, p.setting.tp))


def _table(name: str, points: Sequence[Point]) -> Table:
    varied = _varied(points)
    heads = [WORDS[axis] for axis in varied] + [
        "tp",
        "step",
        "tokens/s",
        "compute",
        "comm",
        "R",
        "R = 1 at",
        "memory",
        "efficiency",
    ]
    table = empty_table(*heads, f"on {name}", numeric=range(len(heads)))
    for point in points:
        at = [f"{getattr(point.setting, axis):g}" for axis in varied] + [str(point.setting.tp)]
        if point.plan is None:
            table.add_row(*at, *[""] * 8, "no plan")
            continue
        notes = ["" if point.fits else "does not fit", "R > 1" if point.ratio > 1 else "", _known(point)]
        table.add_row(
            *at,
            seconds(point.step_s),
            f"{point.tokens / point.step_s:,.0f}",
            seconds(point.compute_s),
            seconds(point.comm_s),
            f"{point.ratio:.2f}",
            "" if point.link_speed_of_one is None else f"{point.link_speed_of_one:.2g}x",
            nbytes(point.memory_bytes),
            f"{efficiency(point, smallest_of(point, points)):.0%}",
            ", ".join(note for note in notes if note),
            style="dim" if not point.fits else "",
        )
    return table


def _known(point: Point) -> str:
    """How well the communication time is known."""
    basis = point.basis
    error = "" if basis.rel_error is None else f"comm +-{basis.rel_error:.0%}"
    if basis.unmeasured < 0.005:
        return error
    rest = f"{basis.unmeasured:.0%} of comm not measured" if basis.unmeasured < 0.995 else "comm not measured"
    return f"{error}, {rest}" if error else rest


def _notes(points: Sequence[Point]) -> list[str]:
    lines = [
        "R = T_comm / T_comp; R = 1 at: the multiple of the profile's link bandwidth where R would be one."
        " Efficiency: speed per rank, relative to the smallest tp that fits."
    ]
    findings = dict.fromkeys(finding for point in points for finding in point.basis.findings)
    lines += [f"Not measured: {finding}" for finding in findings]
    refused = dict.fromkeys((p.setting.tp, p.setting.hardware, p.refusal) for p in points if p.plan is None)
    return lines + [f"No plan at tp {tp} on {name}: {refusal}" for tp, name, refusal in refused]


def _words(crossover: Crossover, points: Sequence[Point]) -> str:
    before, after, axis = crossover.before, crossover.after, crossover.axis
    between = f"between {WORDS[axis]} {getattr(before, axis):g} and {getattr(after, axis):g}"
    others = [name for name in ("tp", *_varied(points)) if name != axis]
    place = ", ".join([before.hardware, *(f"{WORDS[name]} {getattr(before, name):g}" for name in others)])
    if crossover.what == "plan":
        return f"the plan changes {between} ({place}): {crossover.change}"
    about = "" if crossover.at is None else f", at about {crossover.at:.3g}"
    return f"R crosses one {between}{about} ({place}): {crossover.change}"


def _place(at: Setting, points: Sequence[Point]) -> str:
    return ", ".join([at.hardware, *(f"{WORDS[axis]} {getattr(at, axis):g}" for axis in _varied(points))])


def _varied(points: Sequence[Point]) -> list[str]:
    """The axes beside tp and hardware that have several values."""
    return [axis for axis in VARIED if len({getattr(p.setting, axis) for p in points}) > 1]


# ---- charts


def charts_of(points: Sequence[Point], phase: str) -> list[Chart]:
    """Per machine: step time against tp; and R along every other axis that varies, at the first of the others."""
    charts = []
    for name in dict.fromkeys(p.setting.hardware for p in points):
        planned = [p for p in points if p.setting.hardware == name and p.plan is not None]
        if len({p.setting.tp for p in planned}) > 1:
            curves = _curves(planned, "tp", "step_s")
            charts.append(Chart(f"Step time on {name}", "tp", "time", curves, _number, seconds, "does not fit"))
        for axis in VARIED:
            talking = [p for p in _first_of(planned, [other for other in VARIED if other != axis]) if p.ratio > 0]
            if len({getattr(p.setting, axis) for p in talking}) > 1:
                at = [f"{WORDS[o]} {getattr(talking[0].setting, o):g}" for o in VARIED if o not in (axis, "link_speed")]
                label = "tokens in the cache" if axis == "seq" and phase == "decode" else WORDS[axis]
                curves = _curves(talking, axis, "ratio")
                title = f"R = T_comm / T_comp on {name}, {', '.join(at)}"
                charts.append(Chart(title, label, "R", curves, _number, _number, "does not fit", 1.0))
    return charts


def _first_of(points: Sequence[Point], axes: Sequence[str]) -> list[Point]:
    """Those with the first point's values on ``axes``."""
    return [p for p in points if all(getattr(p.setting, a) == getattr(points[0].setting, a) for a in axes)]


def _curves(points: Sequence[Point], axis: str, of: str) -> list[Curve]:
    others = [name for name in ("tp", *VARIED) if name != axis]
    lines: dict[tuple[float, ...], list[Point]] = {}
    for point in points:
        lines.setdefault(tuple(getattr(point.setting, name) for name in others), []).append(point)
    shown = [n for n, _ in enumerate(others) if len({key[n] for key in lines}) > 1]
    curves = []
    for mark, (key, line) in zip(MARKS, lines.items(), strict=False):
        label = ", ".join(f"{WORDS[others[n]]} {key[n]:g}" for n in shown) or "predicted"
        values = [(float(getattr(p.setting, axis)), float(getattr(p, of))) for p in line]
        curves.append(Curve(label, mark, values, [p.fits for p in line]))
    return curves


def _number(value: float) -> str:
    return f"{value:.3g}"


# ---- JSON


def sweep_json(
    source: str,
    phase: str,
    points: Sequence[Point],
    found: Sequence[Crossover],
    verdicts: Sequence[tuple[Setting, Verdict]],
) -> dict[str, Any]:
    """What ``sweep --json`` prints."""
    return {
        "schema": SCHEMA,
        "source": source,
        "phase": phase,
        "points": [_point_json(point, points) for point in points],
        "crossovers": [asdict(crossover) for crossover in found],
        "verdicts": [
            {key: value for key, value in asdict(at).items() if key != "tp"} | asdict(said) for at, said in verdicts
        ],
    }


def _point_json(point: Point, points: Sequence[Point]) -> dict[str, Any]:
    named = asdict(point.setting)
    if point.plan is None:
        return {**named, "refusal": point.refusal}
    return {
        **named,
        "refusal": None,
        "fits": point.fits,
        "step_s": point.step_s,
        "compute_s": point.compute_s,
        "optimizer_s": point.plan.cost.optimizer_s,
        "comm_s": point.comm_s,
        "comm_latency_s": point.empty_s,
        "comm_transfer_s": point.transfer_s,
        "comm_local_moves_s": point.moves_s,
        "comm_basis": asdict(point.basis),
        "ratio": point.ratio,
        "link_speed_where_ratio_is_one": point.link_speed_of_one,
        "tokens": point.tokens,
        "tokens_per_s": point.tokens / point.step_s,
        "memory_bytes": point.memory_bytes,
        "memory_bytes_by_kind": dict(point.plan.memory_bytes),
        "efficiency": efficiency(point, smallest_of(point, points)),
        "two_nodes_s": point.two_nodes_s,
        "proven": point.plan.cost.proven,
        "digest": point.plan.digest,
    }
