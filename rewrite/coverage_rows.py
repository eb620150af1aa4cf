"""Rows of the coverage file: one per source, one result per stage, statuses from a closed list.

trace      the small version is built, traced and planned at tp 2
plan       the full default configuration is planned at tp 2, 4 and 8, on meta
verify     the small version runs at tp 2 and 4 against the dense one
generate   the small version generates at tp 2 what the dense one does
"""

from __future__ import annotations

import ast
import fcntl
import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.metadata import version
from pathlib import Path
from typing import Any

SCHEMA = "colrow.coverage/1"
STAGES = ("trace", "plan", "verify", "generate")
VERIFIED_TPS = (2, 4)
# Only what decides a result: not how rows are walked or printed, nor the other commands.
_UNCODED = (
    "coverage.py",
    "coverage_page.py",
    "coverage_children.py",
    "coverage_check.py",
    "cli.py",
    "commands.py",
    "display.py",
    "gate.py",
)


class Status(StrEnum):
    """How a stage, or a whole row, ended; there are no others."""

    OK = "ok"
    VERIFIED = "verified"  # a row: every stage that applies is ok
    PLANNED = "planned"  # a row: planned in full, its check has not been run
    TRACED = "traced"  # a row: its small version is planned, the rest has not been run
    NOT_RUN = "not run"
    NOT_APPLICABLE = "not applicable"
    NO_MODEL = "no model"  # a part of another type's configuration
    PACKAGE = "package missing"
    NOT_BUILT = "not built"  # the configuration, or its small version, makes no model
    INPUTS = "inputs refused"  # the model itself fails on the example inputs
    NOT_TRACED = "not traced"
    NOT_PLANNED = "not planned"
    REFUSED = "refused"  # translation validation: the rewritten model is not the planned one
    NOT_RUNNING = "does not run"  # a rank failed
    WRONG = "wrong"
    UNDECIDED = "undecided"  # the dense model itself moves as much when its weights change in the last digits
    WHOLE = "mostly whole"  # right, with under 90 % of the matmul bytes split
    TIMED_OUT = "timed out"
    MEMORY = "out of memory"
    CRASHED = "crashed"


OUTSIDE = (Status.NO_MODEL, Status.PACKAGE)  # these leave the denominator


@dataclass(frozen=True)
class StageResult:
    """What one stage found.

    Attributes:
        status: How it ended.
        reason: The first line of why it is not ok.
        code: Digest of the code that made it.
        cpu_s: CPU seconds it took.
        facts: What it measured, by stage (see `coverage_stages`).
    """

    status: Status
    reason: str = ""
    code: str = ""
    cpu_s: float = 0.0
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Row:
    """One source's results by stage."""

    source: str
    stages: dict[str, StageResult] = field(default_factory=dict)

    @property
    def head_class(self) -> str:
        """The class that was built; "" where none was."""
        return next((r.facts["class"] for r in self.stages.values() if "class" in r.facts), "")

    def result(self, stage: str) -> StageResult:
        """The result of a stage, ``not run`` where there is none."""
        return self.stages.get(stage, StageResult(Status.NOT_RUN))

    @property
    def status(self) -> Status:
        """The row's: that of its first stage that is not ok, wrong answers first."""
        found = [self.result(stage).status for stage in STAGES]
        for stage_status in (Status.WRONG, *OUTSIDE):
            if stage_status in found:
                return stage_status
        for done, stage_status in enumerate(found):
            if stage_status is Status.NOT_RUN:
                return (Status.NOT_RUN, Status.TRACED, Status.PLANNED, Status.PLANNED)[done]
            if stage_status not in (Status.OK, Status.NOT_APPLICABLE):
                return stage_status
        return Status.VERIFIED

    def is_stale(self, codes: Mapping[str, str]) -> bool:
        """Whether older code made any of it."""
        return any(result.code != codes[stage] for stage, result in self.stages.items())


def row_of(source: str, content: Mapping[str, Any]) -> Row:
    """A row as the file has it."""
    stages = {
        stage: StageResult(**{**content[stage], "status": Status(content[stage]["status"])})
        for stage in STAGES
        if stage in content
    }
    return Row(source, stages)


def load_rows(path: Path) -> dict[str, Row]:
    """The rows of a coverage file, none where there is no file."""
    if not path.exists():
        return {}
    content = json.loads(path.read_text(encoding="utf-8"))
    return {source: row_of(source, row) for source, row in content["rows"].items()}


def save_rows(path: Path, rows: Mapping[str, Row]) -> None:
    """Write a coverage file, one line a row, sorted: a change of one row is a change of one line."""
    lines = []
    for source in sorted(rows):
        row = rows[source]
        content = {"status": row.status} | {stage: asdict(row.stages[stage]) for stage in STAGES if stage in row.stages}
        lines.append(f"{json.dumps(source)}: {json.dumps(_finite(content), allow_nan=False)}")
    head = {"schema": SCHEMA, **versions()}
    whole = path.with_name(f"{path.name}.part")
    body = json.dumps(head)[:-1] + ', "rows": {\n' + ",\n".join(lines) + "\n}}\n"
    whole.write_text(body, encoding="utf-8")
    whole.replace(path)


def _finite(facts: Any) -> Any:
    """``facts`` with what JSON has no number for as null."""
    match facts:
        case dict():
            return {key: _finite(value) for key, value in facts.items()}
        case list() | tuple():
            return [_finite(value) for value in facts]
        case float() if not math.isfinite(facts):
            return None
    return facts


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One writer at a time: shards share the file."""
    with open(path.with_name(f".{path.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def versions() -> dict[str, str]:
    """Of the packages whose models and tracer the rows are about."""
    return {name: version(name).partition("+")[0] for name in ("transformers", "torch")}


def code_digests() -> dict[str, str]:
    """Stage -> digest of the code behind it: modules without comments and docstrings, and versions."""
    rewrite = Path(__file__).parent
    planning = [rewrite.parent / "cost_models", rewrite.parent / "planner", rewrite / "coverage_stages.py"]
    early = _digest(planning)
    late = _digest([*planning, rewrite])
    return {"trace": early, "plan": early, "verify": late, "generate": late}


def _digest(places: Iterable[Path]) -> str:
    files = sorted({file for place in places for file in (place.rglob("*.py") if place.is_dir() else [place])})
    digest = hashlib.sha256(json.dumps(versions()).encode())
    for file in files:
        if file.name not in _UNCODED:
            digest.update(_without_words(file.read_text(encoding="utf-8")).encode())
    return digest.hexdigest()[:12]


def _without_words(source: str) -> str:
    tree = ast.parse(source)
    for node in ast.walk(tree):
        match getattr(node, "body", None):
            case [ast.Expr(ast.Constant(str())), *rest]:
                node.body = rest  # type: ignore[attr-defined]
    return ast.dump(tree)
