"""``make bench-peers``: every hand-written plan of transformers beside colrow's, run on the same small model at tp 2.

For each model type whose configuration, or a part of it, has a ``base_model_tp_plan``, its small version is run on two
gloo ranks by transformers' own tensor parallelism, by colrow with the weights that transformers leaves whole pinned
whole, and by colrow's default plan. All three are checked against the dense model, and their executed collectives
counted. Rows are kept in ``docs/peer_plans.json``; a run goes on where the last one stopped. Exits with 1 where colrow
has more reductions or bytes than a right peer, is wrong, or refuses what the peer does right.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from functools import partial
from pathlib import Path
from typing import Any

from peer_page import SCHEMA, page, print_table, totals
from peer_rows import FAILURES, Row, Verdict, row_of, types_with_plans, verdict
from transformers.utils import logging

from colrow.rewrite.coverage import warm
from colrow.rewrite.coverage_children import Limits, run_limited
from colrow.rewrite.coverage_rows import Status, locked, versions

DOCS = Path(__file__).parent.parent.parent / "docs"


def main() -> int:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--types", default="", help="only these model types, by comma")
    parser.add_argument("--shard", default="1/1", help="i/n: only the i-th of n parts")
    parser.add_argument("--again", default="", help="run again rows with these verdicts, by comma; all: every row")
    parser.add_argument("--seconds", type=float, default=120.0, help="CPU seconds allowed per type and process")
    parser.add_argument("--memory-gb", type=float, default=6.0, help="memory allowed per process")
    parser.add_argument("--out", type=Path, default=DOCS, help="folder of peer_plans.json and PEER_PLANS.md")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended"))  # so that the child of the moment is ended too
    own = types_with_plans()
    known = sorted(own, key=lambda name: (not own[name], name))  # whole types first
    chosen = asked.types.split(",") if asked.types else known
    if unknown := sorted(set(chosen) - set(known)):
        parser.error(f"no hand-written plan for {', '.join(unknown)}")
    index, _, parts = asked.shard.partition("/")
    chosen = chosen[int(index) - 1 :: int(parts)]
    asked.out.mkdir(parents=True, exist_ok=True)
    file = asked.out / "peer_plans.json"
    sweep(chosen, own, file, tuple(asked.again.split(",")), Limits(asked.seconds, int(asked.memory_gb * 1e9)))
    rows = load(file)
    write_page(file, own)
    shown = {name: rows[name] for name in chosen if name in rows}
    print_table(shown)
    print(totals(shown, len(chosen)))
    return int(any(row["verdict"] in FAILURES for row in shown.values()))


def sweep(chosen: list[str], own: dict[str, bool], file: Path, again: tuple[str, ...], limits: Limits) -> None:
    """Run the types that have no row yet, one at a time in a child of its own, and save each row as it comes."""
    rows = load(file)
    due = [n for n in chosen if n not in rows or "all" in again or rows[n]["verdict"] in again]
    warm()
    logging.disable_progress_bar()
    tasks = [partial(row_of, name) for name in due]
    for done, (index, result) in enumerate(run_limited(tasks, limits, 1), 1):
        row: Row = dict(result.facts)
        if result.status is not Status.OK:  # the child did not come back
            row = {"verdict": Verdict.NOT_BUILT, "why": f"{result.status}: {result.reason}"}
        save(file, due[index], row | {"own": own[due[index]], "cpu_s": result.cpu_s})
        write_page(file, own)
        print(f"[{done}/{len(due)}] {due[index]}: {row['verdict']} {row['why']}", file=sys.stderr, flush=True)


def write_page(file: Path, own: dict[str, bool]) -> None:
    """Write ``PEER_PLANS.md`` beside ``file``, from its rows."""
    file.with_name("PEER_PLANS.md").write_text(page(load(file), own, versions()), encoding="utf-8")


def load(file: Path) -> dict[str, Any]:
    """Rows by model type, judged anew from what was measured."""
    rows: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else {}
    for row in rows.values():
        if "default" in row:
            row["verdict"], row["why"] = verdict(row)
    return rows


def save(file: Path, name: str, row: Row) -> None:
    """Put one row into the file; several runs may share it."""
    with locked(file):
        rows = load(file) | {name: row}
        text = json.dumps({"schema": SCHEMA, "rows": dict(sorted(rows.items()))}, indent=1)
        file.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    raise SystemExit(main())
