"""Random modules by the thousand: planned, rewritten, validated, run on simulated ranks and compared.

    cd tests; python -m fuzz.run --modules 2000 --jobs 2

Every module is made from its seed. Results are written line by line, and a run goes on where the last one of the same
code stopped. A failing module is kept in the output folder: `tests/fuzz/reduce.py` makes it small, and small it belongs
in `tests/fuzz/found`, where it stays a test. Exits 1 where a goal is missed.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fuzz.check import Outcome, check
from fuzz.modules import generate
from fuzz.report import missed, report

ROOT = Path(__file__).parent.parent.parent
PER_CHILD = 20  # modules; a fresh process for every so many keeps memory down
LONGEST_S = 300.0  # of one module: far beyond what any takes
VERIFIED = 10  # every so many get the whole `verify`, optimiser steps included


def digest() -> str:
    """Of all the code that decides a result."""
    folders = [ROOT / name for name in ("planner", "rewrite", "cost_models", "tests/fuzz")]
    files = sorted(f for folder in folders for f in folder.rglob("*.py") if "found" not in f.parts)
    return hashlib.sha256(b"".join(f.read_bytes() for f in files)).hexdigest()[:16]


def tried(seed: int, folder: Path) -> Outcome:
    """One seed; the module stays in ``folder`` unless it is right."""
    path = folder / f"module_{seed}.py"
    path.write_text(generate(seed).source)
    signal.signal(signal.SIGALRM, _too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_S)
    try:
        outcome = check(path, seed, whole_verify=seed % VERIFIED == 0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    if outcome.status == "right":
        path.unlink()
    return outcome


def _too_long(*_: Any) -> None:
    raise TimeoutError(f"longer than {LONGEST_S:g} s")


def _batch(task: tuple[list[int], Path]) -> list[dict[str, Any]]:
    seeds, folder = task
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # torch logs what cannot be traced
        return [tried(seed, folder).as_dict() for seed in seeds]


def results(seeds: list[int], jobs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """Outcomes as they come, made by ``jobs`` processes."""
    batches = [(seeds[i : i + PER_CHILD], folder) for i in range(0, len(seeds), PER_CHILD)]
    with multiprocessing.get_context("fork").Pool(jobs, maxtasksperchild=1) as pool:
        for batch in pool.imap_unordered(_batch, batches):
            yield from batch


def main() -> int:
    """Runs what is missing and prints the report."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--modules", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0, help="the first")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "fuzz")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    lines = options.out / f"{digest()}.jsonl"
    known = [json.loads(line) for line in lines.read_text().splitlines()] if lines.exists() else []
    wanted = range(options.seed, options.seed + options.modules)
    done = {o["seed"]: Outcome(**o) for o in known if o["seed"] in wanted}
    started = time.monotonic()
    with open(lines, "a") as file:
        for result in results([s for s in wanted if s not in done], options.jobs, options.out):
            done[result["seed"]] = outcome = Outcome(**result)
            file.write(json.dumps(result) + "\n")
            file.flush()
            if outcome.status not in ("right", "invalid"):
                print(f"{outcome.status}: seed {outcome.seed}, tp {outcome.tp}: {outcome.reason[:300]}", flush=True)
            if len(done) % 100 == 0:
                print(f"{len(done)} of {options.modules}, {time.monotonic() - started:.0f} s", flush=True)
    outcomes = [done[seed] for seed in sorted(done)]
    print(report(outcomes))
    return int(bool(missed(outcomes)))


if __name__ == "__main__":
    raise SystemExit(main())
