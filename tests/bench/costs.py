"""``make bench-costs``: how far predictions lie from measurements nothing was fitted to; exits with 1 above a ceiling.

Per table and per machine, median and maximum of ``|predicted / measured - 1|``:

1. **size left out**: every interior row from the other rows of its table, beside log-log interpolation;
2. **group left out**: an interior size (4 of 2, 4 and 8) from its neighbours; the end sizes from the links, as nothing
   lies beyond them;
3. **structural**: from the links alone, on machines the constants were not fitted to, and between nodes;
4. **matmuls** by shape; 5. **published runs**, decode and prefill, with what the smallest tp fixes; those found after
   the model was finished are reported beside them, under no ceiling.

Ceilings hold for the figures marked below; the others are reported. ``costs.py tables`` prints every table,
``costs.py compare`` simpler models on the same rows, ``costs.py FILE.json`` scores tables of your own (the format of
`costs_tables.from_file`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from costs_baselines import alpha_beta, generation_of, log_log, nccl_tuning_s
from costs_runs import Run, published_runs
from costs_tables import DATA, STRUCTURAL_FITTED, Machine, from_file, held_out, shipped
from rich.console import Console
from rich.table import Table

from colrow.cost_models.communication import CollectiveKind, between_sizes
from colrow.cost_models.compute import matmul_bytes, matmul_flops, matmul_s
from colrow.cost_models.fit_profiles import load_table
from colrow.cost_models.hardware import load_hardware
from colrow.cost_models.measured_curve import Row, curve_through, left_out_errors
from colrow.cost_models.structural import has_structure, structural_s

SIZE_LEFT_OUT, GROUP_LEFT_OUT, STRUCTURAL = 0.03, 0.10, 0.25
RUNS_MEDIAN, RUNS_MAX = 0.10, 0.30
out = Console(width=max(110, Console().width))


@dataclass(frozen=True)
class Ceiling:
    """A measured figure and the most it may be."""

    what: str
    measured: float
    most: float

    @property
    def is_met(self) -> bool:
        """Whether it is; the slack is that of rounding."""
        return self.measured <= self.most * (1 + 1e-9)


def percent(errors: list[float]) -> tuple[str, str]:
    """Median and maximum, as shown."""
    return (f"{100 * median(errors):.1f} %", f"{100 * max(errors):.0f} %") if errors else ("", "")


def interior(rows: list[Row], predict: Callable[[list[Row], float], float]) -> list[float]:
    """Errors of each interior row, predicted from the others."""
    ordered = sorted(rows)
    return [
        abs(predict(ordered[:i] + ordered[i + 1 :], ordered[i][0]) / ordered[i][1] - 1)
        for i in range(1, len(ordered) - 1)
    ]


def size_left_out(machines: list[Machine]) -> list[Ceiling]:
    """Part 1."""
    ceilings = []
    elsewhere: list[float] = []
    log_log_elsewhere: list[float] = []
    table = Table("machine", "implementation", "tables", "median", "max", "log-log median", title="One size left out")
    for machine in machines:
        ours = [error for _, _, rows in machine.rows() for error in left_out_errors(rows)]
        theirs = [error for _, _, rows in machine.rows() for error in interior(rows, log_log)]
        count = sum(1 for _ in machine.rows())
        table.add_row(machine.name, machine.implementation, str(count), *percent(ours), percent(theirs)[0])
        what = f"size left out, {machine.name}, {machine.implementation}"
        if machine.on_nvswitch and machine.implementation == "library":
            ceilings.append(Ceiling(what, median(ours), SIZE_LEFT_OUT))
        else:
            elsewhere += ours
            log_log_elsewhere += theirs
    table.add_row("all but NCCL on NVSwitch", "", "", *percent(elsewhere), percent(log_log_elsewhere)[0])
    out.print(table)
    if elsewhere:
        what = "size left out, all but NCCL on NVSwitch, against log-log"
        ceilings.append(Ceiling(what, median(elsewhere), median(log_log_elsewhere)))
    return ceilings


def group_left_out(machines: list[Machine]) -> list[Ceiling]:
    """Part 2."""
    ceilings = []
    table = Table("machine", "implementation", "left out", "from", "median", "max", title="One group size left out")
    for machine in machines:
        inner: list[float] = []
        ends: dict[int, list[float]] = {}
        for kind, by_size in machine.tables.items():
            sizes = sorted(by_size)
            for below, size, above in zip(sizes, sizes[1:], sizes[2:], strict=False):
                curves = [curve_through(by_size[n]).line().seconds for n in (below, above)]
                predict = between_sizes(size, below, curves[0], above, curves[1])
                inner += [abs(predict(nbytes) / seconds - 1) for nbytes, seconds in by_size[size]]
            if machine.link is not None and machine.shipped and machine.implementation == "library":
                for size in {sizes[0], sizes[-1]}:
                    curve = structural_s(kind, size, machine.link)
                    ends.setdefault(size, []).extend(abs(curve(n) / seconds - 1) for n, seconds in by_size[size])
        if inner:
            table.add_row(machine.name, machine.implementation, "interior", "its neighbours", *percent(inner))
            if machine.on_nvswitch and machine.implementation == "library":
                ceilings.append(Ceiling(f"group left out, {machine.name}", median(inner), GROUP_LEFT_OUT))
        for size, errors in sorted(ends.items()):
            table.add_row(machine.name, machine.implementation, str(size), "the links", *percent(errors))
    out.print(table)
    return ceilings


def structural(machines: list[Machine]) -> list[Ceiling]:
    """Part 3."""
    ceilings = []
    table = Table(
        "machine",
        "implementation",
        "kind",
        "fitted to it",
        "median",
        "max",
        title="Structural model, from the links alone",
    )
    for machine in machines:
        if machine.link is None or "gloo" in machine.software:
            continue
        if not has_structure("all_reduce", machine.link, machine.implementation):
            continue
        fitted = machine.shipped and machine.name in STRUCTURAL_FITTED
        for kind, by_size in machine.tables.items():
            errors: list[float] = []
            for size, rows in by_size.items():
                curve = structural_s(kind, size, machine.link, machine.implementation)
                errors += [abs(curve(nbytes) / seconds - 1) for nbytes, seconds in rows]
            table.add_row(machine.name, machine.implementation, kind, "yes" if fitted else "", *percent(errors))
            ceiled = machine.on_nvswitch and machine.implementation == "library"
            if ceiled and kind == "all_reduce" and not fitted:
                ceilings.append(Ceiling(f"structural all_reduce, {machine.name}", median(errors), STRUCTURAL))
    if table.rows:
        out.print(table)
    return ceilings


def between_nodes() -> None:
    """Part 3, over two nodes: reported, as the network of the one table with a licence is not documented."""
    table = Table(
        "machine", "ranks on 2 nodes", "median", "max", "measured / predicted", title="Between nodes, by formula"
    )
    hardware = load_hardware("a100-sxm")
    for other in load_table(hardware.name)["alternatives"]:
        for key, rows in other["rows"].items():
            size = int(key.split("/")[0])
            if "/" not in key and size <= hardware.ranks_per_node:
                continue
            ratios = [us * 1e-6 / hardware.collective_s(other["kind"], n, size, nodes=2) for n, us in rows]
            errors = percent([abs(1 / ratio - 1) for ratio in ratios])
            table.add_row(hardware.name, str(size), *errors, f"{min(ratios):.1f} to {max(ratios):.1f}")
    out.print(table)


def matmuls() -> None:
    """Part 4."""
    table = Table(
        "machine", "rows", "median", "max", "m <= 16", "median of m > 16", title="Matmuls by shape (bfloat16)"
    )
    for entry in json.loads((DATA / "matmuls.json").read_text("utf-8"))["tables"]:
        hardware = load_hardware(entry["hardware"])
        errors, small, large = [], [], []
        for m, n, k, us in entry["rows"]:
            predicted = matmul_s(matmul_flops(m, n, k), matmul_bytes(m, n, k, 2), m * n, "bfloat16", hardware)
            errors.append(abs(predicted / (us * 1e-6) - 1))
            (small if m <= 16 else large).append(errors[-1])
        table.add_row(hardware.name, str(len(errors)), *percent(errors), percent(small)[0], percent(large)[0])
    out.print(table)


def runs(verbose: bool) -> list[Ceiling]:
    """Part 5."""
    groups, every = published_runs()
    table = Table("runs", "predicted", "median", "max", "best tp", "work factor", title="Published runs, end to end")
    ceilings: list[Ceiling] = []
    scored: list[float] = []
    wrong = 0
    for group in groups:
        mine = [run for run in every if run.group == group["name"]]
        errors = [error for run in mine for error in run.errors()]
        right = sum(run.picks_best for run in mine)
        factors = f"{min(run.factor for run in mine):.2f} to {max(run.factor for run in mine):.2f}"
        table.add_row(group["name"], str(len(errors)), *percent(errors), f"{right} of {len(mine)}", factors)
        scored += errors
        wrong += len(mine) - right
        ceilings.append(Ceiling(f"published runs of {group['name']}, median", median(errors), RUNS_MEDIAN))
    table.add_row("all", str(len(scored)), *percent(scored), f"{len(every) - wrong} of {len(every)}", "")
    out.print(table)
    later = held_out_runs()
    for run in [*every, *later] if verbose else ():
        shown = ", ".join(
            f"tp {tp}: {1e3 * run.measured_s[tp]:.0f} measured, {1e3 * run.predicted_s[tp]:.0f} predicted"
            for tp in sorted(run.measured_s)
        )
        out.print(f"  {run.group}, {run.what} (ms): {shown}", highlight=False)
    return [
        *ceilings,
        Ceiling("published runs, max", max(scored), RUNS_MAX),
        Ceiling("published runs, wrong best tp", wrong, 0),
    ]


def held_out_runs() -> list[Run]:
    """Part 5, of runs found after the model was finished: reported as they come, under no ceiling."""
    groups, every = published_runs("held_out")
    table = Table(
        "runs", "by tp", "errors", "best tp", "work factor", title="Published runs found later, nothing chosen"
    )
    for group in groups:
        for run in (run for run in every if run.group == group["name"]):
            best = "right" if run.picks_best else "wrong"
            sizes = ", ".join(str(tp) for tp in sorted(run.measured_s))
            errors = ", ".join(f"{100 * error:.0f} %" for error in run.errors())
            table.add_row(f"{run.group}: {run.what}", sizes, errors, best, f"{run.factor:.2f}")
    out.print(table)
    return every


def each_table(machines: list[Machine]) -> None:
    """Every table by itself."""
    table = Table("machine", "implementation", "kind", "ranks", "median", "max", "log-log median", title="By table")
    for machine in machines:
        for kind, size, rows in machine.rows():
            ours, theirs = left_out_errors(rows), interior(rows, log_log)
            table.add_row(machine.name, machine.implementation, kind, str(size), *percent(ours), percent(theirs)[0])
    out.print(table)


def compare(machines: list[Machine]) -> None:
    """Simpler models on the same rows: interior rows left out wherever a model has something to fit."""
    table = Table(
        "machine", "rows", "this model", "log-log", "alpha-beta", "NCCL's tuning", "structural", title="Median"
    )
    for machine in machines:
        if machine.implementation != "library" or not machine.rows():
            continue
        mine, lines, one, nccl, links = [], [], [], [], []
        for kind, size, rows in machine.rows():
            mine += left_out_errors(rows)
            lines += interior(rows, log_log)
            one += interior(rows, _alpha_beta_s)
            inner = sorted(rows)[1:-1]
            if machine.on_nvswitch:
                nccl += _tuning_errors(machine.name, kind, size, inner)
            if machine.link is not None and "gloo" not in machine.software:
                links += [abs(structural_s(kind, size, machine.link)(n) / seconds - 1) for n, seconds in inner]
        shown = [percent(errors)[0] for errors in (mine, lines, one, nccl, links)]
        table.add_row(machine.name, str(len(mine)), *shown)
    out.print(table)


def _alpha_beta_s(rows: list[Row], nbytes: float) -> float:
    latency_s, s_per_byte = alpha_beta(rows)
    return latency_s + s_per_byte * nbytes


def _tuning_errors(name: str, kind: CollectiveKind, size: int, rows: list[Row]) -> list[float]:
    predicted = [(nccl_tuning_s(kind, size, nbytes, generation_of(name)), seconds) for nbytes, seconds in rows]
    return [abs(guess / seconds - 1) for guess, seconds in predicted if guess is not None]


def main(arguments: list[str]) -> int:
    """Print the parts; 1 where a ceiling is missed."""
    if arguments and arguments[0].endswith(".json"):
        machines = from_file(arguments[0])
        each_table(machines)
        ceilings = size_left_out(machines) + group_left_out(machines) + structural(machines)
    else:
        machines = shipped() + held_out()
        if arguments == ["compare"]:
            compare(machines)
            return 0
        if arguments == ["tables"]:
            each_table(machines)
        ceilings = size_left_out(machines) + group_left_out(machines) + structural(machines)
        between_nodes()
        matmuls()
        ceilings += runs(verbose=arguments == ["runs"])
    missed = [ceiling for ceiling in ceilings if not ceiling.is_met]
    for ceiling in missed:
        out.print(
            f"[bold red]missed[/]: {ceiling.what}: {100 * ceiling.measured:.2f} %, at most {100 * ceiling.most:.2f} %"
        )
    out.print(f"{len(ceilings) - len(missed)} of {len(ceilings)} ceilings met")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
