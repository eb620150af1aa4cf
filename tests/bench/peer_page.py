"""How rows of `peer_plans` are shown: a table on the terminal, and ``docs/PEER_PLANS.md``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from peer_rows import FAILURES, Row, Verdict, all_bytes, reductions
from rich.console import Console
from rich.table import Table

SCHEMA = "colrow.peer_plans/1"
COLUMNS = ("type", "peer: fwd", "bwd", "ours, same weights: fwd", "bwd", "ours, default: fwd", "bwd", "verdict")
LEGEND = """\
Each cell is reductions (all_reduce and reduce_scatter) / kB of all collectives (whole buffers, as nccl-tests counts
them), of one rank in one step; executed, and counted at PyTorch's dispatcher in float32. Both sides are compared with
the dense model in float64, every output and every gradient, within 1e-5. *Same weights*: what transformers leaves whole
is pinned whole. *Default*: every weight is split that can be. *No more*: no more reductions and no more bytes than
transformers has, forward and backward. *No more in all*: more reductions, but no more collectives and bytes: a norm
over a split dim is computed from a sum of one number a token, where transformers gathers what it norms. Plans are
priced as if every message and matmul were a thousand times larger, as those of whole models are."""


def print_table(rows: Mapping[str, Row]) -> None:
    """One row a type, on stdout."""
    out = Console(width=max(150, Console().width))
    table = Table(*COLUMNS, "why", title=f"{len(rows)} hand-written plans at tp 2: reductions / kB")
    for name, row in sorted(rows.items()):
        style = "red" if row["verdict"] in FAILURES else None
        table.add_row(name, *_cells(row), row["verdict"], row["why"][:200], style=style)
    out.print(table)


def totals(rows: Mapping[str, Row], asked: int) -> str:
    """How many rows ended how, and sums over the rows in which both are right."""
    verdicts = Counter(row["verdict"] for row in rows.values())
    both = [row for row in rows.values() if row["verdict"] in (Verdict.NO_MORE, Verdict.IN_ALL, Verdict.MORE)]
    parts = {"transformers": "peer", "ours, same weights": "pinned", "ours, default": "default"}
    lines = [f"{len(rows)} of {asked} types run: " + ", ".join(f"{n} {word}" for word, n in verdicts.most_common())]
    for words, key in parts.items():
        sums = [_cell(row[key], d, ("counts",)) for d in ("forward", "backward") for row in both]
        forward, backward = sums[: len(both)], sums[len(both) :]
        lines.append(f"  {words}: {_sum(forward)} forward, {_sum(backward)} backward ({len(both)} types)")
    return "\n".join(lines)


def _sum(cells: Iterable[tuple[int, int] | None]) -> str:
    found = [cell for cell in cells if cell]
    return f"{sum(n for n, _ in found)} reductions and {sum(b for _, b in found) / 1e6:.2f} MB"


def _cell(part: Row, direction: str, path: tuple[str, ...] = ("counts",)) -> tuple[int, int] | None:
    counts = part.get(path[0])
    return (reductions(counts[direction]), all_bytes(counts[direction])) if counts else None


def _cells(row: Row) -> list[str]:
    shown = []
    for key in ("peer", "pinned", "default"):
        for direction in ("forward", "backward"):
            cell = _cell(row.get(key, {}), direction)
            shown.append(f"{cell[0]} / {cell[1] / 1e3:.1f}" if cell else "")
    return shown


def page(rows: Mapping[str, Row], own: Mapping[str, bool], made_with: Mapping[str, str]) -> str:
    """``PEER_PLANS.md``."""
    lines = ["# transformers' hand-written plans, and colrow's", ""]
    lines += ["Made by `make bench-peers` (`tests/bench/peer_plans.py`) with " + _versions(made_with) + ".", ""]
    lines += [*LEGEND.splitlines(), ""]
    for title, whole in (("Types whose configuration has a plan", True), ("Types of which a part has one", False)):
        chosen = {name: row for name, row in rows.items() if row["own"] is whole}
        asked = sum(value is whole for value in own.values())
        lines += [f"## {title}", "", "```", totals(chosen, asked), "```", ""]
        lines += ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
        for name, row in sorted(chosen.items()):
            lines.append("| " + " | ".join([name, *_cells(row), row["verdict"]]) + " |")
        lines += ["", *_reasons(chosen), *_extras(chosen)]
    return "\n".join(lines).rstrip() + "\n"


def _versions(made_with: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in made_with.items())


def _reasons(rows: Mapping[str, Row]) -> list[str]:
    said = [f"- {name} ({row['verdict']}): {_plain(row['why'])}" for name, row in sorted(rows.items()) if row["why"]]
    said += [
        f"- {name}: split there and whole here: {_code(row['pinned']['whole'])}"
        for name, row in sorted(rows.items())
        if row.get("pinned", {}).get("whole")
    ]
    said += [
        f"- {name}: transformers leaves these gradients partial sums, to be reduced by whoever reads them: "
        f"{_code(row['peer']['deferred'])}"
        for name, row in sorted(rows.items())
        if row.get("peer", {}).get("deferred")
    ]
    return ["### Why", "", *said, ""] if said else []


def _extras(rows: Mapping[str, Row]) -> list[str]:
    """What the default plan reduces more than with transformers' weights whole, by the weights it splits for it."""
    lines = []
    for name, row in sorted(rows.items()):
        for more in row["default"].get("extra", []) if "default" in row else []:
            weights = _code(more["for"]) or "a weight that transformers leaves whole"
            lines.append(
                f"- {name}: {more['count']} {more['direction']} {more['kind']} after `{more['site']}`, forced by "
                f"`{more['forced_by']}`, for {weights}"
            )
    return ["### Extra collectives of the default plan", "", *lines, ""] if lines else []


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _plain(text: str) -> str:
    """Without what Markdown would read as markup."""
    return text.replace("*", "\\*").replace("_", "\\_").replace("|", "\\|").replace("\n", " ")
