"""A dozen rows of the committed coverage file, chosen by the commit, run again: CI fails where one is another.

python -m colrow.rewrite.coverage_check docs/coverage.json COMMIT
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .coverage import warm
from .coverage_children import Limits, run_limited
from .coverage_rows import STAGES, Row, StageResult, Status, code_digests, load_rows

ROWS = 12
CPU_S = 120.0  # of all rows together, by what the file says they took
LIMITS = Limits(60, int(4e9))


def chosen(rows: Mapping[str, Row], commit: str, codes: Mapping[str, str]) -> list[tuple[str, str]]:
    """A dozen ``(source, stage)``, the same for the same commit: stages that this code ran to their end, in the order
    of a hash, as long as together they take `CPU_S`. Stale ones are marked in the file, and prove nothing here."""
    done = [
        (source, stage)
        for source, row in rows.items()
        for stage in STAGES
        if row.result(stage).status not in (Status.NOT_RUN, Status.TIMED_OUT, Status.MEMORY)
        and row.result(stage).code == codes[stage]
    ]
    done.sort(key=lambda pair: hashlib.sha256(f"{commit} {pair}".encode()).digest())
    picked: list[tuple[str, str]] = []
    left = CPU_S
    for source, stage in done:
        took = rows[source].result(stage).cpu_s
        if took <= left and source not in {one for one, _ in picked}:
            picked.append((source, stage))
            left -= took
        if len(picked) == ROWS:
            break
    return picked


def difference(found: StageResult, kept: StageResult) -> str:
    """What is not as it was; "" where all is. Seconds and the size of rounding errors may differ."""
    if found.status is not kept.status:
        return f"{kept.status} was, {found.status} is: {found.reason}"
    mine, theirs = _compared(found.facts), _compared(kept.facts)
    names = sorted(name for name in {*mine, *theirs} if mine.get(name) != theirs.get(name))
    return "" if not names else f"{names[0]}: {theirs.get(names[0])} was, {mine.get(names[0])} is"


def _compared(facts: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name: {key: part for key, part in value.items() if key != "error"} if isinstance(value, dict) else value
        for name, value in facts.items()
    }


def check(file: Path, commit: str) -> list[str]:
    """One line per row that is not what the file says."""
    from .coverage_stages import result_of

    rows = load_rows(file)
    picked = chosen(rows, commit, code_digests())
    if not picked:
        print("no row of the file was made by this code: nothing to compare", flush=True)
    warm()
    tasks = [lambda s=source, t=stage: result_of(t, s, rows[s]) for source, stage in picked]
    wrong = []
    for index, result in run_limited(tasks, LIMITS, 1):
        source, stage = picked[index]
        line = difference(result, rows[source].result(stage))
        print(f"{source} {stage}: {line or 'as committed'} ({result.cpu_s:.1f} CPU s)", flush=True)
        wrong += [line] if line else []
    return wrong


def main() -> None:
    """Exit 1 where a row differs."""
    file = Path(sys.argv[1] if len(sys.argv) > 1 else "docs/coverage.json")
    commit = sys.argv[2] if len(sys.argv) > 2 else subprocess.check_output(["git", "rev-parse", "HEAD"], text=True)
    sys.exit(1 if check(file, commit.strip()) else 0)


if __name__ == "__main__":
    main()
