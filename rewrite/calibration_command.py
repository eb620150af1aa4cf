"""``colrow calibrate``: measure this machine's ranks, fit, say how good the fit is, and write a profile."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from rich.table import Table
from rich.text import Text

from colrow.cost_models.calibration import (
    FitError,
    Measurements,
    RankMeasurements,
    as_table,
    calibrated,
    fit_errors,
)
from colrow.cost_models.errors import UsageError
from colrow.cost_models.hardware import Hardware

from .answers import check_writable, json_text, written_whole
from .calibration import measure_on_rank
from .ranks import run_ranks
from .units import console, empty_table, nbytes, seconds

SCHEMA = "colrow.calibrate/1"
MOST_RANKS_A_PROCESSOR = 4  # each holds about half a gigabyte besides
LONGEST_S = 600.0  # of ranks that hang; measuring takes two minutes


def calibrate_command(ranks: int | None, out: str, as_json: bool) -> None:
    """``colrow calibrate``: starts the ranks, or is one of torchrun's."""
    check_writable(out)
    if Path(out).suffix != ".json":  # which is how --hardware tells a file from a name
        raise UsageError(f"--out {out}", "not a profile's name", got=Path(out).suffix or "no ending", need=".json")
    joined = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    size = _ranks(ranks, int(os.environ["WORLD_SIZE"]) if joined else None)
    if joined:
        found = _join()
        if int(os.environ["RANK"]) > 0:
            return
    else:
        found = run_ranks(measure_started, size, "gloo", (torch.cuda.device_count() >= size,), LONGEST_S)[0]
    measured = Measurements(ranks=size, date=date.today().isoformat(), **vars(found))
    print("fitting", file=sys.stderr)
    text, profile = calibrated(Path(out).stem, measured)
    errors = fit_errors(measured, profile)
    with written_whole(out) as path:
        path.write_text(text, encoding="utf-8")
    if as_json:
        print(json_text(_json(out, measured, errors)))
        return
    page = console(sys.stdout)
    page.print(_error_table(measured, errors))
    page.print(Text("\n".join(["", *_rates(profile), "", f"profile written: --hardware {out} uses it"])))


def _ranks(asked: int | None, started: int | None) -> int:
    """As many as asked for, torchrun started, or GPUs are here; else two.

    Raises:
        UsageError: One rank, which has nothing to communicate with, so many that they would mostly wait for a
            processor, or not as many as torchrun started.
    """
    gpus = torch.cuda.device_count()
    size = started or asked or (gpus if gpus > 1 else 2)
    if asked not in (None, size):
        raise UsageError("--ranks", "torchrun started another number of ranks", got=started, need=asked)
    if size < 2:
        raise UsageError("--ranks", "collectives need a group", got=size, need="2 or more")
    processors = os.cpu_count() or 1
    if size > gpus and size > MOST_RANKS_A_PROCESSOR * processors:
        raise UsageError(
            "--ranks",
            "so many ranks would measure how they take turns on the processors",
            got=size,
            need=f"at most {MOST_RANKS_A_PROCESSOR * processors}",
            remedy="Calibrate on a machine with a processor for each.",
        )
    if size > gpus and size > processors:
        print(f"note: {size} ranks share {processors} processors: times are theirs, not of a machine with more",
              file=sys.stderr)  # fmt: skip
    if gpus and size > gpus:
        print(f"note: {gpus} GPUs for {size} ranks, and NCCL needs one each: measuring CPU ranks", file=sys.stderr)
    return size


def measure_started(uses_cuda: bool) -> RankMeasurements:
    """On a rank that `run_ranks` started."""
    if uses_cuda:
        torch.cuda.set_device(dist.get_rank())
    return measure_on_rank(uses_cuda)


def _join() -> RankMeasurements:
    """On a rank that torchrun started."""
    uses_cuda = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))
    if uses_cuda:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = measure_on_rank(uses_cuda)
    dist.destroy_process_group()  # not after a failure: it would wait for the others
    return found


def _error_table(measured: Measurements, errors: list[FitError]) -> Table:
    heads = ("measured", "ranks", "smallest", "largest", "rows", "error", "worst", "one left out", "worst")
    table = empty_table(*heads, numeric=range(1, len(heads)))
    for error in errors:
        rows = measured.collectives.get(error.what, {}).get(error.size, [])  # type: ignore[call-overload]
        ends = [f"{nbytes(at)} {seconds(s)}" for at, s in (*rows[:1], *rows[-1:])] or ["", ""]
        left_out = ["", ""]
        if error.left_out_median is not None and error.left_out_max is not None:
            left_out = [f"{error.left_out_median:.1%}", f"{error.left_out_max:.0%}"]
        own = [f"{error.fit_median:.1%}", f"{error.fit_max:.0%}"]
        table.add_row(error.what, str(error.size), *ends, str(error.rows), *own, *left_out)
    return table


def _rates(profile: Hardware) -> list[str]:
    compute, memory = profile.compute, profile.memory
    lines = [
        f"{dtype:<9} {compute.peak_flops_per_s[dtype] / 1e9:.4g} GFLOPS at best, {share:.0%} of it on average"
        for dtype, share in compute.efficiency.items()
    ]
    lines.append(f"memory    {memory.bandwidth_bytes_per_s / 1e9:.3g} GB/s at best, {memory.efficiency:.0%} on average")
    lines.append(f"launch    {seconds(profile.launch_overhead_s)} an operator")
    return lines


def _json(out: str, measured: Measurements, errors: list[FitError]) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "profile": out,
        "ranks": measured.ranks,
        "device": measured.device,
        "implementation": measured.implementation,
        "errors": [asdict(error) for error in errors],
        "measured": as_table(measured),
    }
