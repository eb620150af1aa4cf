"""Ranges of layers in paths: how a plan file says the same thing once for 126 blocks.

    fold_paths   {a.0.w: x, a.1.w: x, b: y}        <->  {a.{0-1}.w: x, b: y}
    fold_rows    [in a.0, to a.1; in a.1, to a.2]  <->  for a.{0-1}: [in a.{i}, to a.{i+1}]

Both are exact: expanding what was folded gives the original back.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

LONGEST_PERIOD = 64  # rows that repeat together; the largest block seen (jamba, eight layers in turn) has 40
_INDEX = re.compile(r"(?<![^.\s])(?:0|[1-9][0-9]*)(?![^.\s])")  # a whole path component, as it is printed
_SHIFT = re.compile(r"\{i([+-]\d+)?\}")
_RUN = re.compile(r"(\d+)(?:-(\d+)(?::(\d+))?)?")


def ranges_text(numbers: Sequence[int]) -> str:
    """``0-31``; ``0-30:2`` by twos; ``31-0`` downwards; ``0,4-31,1-3`` in that order."""
    parts, at = [], 0
    while at < len(numbers):
        step = numbers[at + 1] - numbers[at] if at + 1 < len(numbers) else 0
        end = at + 1
        while step and end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if end - at < (2 if abs(step) == 1 else 3):
            parts.append(str(numbers[at]))
            at += 1
            continue
        by = f":{abs(step)}" if abs(step) > 1 else ""
        parts.append(f"{numbers[at]}-{numbers[end - 1]}{by}")
        at = end
    return ",".join(parts)


def parse_ranges(text: str) -> list[int]:
    """The inverse of `ranges_text`.

    Raises:
        ValueError: Not such a text.
    """
    numbers: list[int] = []
    for part in text.split(","):
        found = _RUN.fullmatch(part)
        if found is None:
            raise ValueError(f"not a range: {text!r}")
        first, last, step = int(found[1]), int(found[2] or found[1]), int(found[3] or 1)
        if step == 0:
            raise ValueError(f"a range that stands still: {text!r}")
        numbers += range(first, last + 1, step) if first <= last else range(first, last - 1, -step)
    return numbers


def _is_index(part: str) -> bool:
    return _INDEX.fullmatch(part) is not None


def natural(path: str) -> tuple[tuple[int, int, str], ...]:
    """Sort key: path components, numbers by value."""
    return tuple((0, int(part), "") if _is_index(part) else (1, 0, part) for part in path.split("."))


# ---- mappings keyed by path


def fold_paths(entries: Mapping[str, Any]) -> dict[str, Any]:
    """Merges entries whose keys differ in one number and whose values are equal, in every position in turn."""
    folded = {tuple(_escaped(part) for part in path.split(".")): value for path, value in entries.items()}
    for position in range(max(map(len, folded), default=0)):
        groups: dict[tuple[tuple[str, ...], tuple[str, ...], str], list[str]] = {}
        for path, value in folded.items():
            head, part, tail = path[:position], "".join(path[position : position + 1]), path[position + 1 :]
            groups.setdefault((head, tail, repr(value)) if _is_index(part) else (path, (), ""), []).append(part)
        merged = {}
        for (head, tail, shown), parts in groups.items():
            if not shown:
                merged[head] = folded[head]
                continue
            value = folded[(*head, parts[0], *tail)]
            numbers = sorted(int(part) for part in parts)
            text = f"{{{ranges_text(numbers)}}}" if len(numbers) > 1 else parts[0]
            merged[(*head, text, *tail)] = value
        folded = merged
    return {".".join(path): value for path, value in folded.items()}


def expand_paths(folded: Mapping[str, Any]) -> dict[str, Any]:
    """The inverse of `fold_paths`, in model order: numbers by value, names in the order the file has them.

    Raises:
        ValueError: A key is no path with ranges, or two keys name the same path.
    """
    ranks: dict[tuple[str, ...], int] = {}
    keys: dict[tuple[tuple[int, int], ...], tuple[str, Any]] = {}
    for key, value in folded.items():
        choices = [_choices(part) for part in key.split(".")]
        for path in product(*choices):
            shape: tuple[str, ...] = ()
            order: list[tuple[int, int]] = []
            for part in path:
                shape = (*shape, "#" if _is_index(part) else part)
                order.append((0, int(part)) if _is_index(part) else (1, ranks.setdefault(shape, len(ranks))))
            if tuple(order) in keys:
                raise ValueError(f"{'.'.join(path)} is given twice")
            keys[tuple(order)] = (".".join(map(_unescaped, path)), value)
    return dict(keys[order] for order in sorted(keys))


def _choices(part: str) -> list[str]:
    if not part.startswith("{"):
        return [part]
    if not part.endswith("}"):
        raise ValueError(f"a range without an end: {part!r}")
    return [str(number) for number in parse_ranges(part[1:-1])]


def _escaped(part: str) -> str:
    """ParameterDict keys may hold anything but a dot."""
    return part.replace("%", "%25").replace("{", "%7B")


def _unescaped(part: str) -> str:
    return re.sub(r"%([0-9A-F]{2})", lambda found: chr(int(found[1], 16)), part)


# ---- sequences of rows


@dataclass(frozen=True)
class Repeat:
    """Rows that repeat for every index of a list of blocks, ``{i}`` standing for it and ``{i+1}`` for the next."""

    over: str
    each: tuple[tuple[Any, ...], ...]


Row = tuple[Any, ...]


def fold_rows(rows: Sequence[Row]) -> list[Row | Repeat]:
    """Folds runs of rows that are equal but for the block they name; order is kept.

    Args:
        rows: Tuples of strings and plain values; paths may stand anywhere in the strings, between spaces.
    """
    skeletons = [_skeleton(row) for row in rows]
    folded: list[Row | Repeat] = []
    at = 0
    while at < len(rows):
        best = max(_repeats(skeletons, at), key=lambda found: (found[1] * found[2], -found[1]), default=None)
        if (
            best is None
            or best[1] * best[2] < 3
            or any("{" in s for row in rows[at : at + best[1]] for s in _texts(row))
        ):
            folded.append(rows[at])
            at += 1
            continue
        prefix, period, times, first, step = best
        indices = [first + step * n for n in range(times)]
        each = tuple(_relative(row, prefix, first) for row in rows[at : at + period])
        folded.append(Repeat(f"{prefix}{{{ranges_text(indices)}}}", each))
        at += period * times
    return folded


def expand_rows(folded: Sequence[Row | Repeat]) -> list[Row]:
    """The inverse of `fold_rows`.

    Raises:
        ValueError: A repeat without a range.
    """
    rows: list[Row] = []
    for item in folded:
        if not isinstance(item, Repeat):
            rows.append(item)
            continue
        _, brace, text = item.over.partition("{")
        if not brace or not text.endswith("}"):
            raise ValueError(f"no range in {item.over!r}")
        for number in parse_ranges(text[:-1]):
            rows += [
                tuple(
                    _SHIFT.sub(lambda found, i=number: str(i + int(found[1] or 0)), x) if isinstance(x, str) else x  # type: ignore[misc]
                    for x in row
                )
                for row in item.each
            ]
    return rows


def _texts(row: Row) -> Iterator[str]:
    return (value for value in row if isinstance(value, str))


def _prefix(text: str, found: re.Match[str]) -> str:
    """What precedes a number in its path, its dot included."""
    return text[: found.start()].rpartition(" ")[2]


def _skeleton(row: Row) -> tuple[Row, tuple[tuple[str, int], ...]]:
    """The row with its path numbers blanked, and those numbers with what precedes them."""
    numbers = tuple((_prefix(text, f), int(f[0])) for text in _texts(row) for f in _INDEX.finditer(text))
    return tuple(_INDEX.sub("#", x) if isinstance(x, str) else x for x in row), numbers


_Skeleton = tuple[Row, tuple[tuple[str, int], ...]]


def _repeats(rows: Sequence[_Skeleton], at: int) -> Iterator[tuple[str, int, int, int, int]]:
    """Ways to fold at row ``at``: ``(prefix, period, times, first index, step)``."""
    numbers = rows[at][1]
    if not numbers:
        return
    prefix, first = next((found for found in numbers if found[0][:1].isidentifier()), numbers[0])
    for period in range(1, min(LONGEST_PERIOD, (len(rows) - at) // 2) + 1):
        step = _shift(rows[at], rows[at + period], prefix)
        if not step:
            continue
        times = 1
        while at + period * (times + 1) <= len(rows) and all(
            _same(rows[at + n], rows[at + period * times + n], prefix, step * times) for n in range(period)
        ):
            times += 1
        if times > 1:
            yield prefix, period, times, first, step


def _shift(one: _Skeleton, other: _Skeleton, prefix: str) -> int | None:
    """By how much the first number after ``prefix`` grows."""
    pair = [next((n for p, n in row[1] if p == prefix), None) for row in (one, other)]
    return None if pair[0] is None or pair[1] is None else pair[1] - pair[0]


def _same(one: _Skeleton, other: _Skeleton, prefix: str, shift: int) -> bool:
    """Whether ``other`` is ``one`` with every number after ``prefix`` grown by ``shift``."""
    return one[0] == other[0] and all(
        b == a + (shift if p == prefix else 0) for (p, a), (_, b) in zip(one[1], other[1], strict=True)
    )


def _relative(row: Row, prefix: str, first: int) -> Row:
    def one(text: str) -> str:
        def shown(found: re.Match[str]) -> str:
            if _prefix(text, found) != prefix:
                return found[0]
            return f"{{i{int(found[0]) - first:+d}}}".replace("+0", "")

        return _INDEX.sub(shown, text)

    return tuple(one(x) if isinstance(x, str) else x for x in row)
