"""A plan seen block by block: equal blocks together, paths relative to the block."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from colrow.planner.path_ranges import ranges_text
from colrow.planner.plan_model import Plan, PlannedParameter
from colrow.planner.planned_collectives import Collective

_NEIGHBOUR = {1: "the next block", -1: "the previous block"}


@dataclass(frozen=True)
class Traffic:
    """Blocks with the same collectives.

    Attributes:
        over: Their numbers, or the block's path where it has none.
        count: How many.
        collectives: Of one of them, in order; paths relative to the block.
    """

    over: str
    count: int
    collectives: tuple[Collective, ...]


@dataclass(frozen=True)
class DistinctBlock:
    """Blocks with the same parameters in the same layouts.

    Attributes:
        over: Their paths (``model.layers.{0-31}``); "" for what lies outside all blocks.
        count: How many.
        parameters: Of one of them, ``(path relative to the block, parameter)``.
        traffic: Their collectives; equal blocks together.
    """

    over: str
    count: int
    parameters: tuple[tuple[str, PlannedParameter], ...]
    traffic: tuple[Traffic, ...]


def distinct_blocks(plan: Plan) -> list[DistinctBlock]:
    """The plan's blocks, each distinct one once, in model order; first what lies outside all blocks."""
    known = {c.block for c in plan.collectives if c.block}
    parameters: dict[str, list[PlannedParameter]] = {"": []}
    for parameter in plan.parameters:
        parameters.setdefault(block_of(parameter.edit.fqn, known), []).append(parameter)
    collectives: dict[str, list[Collective]] = {"": []}
    for collective in plan.collectives:
        collectives.setdefault(collective.block, []).append(collective)
        parameters.setdefault(collective.block, [])
    alike: dict[tuple[str, frozenset[object]], list[str]] = {}
    for block, held in parameters.items():
        layouts = frozenset((_within(p.edit.fqn, block), _layout_of(p)) for p in held)
        alike.setdefault((_prefix(block), layouts), []).append(block)
    return [_distinct(sorted(blocks, key=_number), parameters, collectives) for blocks in alike.values()]


def block_of(path: str, known: Iterable[str] = ()) -> str:
    """The outermost block of a path: one that is known, else up to the first number; "" outside."""
    parts = path.split(".")
    for depth in range(1, len(parts)):
        if ".".join(parts[:depth]) in known or parts[depth - 1].isdecimal():
            return ".".join(parts[:depth])
    return ""


def _distinct(
    blocks: list[str], parameters: Mapping[str, list[PlannedParameter]], collectives: Mapping[str, list[Collective]]
) -> DistinctBlock:
    alike: dict[tuple[Collective, ...], list[str]] = {}
    for block in blocks:
        relative = tuple(_relative(c, block) for c in collectives.get(block, []))
        alike.setdefault(relative, []).append(block)
    traffic = [Traffic(_numbers(group), len(group), made) for made, group in alike.items() if made]
    held = [(_within(p.edit.fqn, blocks[0]), p) for p in parameters[blocks[0]]]
    over = f"{_prefix(blocks[0])}{{{_numbers(blocks)}}}" if len(blocks) > 1 else blocks[0]
    return DistinctBlock(over, len(blocks), tuple(held), tuple(traffic))


def _layout_of(parameter: PlannedParameter) -> object:
    return replace(parameter, edit=replace(parameter.edit, fqn=""))


def _numbers(blocks: list[str]) -> str:
    if len(blocks) == 1 and not blocks[0].rpartition(".")[2].isdecimal():
        return blocks[0]
    return ranges_text([_number(block) for block in blocks])


def _number(block: str) -> int:
    last = block.rpartition(".")[2]
    return int(last) if last.isdecimal() else -1


def _prefix(block: str) -> str:
    """The path of a block's list, its dot included; the whole path of a block without a number."""
    head, dot, last = block.rpartition(".")
    return head + dot if last.isdecimal() else block


def _within(path: str, block: str) -> str:
    return path.removeprefix(f"{block}.") if block else path


def _relative(collective: Collective, block: str) -> Collective:
    if not block:
        return collective
    return replace(
        collective,
        site=relative_text(collective.site, block),
        block="",
        forced_by=relative_text(collective.forced_by, block),
        bucket="",
    )


def relative_text(text: str, block: str) -> str:
    """The text with paths relative to ``block``: ``add in model.layers.3.mlp`` is ``add in mlp`` in layer 3."""
    prefix, number = _prefix(block), _number(block)

    def named(found: re.Match[str]) -> str:
        preposition, digits, rest = found[1] or "", found[2] or "", (found[3] or "").removeprefix(".")
        shift = int(digits) - number if digits else 0
        if shift == 0:
            return f"{preposition}{rest}" if rest else ""
        place = _NEIGHBOUR.get(shift, f"{prefix}{{i{shift:+d}}}")
        return f"{preposition}{place}" + (f"'s {rest}" if rest else "")

    digits = "([0-9]+)" if number >= 0 else "()"
    return re.sub(rf"( in )?(?<!\S){re.escape(prefix)}{digits}(\.\S+)?(?!\S)", named, text)
