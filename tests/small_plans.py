"""A plan written by hand, with something of everything a plan can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from colrow.planner.edits import CallEdit, ForwardEdits, OperatorEdit, ParameterEdit
from colrow.planner.layout import Layout, even, joined, owned_units
from colrow.planner.moves import Move
from colrow.planner.plan_model import Plan, PlannedCost, PlannedParameter, Schedule
from colrow.planner.planned_collectives import Collective
from colrow.planner.sites import Frame, Site
from colrow.planner.workloads import Length, Workload

TP, BLOCKS = 2, 3
QKV = joined((even(8, TP), even(4, TP), even(4, TP)))
HEADS = owned_units(6, 2, ((0, 1), (2,)))
KV = owned_units(4, 4, ((0,), (0,)))
SEQUENCE = Layout(even(16, TP).segments, elastic=True)
COST = PlannedCost(14e-6, 4.1e-6, 9.9e-6, 14e-6, True, 8e-6, 7.5e-6)
WORKLOAD = Workload(
    "train", "train", (("ids", "int64", (2, 16)), ("x", "float32", (2, 5, 8))), (("scale", 0.5),), context=0, weight=2.0
)
KEPT = Move("identity", "identity", 1, SEQUENCE)
FORWARD = nn.Linear.forward.__code__


def linear_site(module: str, span: tuple[int, int, int, int] = (4, 4, 15, 54)) -> Site:
    return Site(module, (Frame(FORWARD.co_filename, "Linear.forward", FORWARD.co_firstlineno, span),))


def weight(
    fqn: str, placement: str, shape: tuple[int, ...], dim: int | None, layout: Layout | None
) -> PlannedParameter:
    return PlannedParameter(ParameterEdit(fqn, dim, layout), placement, shape, "float32", True)


def vector(fqn: str, size: int) -> PlannedParameter:
    return PlannedParameter(ParameterEdit(fqn), "replicated", (size,), "float32", False)


def block_parameters(n: int) -> list[PlannedParameter]:
    at = f"layers.{n}"
    return [
        weight(f"{at}.attn.qkv.weight", "column", (16, 8), 0, QKV),
        weight(f"{at}.attn.o.weight", "row", (8, 8), 1, even(8, TP)),
        vector(f"{at}.attn.o.bias", 8),
        vector(f"{at}.norm.weight", 8),
    ]


def all_reduce(block: str, site: str, forced_by: str, **changes: Any) -> Collective:
    made = Collective("all_reduce", 1024, "forward", "train", site, block, forced_by, "block", "", 2_000_000)
    return replace(made, **changes)


def split_schedule(blocks: list[str]) -> Schedule:
    """The sequence split after the embedding; all_reduces in the blocks."""
    following = [*(f"add in {block}.norm" for block in blocks[1:]), "layer_norm in norm"]
    forward = [all_reduce(b, f"{b}.attn.o", f) for b, f in zip(blocks, following, strict=True)]
    backward = [
        all_reduce(b, f"{b}.norm", f"gradient of linear in {b}.norm", direction="backward") for b in reversed(blocks)
    ]
    gradients = [
        all_reduce(b, b, "partial gradients of replicated parameters", direction="backward", nbytes=32) for b in blocks
    ]
    gradients = [replace(c, category="parameter_gradient", bucket=c.block, ps=500_000) for c in gradients]
    embedding = all_reduce("", "embed", "layer_norm in layers.0.norm", kind="reduce_scatter", category="embedding")
    head = all_reduce("", "lm_head", "the model's output", kind="all_gather", category="head", nbytes=4096)
    calls = {linear_site(f"{b}.attn.o"): CallEdit(result=Move("all_reduce", "identity")) for b in blocks}
    calls |= {
        linear_site(f"{b}.attn.qkv", (4, 6, 15, 9)): CallEdit(
            arguments=((0, Move("identity", "all_reduce")), (2, Move("slice", "pad", 1, HEADS))),
            integers=((1, 16, 8), (3, -1, -1)),
        )
        for b in blocks
    }
    calls[Site("", ())] = CallEdit(
        arguments=((0, Move("all_gather", "reduce_scatter", 1, SEQUENCE)),),
        operator=OperatorEdit("vocab_embedding", 0, even(32, TP)),
        result=Move("reduce_scatter", "all_gather", 1, SEQUENCE),
    )
    return Schedule(
        workload=WORKLOAD,
        edits=ForwardEdits(
            calls,
            partial=frozenset(f"{b}.norm.weight" for b in blocks),
            lifted=frozenset(f"{b}.attn.o.bias" for b in blocks),
            inputs=("x",),
            outputs=("logits", "hidden.0"),
            split_outputs=(("logits", Move("all_gather", "slice", 2, even(32, TP))), ("hidden.1", KEPT)),
        ),
        collectives=(embedding, *forward, head, *backward, *gradients),
        cost=COST,
        lengths=(Length("ids", 1), Length("x", 2, 8)),
    )


def stand_in(split: Schedule) -> Schedule:
    """The same with an all_reduce after the embedding."""
    calls = {**split.edits.calls, Site("", ()): CallEdit(result=Move("all_reduce", "all_reduce"))}
    partial = frozenset(name for name in split.edits.partial if "1" not in name)
    return Schedule(
        workload=split.workload,
        edits=replace(split.edits, calls=calls, partial=partial, inputs=()),
        collectives=(replace(split.collectives[0], kind="all_reduce"), *split.collectives[1:]),
        cost=replace(split.cost, total_s=16e-6, comm_s=11.9e-6, lower_bound_s=16e-6),
        stands_in=True,
    )


def small_plan(**changes: Any) -> Plan:
    """Three blocks on two ranks, and two schedules; ``changes`` replace fields."""
    split = split_schedule([f"layers.{n}" for n in range(BLOCKS)])
    parameters = [
        weight("embed.weight", "vocab", (32, 8), 0, even(32, TP)),
        *(parameter for n in range(BLOCKS) for parameter in block_parameters(n)),
        weight("kv.weight", "column", (4, 8), 0, KV),
        weight("odd.weight", "column", (6, 8), 0, HEADS),
        weight("router.weight", "replicated", (4, 8), None, None),
        weight("lm_head.weight", "vocab", (32, 8), 0, even(32, TP)),
    ]
    plan = Plan(
        name="Small",
        tp=TP,
        hardware="h100-sxm",
        options={
            "replicate": "never",
            "sequence_parallel": "auto",
            "pin": {"router": "replicated"},
            "memory_gb": None,
        },
        parameters=tuple(parameters),
        ties={"lm_head.weight": "embed.weight"},
        schedules=(split, stand_in(split)),
        unsplit=(("router.weight", 128, "pinned"),),
        findings=(
            "operator without a rule, its operands are replicated: foo (3x)",
            *(f"seen in layers.{n}" for n in range(BLOCKS)),
        ),
        assumptions={"dtype": "float32", "torch": "2.13.0"},
        cost=COST,
        memory_bytes={"weights": 4096, "gradients": 4096, "kv_cache": 0},
    )
    return replace(plan, **changes)
