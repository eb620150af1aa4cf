"""``make bench``: planning time, memory and step overhead against their ceilings; exits with 1 where one is missed.

Planning: CPU seconds and peak memory of cold processes, one per measurement; medians; imports are printed beside.
Steps: ``step_seconds.py``, in processes of their own.  ``run.py planning`` or ``run.py steps`` runs one half.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

HERE = Path(__file__).parent
CONFIGS = HERE.parent.parent / "examples" / "configs"
REPEATS = 3
PLANNING_S, SOLVER_S, LARGE_TO_SMALL, PEAK_BYTES, OVERHEAD = 4.0, 0.5, 1.5, 4e9, 1.1
CASES = {  # name: configuration, tp, phase, memory cap in GB
    "8B, prefill": ("llama-3.1-8b", 8, "prefill", 80),
    "8B, train": ("llama-3.1-8b", 8, "train", 200),
    "70B, prefill": ("llama-3.1-70b", 8, "prefill", 80),
    "405B, prefill": ("llama-3.1-405b", 8, "prefill", 200),
}
out = Console(width=max(100, Console().width))


@dataclass(frozen=True)
class Ceiling:
    """A measured figure and the most it may be."""

    what: str
    measured: float
    most: float
    unit: str = ""

    @property
    def is_met(self) -> bool:
        """Whether it is."""
        return self.measured <= self.most


def cold(script: str, *arguments: str) -> dict[str, Any]:
    """What a script prints, run in a new process with one thread."""
    command = [sys.executable, str(HERE / script), *arguments]
    ended = subprocess.run(
        command, capture_output=True, encoding="utf-8", env=os.environ | {"OMP_NUM_THREADS": "1"}, timeout=1200
    )
    if ended.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{ended.stderr[-3000:]}")
    found: dict[str, Any] = json.loads(ended.stdout.splitlines()[-1])
    return found


def planning() -> list[Ceiling]:
    """Measures planning."""
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in CASES}
    for _ in range(REPEATS):  # in turns
        for name, (config, tp, phase, memory_gb) in CASES.items():
            runs[name].append(
                cold("planning_seconds.py", str(CONFIGS / f"{config}.json"), str(tp), phase, str(memory_gb))
            )
    stages = list(runs["8B, prefill"][0]["stages_s"])
    table = Table("Llama-3.1, tp 8", "imports", *stages, "planning", "peak memory", "proven")
    table.title = f"Planning, CPU seconds of cold processes (median of {REPEATS})"
    medians: dict[str, dict[str, float]] = {}
    for name, found in runs.items():
        own = {stage: statistics.median(run["stages_s"][stage] for run in found) for stage in stages}
        for key in ("import_s", "total_s"):
            own[key] = statistics.median(run[key] for run in found)
        own["peak_rss_bytes"] = max(run["peak_rss_bytes"] for run in found)
        medians[name] = own
        table.add_row(
            name,
            f"{own['import_s']:.2f}",
            *(f"{own[stage]:.2f}" for stage in stages),
            f"{own['total_s']:.2f}",
            f"{own['peak_rss_bytes'] / 1e9:.2f} GB",
            "yes" if all(run["proven"] for run in found) else "NO",
        )
    out.print(table)
    small, large = medians["8B, prefill"], medians["405B, prefill"]
    return [
        Ceiling("planning Llama-3.1-8B, after imports", small["total_s"], PLANNING_S, "CPU s"),
        Ceiling("of that, the solver", small["solve"], SOLVER_S, "CPU s"),
        Ceiling("planning 405B over planning 8B", large["total_s"] / small["total_s"], LARGE_TO_SMALL, "x"),
        Ceiling("peak memory of planning 405B", large["peak_rss_bytes"] / 1e9, PEAK_BYTES / 1e9, "GB"),
    ]


def steps() -> list[Ceiling]:
    """Measures the overhead of rewritten models."""
    table = Table("model", "step", "colrow", "by hand", "ratio", "control", "error, colrow", "error, by hand")
    table.title = "A Llama on 2 gloo ranks, CPU ms per rank and step (medians, measured in turns)"
    table.caption = (
        "ratio: colrow over the mean of two hand-written ones, the median over the turns; "
        "control: the second of these over the first, whose distance from 1 is the noise"
    )
    ceilings = []
    for size in ("SMALL", "MIDDLE"):
        found = cold("step_seconds.py", size)
        errors = [f"{found['errors'][name]:.0e}" for name in ("colrow", "by hand")]
        for kind in ("forward", "forward and backward", "training step"):
            milliseconds = [f"{found['seconds'][f'{kind}/{name}'] * 1e3:.2f}" for name in ("colrow", "by hand")]
            ratio, control = (found["ratios"][f"{kind}/{name}"] for name in ("colrow", "control"))
            table.add_row(size.lower(), kind, *milliseconds, f"{ratio:.3f}", f"{control:.3f}", *errors)
            if kind != "forward and backward":
                ceilings.append(Ceiling(f"{kind}, {size.lower()}, over the hand-written one", ratio, OVERHEAD, "x"))
    out.print(table)
    return ceilings


def main(halves: list[str]) -> int:
    """Measures and compares; the exit code."""
    measurements = {"planning": planning, "steps": steps}
    ceilings = [c for name, measure in measurements.items() if not halves or name in halves for c in measure()]
    table = Table("ceiling", "measured", "at most", "")
    for c in ceilings:
        verdict = "[green]✓[/]" if c.is_met else "[red]missed[/]"
        table.add_row(c.what, f"{c.measured:.2f} {c.unit}", f"{c.most:g} {c.unit}", verdict)
    out.print(table)
    return 0 if all(c.is_met for c in ceilings) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
