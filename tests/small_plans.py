"""A plan written by hand, with something of everything a plan can hold."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import nn

from colrow.planner.edits import CallEdit, OperatorEdit, ParameterEdit
from colrow.planner.layout import Layout, even, joined, owned_units
from colrow.planner.lowering import Collective
from colrow.planner.moves import Move
from colrow.planner.plan_model import Plan, PlannedCost, PlannedParameter, Workload
from colrow.planner.sites import Frame, Site

TP, BLOCKS = 2, 3
QKV = joined((even(8, TP), even(4, TP), even(4, TP)))
HEADS = owned_units(6, 2, ((0, 1), (2,)))
KV = owned_units(4, 4, ((0,), (0,)))
FORWARD = nn.Linear.forward.__code__


def linear_site(module: str, span: tuple[int, int, int, int] = (4, 4, 15, 54)) -> Site:
    return Site(module, (Frame(FORWARD.co_filename, "Linear.forward", FORWARD.co_firstlineno, span),))


def weight(
    fqn: str, placement: str, shape: tuple[int, ...], dim: int | None, layout: Layout | None
) -> PlannedParameter:
    return PlannedParameter(ParameterEdit(fqn, dim, layout), placement, shape, "float32", True)


def vector(fqn: str, size: int, **edit: bool) -> PlannedParameter:
    return PlannedParameter(ParameterEdit(fqn, **edit), "replicated", (size,), "float32", False)


def block_parameters(n: int) -> list[PlannedParameter]:
    at = f"layers.{n}"
    return [
        weight(f"{at}.attn.qkv.weight", "column", (16, 8), 0, QKV),
        weight(f"{at}.attn.o.weight", "row", (8, 8), 1, even(8, TP)),
        vector(f"{at}.attn.o.bias", 8, lifted=True),
        vector(f"{at}.norm.weight", 8, partial_grad=True),
    ]


def all_reduce(block: str, site: str, forced_by: str, **changes: Any) -> Collective:
    made = Collective("all_reduce", 1024, "forward", "train", site, block, forced_by, "block", "", 2_000_000)
    return replace(made, **changes)


def small_plan(**changes: Any) -> Plan:
    """Three blocks on two ranks; ``changes`` replace fields."""
    blocks = [f"layers.{n}" for n in range(BLOCKS)]
    following = [*(f"add in {block}.norm" for block in blocks[1:]), "layer_norm in norm"]
    forward = [all_reduce(b, f"{b}.attn.o", f) for b, f in zip(blocks, following, strict=True)]
    backward = [
        all_reduce(b, f"{b}.norm", f"gradient of linear in {b}.norm", direction="backward") for b in reversed(blocks)
    ]
    gradients = [
        all_reduce(b, b, "partial gradients of replicated parameters", direction="backward", nbytes=32) for b in blocks
    ]
    gradients = [replace(c, category="parameter_gradient", bucket=c.block, ps=500_000) for c in gradients]
    head = all_reduce("", "lm_head", "the model's output", kind="all_gather", category="head", nbytes=4096)
    calls = {linear_site(f"{b}.attn.o"): CallEdit(result=Move("all_reduce", "identity")) for b in blocks}
    calls |= {
        linear_site(f"{b}.attn.qkv", (4, 6, 15, 9)): CallEdit(
            arguments=((0, Move("identity", "all_reduce")), (2, Move("slice", "pad", 1, HEADS))),
            integers=((1, 16, 8), (3, -1, -1)),
        )
        for b in blocks
    }
    calls[Site("", ())] = CallEdit(operator=OperatorEdit("vocab_embedding", 0, even(32, TP)))
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
        workloads=(Workload("train", "train", (("ids", "int64", (2, 16)),), (("scale", 0.5),), 0),),
        options={"replicate": "never", "pin": {"router": "replicated"}, "memory_gb": None},
        parameters=tuple(parameters),
        ties={"lm_head.weight": "embed.weight"},
        calls=calls,
        inputs=("x",),
        outputs=("logits", "hidden.0"),
        collectives=(*forward, head, *backward, *gradients),
        unsplit=(("router.weight", 128, "pinned"),),
        findings=("operator without a rule, its operands are replicated: foo (3x)", *(f"seen in {b}" for b in blocks)),
        assumptions={"dtype": "float32", "torch": "2.13.0"},
        cost=PlannedCost(12e-6, 4.1e-6, 7.9e-6, 12e-6, True, 6e-6, 7.5e-6),
        memory_bytes={"weights": 4096, "gradients": 4096, "kv_cache": 0},
    )
    return replace(plan, **changes)
