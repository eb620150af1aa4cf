"""One row per model type: transformers' own tensor parallelism, colrow with the same weights whole, colrow's default.

What is compared, per rank, for a forward and for a backward: **reductions** (all_reduce and reduce_scatter) and
**bytes** (whole buffers of collectives of every kind, as nccl-tests counts them).  Where ours has more reductions and
fewer collectives in all, the row says so and is counted apart.
"""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from enum import StrEnum
from functools import cache
from pathlib import Path
from typing import Any

import torch
from peer_runs import RANKS, Counts, Reference, Run, colrow_run, loaded, pattern, peer_run, reference_of
from torch import nn

from colrow.cost_models.errors import ColrowError
from colrow.cost_models.hardware import Hardware, load_hardware, parse_hardware
from colrow.planner.configurations import first_line
from colrow.planner.plan_model import Plan
from colrow.planner.planning import plan
from colrow.planner.sources import Source, load_source
from colrow.rewrite.comparison import FLOAT32_TOLERANCE
from colrow.rewrite.coverage_rows import StageResult, Status

REDUCTIONS = ("all_reduce", "reduce_scatter")
UNCAPPED_GB = 1e6
HARDWARE, SHRUNK = "h100-sxm", 1024  # a prefill of 2048 tokens of 4096 bf16 values is 16.8 MB, here it is 16 kB
Row = dict[str, Any]


class Verdict(StrEnum):
    """How a row ended; there are no others."""

    NO_MORE = "no more"  # in reductions and bytes, forward and backward
    IN_ALL = "no more in all"  # more reductions, but of a norm's statistics instead of gathers of what it norms
    MORE = "MORE"
    WRONG = "OURS WRONG"
    REFUSED = "ours refused"  # by colrow, while theirs is right
    CRASHES = "peer crashes"  # ours is right
    PEER_WRONG = "peer wrong"  # ours is right
    NOTHING = "peer splits nothing"  # the effective plan of the head class is empty; ours is right
    NEITHER = "neither"  # theirs crashes or is wrong, and colrow refuses
    NOT_BUILT = "not built"  # no small version, or it does not run by itself


FAILURES = (Verdict.MORE, Verdict.WRONG, Verdict.REFUSED)


def types_with_plans() -> dict[str, bool]:
    """Model types whose configuration class has a hand-written plan (True), or only a part of it has (False)."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING, CONFIG_MAPPING_NAMES

    found = {}
    for name in sorted(CONFIG_MAPPING_NAMES):
        config: Any = CONFIG_MAPPING[name]
        own = bool(getattr(config, "base_model_tp_plan", None))
        if own or _part_has_plan(config, set()):
            found[name] = own
    return found


def _part_has_plan(config: Any, seen: set[Any]) -> bool:
    if config in seen or not isinstance(config, type):
        return False
    seen.add(config)
    parts = (getattr(config, "sub_configs", None) or {}).values()
    return bool(getattr(config, "base_model_tp_plan", None)) or any(_part_has_plan(part, seen) for part in parts)


@cache
def small_machine() -> Hardware:
    """A machine to which the small model's messages are what a whole model's are to the real one.

    With real latencies every message here would be free but for its start, and no plan would save a byte: a collective
    of b bytes takes the real machine's time for ``SHRUNK * b``, divided by ``SHRUNK``, and so do kernels' starts.
    """
    profile = load_hardware(HARDWARE).model_dump(mode="json", by_alias=True)
    profile["launch_overhead_s"] /= SHRUNK
    profile["compute"]["matmul_start_s"] /= SHRUNK
    for collective in profile["collectives"].values():
        collective["alternatives"] = []
        for group in collective["groups"]:
            group["latency_s"] /= SHRUNK
            group["min_bytes"] //= SHRUNK
            group["max_bytes"] //= SHRUNK
            for segment in group["segments"]:
                segment["from_bytes"] //= SHRUNK
            group["segments"] = list({segment["from_bytes"]: segment for segment in group["segments"]}.values())
    return parse_hardware(json.dumps(profile), where=f"{HARDWARE}, {SHRUNK} times smaller")


def row_of(model_type: str) -> StageResult:
    """Measure one type; whatever happens is a row, in ``facts``."""
    facts: Row = {}
    try:
        _fill(model_type, facts)
    except Exception as error:
        facts |= {"verdict": Verdict.NOT_BUILT, "why": _said(error)}
    return StageResult(Status.OK, facts=facts)


def _fill(model_type: str, row: Row) -> None:
    source = load_source(f"hf:{model_type}", phase="train", batch=2, seq=16, dtype="fp32", small=True)
    source.model.eval()
    row["class"] = type(source.model).__name__
    dense = source.build().eval().double()
    reference = reference_of(dense, source.example_inputs)
    peer = row["peer"] = _peer(dense, reference)
    everything = {name for name, value in dense.named_parameters() if value.dim() > 1}
    whole = everything - set(peer.pop("split", everything))
    peer["whole"] = sorted({pattern(name) for name in whole})
    default = row["default"] = {}
    made = _ours(source, dense, reference, {}, default)
    if "counts" in peer:
        pinned = row["pinned"] = {}
        if made is not None and not whole & split_by(made):  # the same plan
            pinned |= default
            same: Plan | None = made
        else:
            pins = dict.fromkeys(sorted(whole), "replicated")
            same = _ours(source, dense, reference, pins, pinned)
        if same is not None:
            pinned["whole"] = sorted({pattern(name) for name in everything - whole - split_by(same)})
            if made is not None:
                default["extra"] = extra(made, same)
    row["verdict"], row["why"] = verdict(row)


def _peer(dense: nn.Module, reference: Reference) -> Row:
    """Transformers' own run, as facts."""
    cls: Any = type(dense)
    with tempfile.TemporaryDirectory(prefix="peer-") as name:
        folder = Path(name)
        try:
            dense.save_pretrained(folder)  # type: ignore[operator]
            state: dict[str, torch.Tensor] = loaded(cls, folder).state_dict()
        except Exception as error:
            return {"status": "crashes", "why": f"its checkpoint, saved and loaded: {_said(error)}"}
        other = [key for key, value in dense.state_dict().items() if not _equal(state.get(key), value)]
        if other:
            return {"status": "crashes", "why": f"{other[0]} is another one once saved and loaded"}
        try:
            run = peer_run(cls, folder, reference)
        except Exception as error:
            said = _said(error)
            nothing = "has no `tp_plan`" in said
            return {"status": "nothing" if nothing else "crashes", "why": said}
    facts = _facts(run) | {"split": run.split}
    return facts | ({"deferred": sorted(map(pattern, run.deferred))} if run.deferred else {})


def _equal(found: torch.Tensor | None, value: torch.Tensor) -> bool:
    return found is not None and torch.equal(found.to(value), value)


def _ours(source: Source, dense: nn.Module, reference: Reference, pin: Mapping[str, str], facts: Row) -> Plan | None:
    """colrow's plan, run; ``facts`` gets what was found."""
    try:
        made = plan(
            source.model,
            source.example_inputs,
            tp=RANKS,
            hardware=small_machine(),
            phase="train",
            memory_gb=UNCAPPED_GB,
            pin=pin,
        )
        facts["sharded"] = round(made.sharded_fraction, 4)
        run = colrow_run(dense, made, reference)
    except Exception as error:
        facts |= {"status": "refused" if isinstance(error, ColrowError) else "crashes", "why": _said(error)}
        return None
    facts |= _facts(run)
    planned: Counts = {"forward": {}, "backward": {}}
    for c in made.collectives:
        seen = planned[c.direction].setdefault(c.kind, [0, 0])
        seen[0] += 1
        seen[1] += c.nbytes
    if planned != run.counts:
        facts |= {"status": "wrong", "why": f"planned {planned}, executed {run.counts}"}
    return made


def _facts(run: Run) -> Row:
    right = run.error <= FLOAT32_TOLERANCE
    facts = {"status": "right" if right else "wrong", "counts": run.counts}
    facts |= {what: [name, float(f"{error:.1e}")] for what, (name, error) in run.errors.items()}
    if not right:
        what, (name, error) = max(run.errors.items(), key=lambda item: (item[1][1] != item[1][1], item[1][1]))
        facts["why"] = f"{what} {name}: error {error:.1e}"
    return facts


def split_by(p: Plan) -> set[str]:
    """Parameters of which a rank holds a part."""
    return {parameter.edit.fqn for parameter in p.parameters if parameter.placement != "replicated"}


def extra(made: Plan, same: Plan) -> list[Row]:
    """Collectives of ``made`` that ``same``, with more weights whole, has not: by site, and what each is forced by."""

    def found(of: Plan) -> Counter[tuple[str, str, str, str]]:
        return Counter((c.direction, c.kind, pattern(c.site), pattern(str(c.forced_by))) for c in of.collectives)

    names = ("direction", "kind", "site", "forced_by")
    more = found(made) - found(same)
    weights = sorted(set(map(pattern, split_by(made) - split_by(same))))

    def near(site: str) -> list[str]:
        """The weights split in addition that share the longest path with ``site``."""
        shared = {name: _shared(name, site) for name in weights}
        return [name for name, length in shared.items() if length and length == max(shared.values())]

    return [dict(zip(names, key, strict=True)) | {"count": n, "for": near(key[2])} for key, n in sorted(more.items())]


def _shared(one: str, other: str) -> int:
    """How many parts two paths begin with in common."""
    pairs = list(zip(one.split("."), other.split("."), strict=False))
    return next((i for i, (a, b) in enumerate(pairs) if a != b), len(pairs))


def verdict(row: Mapping[str, Any]) -> tuple[Verdict, str]:
    """How a measured row ended, and why."""
    peer, default = row["peer"], row["default"]
    ours = row.get("pinned", default)
    for part in (ours, default):
        if part["status"] in ("wrong", "crashes"):
            return Verdict.WRONG, part["why"]
    refused = next((part["why"] for part in (ours, default) if part["status"] == "refused"), "")
    if peer["status"] != "right":
        alone = {"wrong": Verdict.PEER_WRONG, "nothing": Verdict.NOTHING}.get(peer["status"], Verdict.CRASHES)
        return (Verdict.NEITHER, f"{refused}; theirs: {peer['why']}") if refused else (alone, peer["why"])
    if refused:
        return Verdict.REFUSED, refused
    return compared(peer["counts"], ours["counts"])


def compared(theirs: Counts, ours: Counts) -> tuple[Verdict, str]:
    """Whether ``ours`` is more in anything, and in what.

    More reductions are one thing if there are also more collectives or bytes, and another where gathers have gone for
    them: the norm of a split dim is computed from a sum of one number a token, or from the gathered dim.
    """
    found, words = Verdict.NO_MORE, []
    for direction in ("forward", "backward"):
        (mine, all_mine, sent), (its, all_its, it_sent) = (measures(of[direction]) for of in (ours, theirs))
        if sent > it_sent:
            words.append(f"{direction} bytes: {sent} against {it_sent}")
        if mine > its:
            words.append(f"{direction} reductions: {mine} against {its} (of {all_mine} against {all_its} collectives)")
            found = Verdict.IN_ALL if found is Verdict.NO_MORE else found
        if sent > it_sent or (mine > its and all_mine > all_its):
            found = Verdict.MORE
    return found, ", ".join(words)


def measures(kinds: Mapping[str, list[int]]) -> tuple[int, int, int]:
    """Of one direction: reductions, collectives of every kind, and the bytes of all."""
    return reductions(kinds), sum(n for n, _ in kinds.values()), all_bytes(kinds)


def reductions(kinds: Mapping[str, list[int]]) -> int:
    """How many collectives of one direction reduce."""
    return sum(kinds[kind][0] for kind in REDUCTIONS if kind in kinds)


def all_bytes(kinds: Mapping[str, list[int]]) -> int:
    """Bytes of all collectives of one direction."""
    return sum(nbytes for _, nbytes in kinds.values())


def _said(error: BaseException) -> str:
    said = first_line(error)
    return (said if isinstance(error, ColrowError) else f"{type(error).__name__}: {said}")[:300]
