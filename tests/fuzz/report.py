"""What a run of the fuzzer found, against its goals."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence

from rule_cases import NOT_RUN, WHOLE_ONLY

from colrow.planner.rules import RULES
from fuzz.check import Outcome

MAX_REFUSED = 0.02
MAX_REPLICATED = 0.3
MIN_HITS = 20
# Pairs of `planner.moves.move` that a plan without sequence parallelism can hold.
MOVES = (
    "all_reduce/all_reduce", "all_reduce/identity", "all_gather/reduce_scatter", "all_gather/slice", "slice/pad",
    "lift/lift", "lift/identity", "identity/all_reduce", "identity/lift",
)  # fmt: skip
# Rules of operators that no random module holds.
UNREACHED = NOT_RUN | {
    "_grouped_mm": "knows no float64, in which modules are compared",
    "grouped_mm_fallback": "transformers' own operator",
    **dict.fromkeys(
        (
            "contiguous",
            "conj",
            "_to_copy",
            "type_as",
            "__invert__",
            "norm",
            "_softmax",
            "_log_softmax",
            "_unsafe_view",
            "constant_pad_nd",
        ),
        "another name stands in traces",
    ),
}


def tried(outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Those whose undivided module runs."""
    return [o for o in outcomes if o.status != "invalid"]


def missed(outcomes: Sequence[Outcome]) -> list[str]:
    """Goals that this run did not reach, one line each."""
    fair, found = tried(outcomes), Counter(o.status for o in outcomes)
    lines = [f"{found[status]} modules {status}" for status in ("wrong", "crashed") if found[status]]
    if found["refused"] > MAX_REFUSED * len(fair):
        lines.append(f"{found['refused']} of {len(fair)} refused, more than {MAX_REFUSED:.0%}")
    replicated = [o for o in fair if o.weights and not o.split and o.status == "right"]
    if len(replicated) > MAX_REPLICATED * len(fair):
        lines.append(f"{len(replicated)} of {len(fair)} replicated, more than {MAX_REPLICATED:.0%}")
    rare = {name: n for name, n in {**rule_hits(outcomes), **move_hits(outcomes)}.items() if n < MIN_HITS}
    if rare:
        listed = ", ".join(f"{name} {n}" for name, n in sorted(rare.items()))
        lines.append(f"hit fewer than {MIN_HITS} times: {listed}")
    return lines


def rule_hits(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Rule -> operators it placed in right modules; split or partial, unless the rule knows whole values only."""
    split, whole = Counter[str](), Counter[str]()
    for outcome in outcomes:
        if outcome.status == "right":
            split.update(outcome.rules)
            whole.update(outcome.whole)
    return {name: (whole if name in WHOLE_ONLY else split)[name] for name in RULES if name not in UNREACHED}


def move_hits(outcomes: Sequence[Outcome]) -> dict[str, int]:
    """Move -> times made in right modules."""
    made = Counter[str]()
    for outcome in outcomes:
        if outcome.status == "right":
            made.update(outcome.moves)
    return {name: made[name] for name in dict.fromkeys((*MOVES, *made))}


def report(outcomes: Sequence[Outcome]) -> str:
    """The whole report, as text."""
    fair, found = tried(outcomes), Counter(o.status for o in outcomes)
    lines = [f"{len(fair)} random modules, on {_ranks(fair)} ranks: " + ", ".join(f"{n} {s}" for s, n in found.items())]
    splits = [o.split for o in fair if o.weights]
    none = sum(not s for s in splits)
    lines.append(
        f"split: {sum(splits) / max(1, len(splits)):.1%} of weight bytes on average; "
        f"{none} modules replicated, {none / max(1, len(fair)):.1%}"
    )
    for status in ("wrong", "crashed", "refused", "invalid"):
        reasons = Counter(kind(o) for o in outcomes if o.status == status)
        for reason, count in reasons.most_common():
            seeds = [o.seed for o in outcomes if o.status == status and kind(o) == reason]
            lines.append(f"  {count:4} {reason}   seeds {', '.join(map(str, seeds[:5]))}")
    lines += ["moves:", *_columns(move_hits(outcomes))]
    lines += ["rules, by operators placed split or partial:", *_columns(rule_hits(outcomes))]
    wanting = missed(outcomes)
    lines += ["goals: all met"] if not wanting else ["goals missed:", *(f"  {line}" for line in wanting)]
    return "\n".join(lines)


def kind(outcome: Outcome) -> str:
    """A failure without the names and numbers of one module."""
    if outcome.status == "wrong":
        return f"wrong {outcome.reason.split(' ')[0]}"
    return f"{outcome.status} " + re.sub(r"'[^']*'|\[.*?\]|[\w.]*\d[\w.]*", "#", outcome.reason)[:140]


def _ranks(outcomes: Sequence[Outcome]) -> str:
    sizes = sorted({o.tp for o in outcomes if o.tp})
    return f"{sizes[0]} to {sizes[-1]}" if sizes else "no"


def _columns(hits: dict[str, int], width: int = 4) -> list[str]:
    listed = [f"{name} {count}" for name, count in sorted(hits.items(), key=lambda item: (item[1], item[0]))]
    return [
        "  " + "".join(f"{text:28}" for text in listed[i : i + width]).rstrip() for i in range(0, len(listed), width)
    ]
