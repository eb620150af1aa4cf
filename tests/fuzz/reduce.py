"""Makes a failing module small: lines are left out, and expressions replaced by earlier names, while it fails alike.

cd tests; python -m fuzz.reduce failing.py small.py
"""

from __future__ import annotations

import ast
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from fuzz.check import Outcome, check


def kind(outcome: Outcome) -> str:
    """What a failure is, without the names and numbers of one module."""
    reason = re.sub(r"'[^']*'|[\w.]*\d[\w.]*|\bm\b|\[.*?\]|\(.*?\)", "#", outcome.reason)
    if outcome.status == "wrong":
        reason = reason.split(" on ")[0].split(" ")[0]
    return f"{outcome.status} {reason}"[:120]


def reduced(source: str, fails: str = "", rounds: int = 6) -> str:
    """The smallest module found that fails as ``source`` does."""
    with tempfile.TemporaryDirectory() as folder:
        tries = 0

        def outcome_of(text: str) -> str:
            nonlocal tries
            tries += 1
            path = Path(folder) / f"try{tries}.py"
            path.write_text(text)
            return kind(check(path))

        wanted = fails or outcome_of(source)
        for _ in range(rounds):
            before = source
            for change in _changes(source):
                made = change(source)
                if made is not None and made != source and _compiles(made) and outcome_of(made) == wanted:
                    source = made
            if source == before:
                break
    return source


def _compiles(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


class _Change:
    """One attempt at one line, known by its text."""

    def __init__(self, line: str, to: str | None) -> None:
        self.line, self.to = line, to

    def __call__(self, source: str) -> str | None:
        lines = source.split("\n")
        if self.line not in lines:
            return None
        at = lines.index(self.line)
        return "\n".join(lines[:at] + ([] if self.to is None else [self.to]) + lines[at + 1 :])


def _changes(source: str) -> Iterator[_Change]:
    lines = source.split("\n")
    start = next(i for i, line in enumerate(lines) if line.startswith("class "))
    yield _Change(next(line for line in lines if line.startswith("TP = ")), "TP = 2")
    yield _Change("TRAINING = True", "TRAINING = False")
    yield _Change('PHASE = "prefill"', 'PHASE = "train"')
    for at in range(len(lines) - 1, start, -1):
        line = lines[at]
        if not line.strip() or line.lstrip().startswith(("class", "def", "super")):
            continue
        yield _Change(line, None)
        assigned = re.match(r"(\s+)(return|\w+ =) (.+)$", line)
        if assigned:
            indent, target, expression = assigned.groups()
            for name in _names(lines, at, expression):
                yield _Change(line, f"{indent}{target} {name}")
            for part in _parts(expression):
                yield _Change(line, f"{indent}{target} {part}")
        for literal in ("range(3)", "range(2)"):
            if literal in line:
                yield _Change(line, line.replace(literal, "range(1)"))


def _names(lines: list[str], at: int, expression: str) -> list[str]:
    """Names assigned before in the same function, the latest first."""
    found = ["x"] if "x" in expression else []
    for line in reversed(lines[:at]):
        if line.lstrip().startswith("def "):
            break
        assigned = re.match(r"\s+(\w+) = ", line)
        if assigned:
            found.append(assigned.group(1))
    return list(dict.fromkeys(found))[:6]


def _parts(expression: str) -> list[str]:
    """Operands of the expression."""
    try:
        tree = ast.parse(expression, mode="eval").body
    except SyntaxError:
        return []
    children: list[ast.expr] = []
    if isinstance(tree, ast.BinOp):
        children = [tree.left, tree.right]
    elif isinstance(tree, ast.Call):
        children = [*tree.args, *([tree.func.value] if isinstance(tree.func, ast.Attribute) else [])]
    return [ast.unparse(c) for c in children if not isinstance(c, (ast.Constant, ast.List, ast.Tuple))]


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(reduced(Path(sys.argv[1]).read_text()))
