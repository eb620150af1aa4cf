"""Prices of operators and moves, in integer picoseconds per direction."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Literal

import torch

from colrow.cost_models.compute import attention_flops, matmul_s, operator_s, optimizer_step_s
from colrow.cost_models.hardware import Hardware

from .graph import VIEWS, Node, numel
from .moves import Move
from .placement import Placement, Shard
from .rules.bags import LOOKUPS

Phase = Literal["prefill", "decode", "train"]

BACKWARD_SHARE = 1024
"""An inference plan minimises forward time; its backward pass counts one part in 1024, so that it also trains well."""


@dataclass(frozen=True)
class Cost:
    """Picoseconds of the forward and the backward pass."""

    forward_ps: int = 0
    backward_ps: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.forward_ps + other.forward_ps, self.backward_ps + other.backward_ps)

    def again(self) -> Cost:
        """Of what runs once more in the backward pass."""
        return Cost(self.forward_ps, self.backward_ps + self.forward_ps)

    def times(self, count: int) -> Cost:
        """Of ``count`` equal ones."""
        return Cost(count * self.forward_ps, count * self.backward_ps)


@dataclass
class Pricing:
    """What things cost for one workload.

    Attributes:
        hardware: The profile.
        ranks: Size of the tp group.
        phase: The workload's phase.
        context: Tokens already in the KV cache (decode).
    """

    hardware: Hardware
    ranks: int
    phase: Phase
    context: int = 0
    _memo: dict[object, int] = field(default_factory=dict)

    def weighed(self, cost: Cost) -> int:
        """What the solver minimises."""
        return cost.forward_ps + (cost.backward_ps if self.phase == "train" else cost.backward_ps // BACKWARD_SHARE)

    def collective(self, kind: str, nbytes: int) -> int:
        """Picoseconds of a collective on a whole buffer of ``nbytes``."""
        key = (kind, nbytes)
        if key not in self._memo:
            self._memo[key] = _picoseconds(self.hardware.collective_s(kind, nbytes, self.ranks))
        return self._memo[key]

    def operator(self, flops: float, nbytes: float, dtype: torch.dtype) -> int:
        """Picoseconds of a local operator."""
        return _picoseconds(operator_s(flops, nbytes, _name(dtype), self.hardware))

    def matmul(self, flops: float, nbytes: float, result_elements: float, dtype: torch.dtype) -> int:
        """Picoseconds of a local matmul whose result has so many elements on this rank."""
        return _picoseconds(matmul_s(flops, nbytes, result_elements, _name(dtype), self.hardware))

    def optimizer_step(self, parameter_bytes: int, state_bytes: int) -> int:
        """Picoseconds that a rank's part of a parameter adds to the optimiser's one step, its launch beside."""
        return _picoseconds(optimizer_step_s(parameter_bytes, state_bytes, self.hardware)) - self.launch()

    def launch(self) -> int:
        """Picoseconds of launching a kernel."""
        return _picoseconds(self.hardware.launch_overhead_s)

    def move(self, move: Move, nbytes: int, *, free: bool = False) -> Cost:
        """A move of a value of ``nbytes`` globally. Local steps cost a pass over memory, or nothing on parameters
        (``free``)."""
        padded = nbytes
        if move.layout is not None and move.layout.size:
            padded = nbytes * max(move.layout.local * self.ranks, move.layout.size) // move.layout.size
        return Cost(self._step(move.forward, padded, free), self._step(move.backward, padded, free))

    def _step(self, step: str, nbytes: int, free: bool) -> int:
        if step in ("all_reduce", "all_gather", "reduce_scatter"):
            return self.collective(step, nbytes)
        return 0 if step == "identity" or free else self.operator(0, 2 * nbytes, torch.float32)

    def compute(
        self, node: Node, operands: Mapping[int, Node], placed: Mapping[int, Placement], out: Placement | None
    ) -> Cost:
        """Local time of ``node``: its work and traffic scaled by what the rank holds.

        Args:
            node: The operator.
            operands: Its operands by index.
            placed: Their placements as the operator reads them.
            out: Its result's placement; None for tuples.
        """
        if node.op in VIEWS:
            return Cost()
        share = 1.0
        for placement in (*placed.values(), *(() if out is None else (out,))):
            if isinstance(placement, Shard):
                share = placement.layout.local / placement.layout.size
        nbytes = float(_held(node, out)) + sum(_held(operands[i], p) for i, p in placed.items())
        if node.op in LOOKUPS:
            nbytes = 2.0 * _held(node, out)
        flops = flops_of(node, operands) * share
        if node.op == "scaled_dot_product_attention":
            q, k, v = (operands[i] for i in node.operands[:3])
            length = k.shape[-2]
            nbytes += (k.nbytes + v.nbytes) * share * self.context / length
            flops *= _pairs_share(q.shape[-2], length, self.context, causal=_is_causal(node))
        if flops and node.op != "scaled_dot_product_attention":
            forward = self.matmul(flops, nbytes, _held(node, out) / node.dtype.itemsize, node.dtype)
        else:
            forward = self.operator(flops, nbytes, node.dtype)
        return Cost(forward, 2 * forward if node.differentiable else 0)


def flops_of(node: Node, operands: Mapping[int, Node]) -> float:
    """Multiply-adds of a product, times two; other operators are bound by memory and count none."""
    shapes = [operands[i].shape for i in node.operands if i in operands]
    size = numel(node.shape)
    match node.op:
        case "linear" | "matmul" | "mm" | "bmm":
            return 2.0 * size * shapes[0][-1]
        case "addmm" | "baddbmm":
            return 2.0 * size * shapes[1][-1]
        case "_grouped_mm" | "grouped_mm_fallback":
            return 2.0 * size * shapes[0][-1]
        case "scaled_dot_product_attention":
            return 2.0 * size * shapes[1][-2] + 2.0 * numel(shapes[0]) * shapes[1][-2]
        case "conv1d" | "conv2d" | "conv3d":
            return 2.0 * size * numel(shapes[1][1:])
        case "conv_transpose1d" | "conv_transpose2d" | "conv_transpose3d":
            return 2.0 * numel(shapes[0]) * numel(shapes[1][1:])
        case "einsum":
            return 2.0 * size * math.sqrt(max(1, numel(shapes[0]) * numel(shapes[-1]) // max(1, size)))
        case _:
            return 0.0


def _is_causal(node: Node) -> bool:
    """Whether an attention operator skips the keys after each query (ATen's sixth argument)."""
    positional = node.arguments[5] if len(node.arguments) > 5 else False
    return bool(node.keywords.get("is_causal", positional))


def _pairs_share(query_len: int, key_len: int, context: int, *, causal: bool) -> float:
    """Pairs of queries and keys an attention computes, as a share of query_len * key_len."""
    causal = causal and query_len <= key_len + context
    per_head = attention_flops(1, 1, query_len, key_len + context, 1, causal=causal)
    return per_head / attention_flops(1, 1, query_len, key_len, 1, causal=False)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _held(node: Node, placement: Placement | None) -> float:
    match placement:
        case Shard(_, layout):
            return node.nbytes * layout.local / layout.size
        case _:
            return float(node.nbytes)


@lru_cache(maxsize=1 << 16)
def _picoseconds(seconds: float) -> int:
    return round(seconds * 1e12)
