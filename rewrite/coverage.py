"""``colrow coverage``: every model type of the installed transformers, or a list of sources, stage by stage.

Rows are kept in ``coverage.json`` and are run again only where the code behind them is another; shards and several
runs at a time share the file.
"""

from __future__ import annotations

import fnmatch
import gc
import sys
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

import torch

from colrow.cost_models.errors import UsageError

from .coverage_children import Limits, run_limited
from .coverage_page import page
from .coverage_rows import (
    OUTSIDE,
    STAGES,
    Row,
    StageResult,
    Status,
    code_digests,
    load_rows,
    locked,
    save_rows,
    versions,
)

FILE, PAGE = "coverage.json", "COVERAGE.md"


def coverage(
    sources: Sequence[str],
    *,
    stages: Sequence[str] = STAGES,
    shard: tuple[int, int] = (1, 1),
    statuses: Collection[str] = (),
    folder: Path,
    limits: Limits,
    jobs: int = 1,
) -> None:
    """Run the stages that have no result of this code yet, cheapest stage first.

    Args:
        sources: ``package.module:factory`` names or patterns of ``hf:`` types; none: all types of transformers.
        stages: Of `coverage_rows.STAGES`.
        shard: ``(i, n)``: only the i-th of n parts.
        statuses: Only stages that ended this way before, by whatever code; none: all that are new or stale.
        folder: Where ``coverage.json`` and ``COVERAGE.md`` are.
        limits: Of each stage of each source.
        jobs: Children at a time.
    """
    codes = code_digests()
    warm()
    file = folder / FILE
    folder.mkdir(parents=True, exist_ok=True)
    chosen = chosen_sources(sources)[shard[0] - 1 :: shard[1]]
    _announce(file, chosen)
    for stage in (stage for stage in STAGES if stage in stages):
        _run_stage(stage, chosen, file, codes, statuses, limits, jobs)
    write_page(folder, codes)


def coverage_command(
    sources: tuple[str, ...],
    stages: tuple[str, ...],
    shard: tuple[int, int],
    statuses: tuple[str, ...],
    folder: str,
    seconds: float,
    memory_gb: float,
    jobs: int,
) -> None:
    """``colrow coverage``.

    Raises:
        UsageError: An unknown status.
    """
    for status in statuses:
        if status not in tuple(Status):
            raise UsageError(f"--status {status}", "unknown status", need=" | ".join(Status))
    coverage(
        sources,
        stages=stages,
        shard=shard,
        statuses=statuses,
        folder=Path(folder),
        limits=Limits(seconds, int(memory_gb * 1e9)),
        jobs=jobs,
    )


def chosen_sources(given: Sequence[str]) -> list[str]:
    """All ``hf:`` types, those that match the given patterns, and the given factories.

    Raises:
        UsageError: A pattern matches no type.
    """
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    types = sorted(f"hf:{name}" for name in CONFIG_MAPPING.keys())  # noqa: SIM118 - it is no dict
    if not given:
        return types
    chosen = []
    for name in given:
        found = fnmatch.filter(types, name) if name.startswith("hf:") else [name]
        if not found:
            raise UsageError(name, "no model type of the installed transformers matches it", need="hf:PATTERN")
        chosen += found
    return list(dict.fromkeys(chosen))


def write_page(folder: Path, codes: Mapping[str, str]) -> None:
    """Write ``COVERAGE.md`` from ``coverage.json``."""
    (folder / PAGE).write_text(page(load_rows(folder / FILE), codes, versions()), encoding="utf-8")


def warm() -> None:
    """Import and run once what every child needs; no thread may be left behind, or forking would be unsafe."""
    import transformers  # noqa: F401

    from colrow.planner.planning import plan

    from . import coverage_stages  # noqa: F401

    torch.set_num_threads(1)
    linear = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
    plan(linear, (torch.zeros(1, 8),), tp=2)
    gc.freeze()  # what is here now is no garbage: children need not look at it, nor copy its pages


def _announce(file: Path, sources: Sequence[str]) -> None:
    """Every source has a row, so that what has not been run is listed as that."""
    with locked(file):
        rows = load_rows(file)
        save_rows(file, rows | {source: Row(source) for source in sources if source not in rows})


def _run_stage(
    stage: str,
    sources: Sequence[str],
    file: Path,
    codes: Mapping[str, str],
    statuses: Collection[str],
    limits: Limits,
    jobs: int,
) -> None:
    from .coverage_stages import result_of

    rows = load_rows(file)
    due = [s for s in sources if is_due(rows[s], stage, codes[stage], statuses)]
    start = time.monotonic()
    tasks = [lambda source=source: result_of(stage, source, rows[source]) for source in due]
    for done, (index, result) in enumerate(run_limited(tasks, limits, jobs), 1):
        source = due[index]
        _keep(file, source, stage, StageResult(result.status, result.reason, codes[stage], result.cpu_s, result.facts))
        left = (time.monotonic() - start) / done * (len(due) - done) / 60
        line = f"{stage} {done}/{len(due)} {source}: {result.status} {result.reason[:100]}"
        print(f"{line} ({result.cpu_s:.1f} CPU s, {left:.0f} min left)", file=sys.stderr, flush=True)


def is_due(row: Row, stage: str, code: str, statuses: Collection[str]) -> bool:
    """Whether a stage of a row is to be run: what it builds on ended well, and its result is none or old."""
    before = row.result("trace").status
    if stage != "trace" and before in OUTSIDE:
        return False
    if stage in ("verify", "generate") and before not in (Status.OK, Status.NOT_RUN):
        return False
    if statuses:
        return row.result(stage).status in statuses
    return row.result(stage).code != code


def _keep(file: Path, source: str, stage: str, result: StageResult) -> None:
    with locked(file):
        rows = load_rows(file)
        rows[source].stages[stage] = result
        save_rows(file, rows)
