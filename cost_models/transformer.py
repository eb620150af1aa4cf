"""Seconds of one forward step of a decoder or encoder under tensor parallelism, from its shape alone.

For checking the models of this package against published runs, whose software is not this one's: no graph is read, only
the arithmetic every implementation shares. A block has matmuls (qkv, output, up, gate where there is one, down), an
attention between them, four fused elementwise kernels (two norms with their residual, rotation and cache write,
activation) and two all_reduces, the split of M. Shoeybi et al., "Megatron-LM", 2019, section 3; a head follows the last
block. Each matmul is priced by `compute.matmul_s`, everything else by `compute.operator_s`.

What a plan costs is priced from its graph instead (``colrow.planner``).
"""

from __future__ import annotations

from dataclasses import dataclass

from .compute import attention_flops, matmul_bytes, matmul_flops, matmul_s, operator_s
from .hardware import Hardware

ELEMENTWISE_KERNELS = 4


@dataclass(frozen=True)
class Transformer:
    """Shape of a stack of equal blocks.

    Attributes:
        layers: Blocks.
        hidden: Width of the residual stream.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Width of one head.
        intermediate: Width between the up and down matmuls of one expert.
        gated: Whether a gate matmul stands beside the up matmul.
        vocab: Rows of the head; 0 without one.
        head_split: Whether the head's rows are split over the ranks.
        causal: Whether a position sees only earlier ones.
        experts: Feed-forward networks per block.
        experts_per_token: Of which each token uses so many.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    gated: bool = True
    vocab: int = 0
    head_split: bool = True
    causal: bool = True
    experts: int = 1
    experts_per_token: int = 1


@dataclass(frozen=True)
class StepSeconds:
    """Parts of a step that take turns, in seconds; `total_s` is their sum.

    Attributes:
        work_s: Arithmetic or memory traffic, whichever bounds each kernel.
        launch_s: Launches and starts of kernels.
        communication_s: Collectives.
    """

    work_s: float
    launch_s: float
    communication_s: float

    @property
    def total_s(self) -> float:
        """The sum of the parts."""
        return self.work_s + self.launch_s + self.communication_s

    def __add__(self, other: StepSeconds) -> StepSeconds:
        return StepSeconds(
            self.work_s + other.work_s,
            self.launch_s + other.launch_s,
            self.communication_s + other.communication_s,
        )

    def __mul__(self, times: float) -> StepSeconds:
        return StepSeconds(self.work_s * times, self.launch_s * times, self.communication_s * times)


@dataclass(frozen=True)
class Step:
    """What a step processes, and on what.

    Attributes:
        batch: Sequences.
        query_len: New positions of each (1 in decode).
        context: Positions of each already in the cache.
        itemsize: Bytes per weight and activation.
        dtype: Arithmetic's torch dtype name.
        tp: Ranks.
        implementation: Who runs the all_reduces (`profile.Implementation`).
        eager: Whether the host launches each collective (``eager_collective_s``), rather than replaying a CUDA graph.
    """

    batch: int
    query_len: int
    context: int
    itemsize: int
    dtype: str
    tp: int
    implementation: str = "library"
    eager: bool = False


def step_s(model: Transformer, step: Step, hardware: Hardware) -> StepSeconds:
    """Predicted parts of one forward step.

    Raises:
        HardwareError: The profile has no such collective (`Hardware.collective_s`).
    """
    tokens = step.batch * step.query_len
    kv_heads = max(model.kv_heads / step.tp, 1)
    qkv_width = round((model.heads / step.tp + 2 * kv_heads) * model.head_dim)
    out_width = round(model.heads / step.tp * model.head_dim)
    block = _matmul(tokens, qkv_width, model.hidden, step, hardware)
    block += _attention(model, step, kv_heads, hardware)
    block += _matmul(tokens, model.hidden, out_width, step, hardware)
    block += _feed_forward(model, tokens, step, hardware)
    block += _elementwise(tokens, model.hidden, step, hardware) * ELEMENTWISE_KERNELS
    nbytes = tokens * model.hidden * step.itemsize
    block += _collective("all_reduce", nbytes, step, hardware, step.implementation) * 2
    total = block * model.layers
    if model.vocab:
        rows = -(-model.vocab // step.tp) if model.head_split else model.vocab
        total += _matmul(step.batch, rows, model.hidden, step, hardware)
        if model.head_split and step.tp > 1:
            logits_bytes = step.batch * model.vocab * step.itemsize
            total += _collective("all_gather", logits_bytes, step, hardware, "library")
    return total


def _collective(kind: str, nbytes: int, step: Step, hardware: Hardware, implementation: str) -> StepSeconds:
    """One collective of the group, and the host's share where it launches it."""
    if step.tp == 1:
        return StepSeconds(0.0, 0.0, 0.0)
    launched_s = (hardware.eager_collective_s or 0.0) if step.eager else 0.0
    return StepSeconds(0.0, 0.0, hardware.collective_s(kind, nbytes, step.tp, implementation) + launched_s)


def _matmul(m: int, n: int, k: int, step: Step, hardware: Hardware, batch: int = 1) -> StepSeconds:
    """Parts of ``batch`` products ``[m, k] @ [k, n]``."""
    flops, nbytes = matmul_flops(m, n, k, batch), matmul_bytes(m, n, k, step.itemsize, batch)
    seconds = matmul_s(flops, nbytes, batch * m * n, step.dtype, hardware)
    launch_s = hardware.launch_overhead_s + hardware.compute.matmul_start_s
    return StepSeconds(seconds - launch_s, launch_s, 0.0)


def _feed_forward(model: Transformer, tokens: int, step: Step, hardware: Hardware) -> StepSeconds:
    """Up, gate and down, a kernel each, over the experts that some token chose."""
    width = -(-model.intermediate // step.tp)
    chosen = model.experts * (1 - (1 - model.experts_per_token / model.experts) ** tokens)
    used = max(1, round(chosen))
    rows = max(1, round(tokens * model.experts_per_token / used))
    up = _matmul(rows, width, model.hidden, step, hardware, used) * (2 if model.gated else 1)
    return up + _matmul(rows, model.hidden, width, step, hardware, used)


def _attention(model: Transformer, step: Step, kv_heads: float, hardware: Hardware) -> StepSeconds:
    """One fused kernel: the products, and the keys and values it reads from the cache."""
    keys = step.query_len + step.context
    heads = model.heads / step.tp
    pairs = attention_flops(step.batch, 1, step.query_len, keys, model.head_dim, causal=model.causal)
    kv_bytes = 2 * step.batch * keys * kv_heads * model.head_dim * step.itemsize
    io_bytes = 2 * step.batch * step.query_len * heads * model.head_dim * step.itemsize
    seconds = operator_s(pairs * heads, kv_bytes + io_bytes, step.dtype, hardware)
    return StepSeconds(seconds - hardware.launch_overhead_s, hardware.launch_overhead_s, 0.0)


def _elementwise(tokens: int, width: int, step: Step, hardware: Hardware) -> StepSeconds:
    """One fused kernel that reads and writes an activation."""
    seconds = operator_s(0, 2 * tokens * width * step.itemsize, step.dtype, hardware)
    return StepSeconds(seconds - hardware.launch_overhead_s, hardware.launch_overhead_s, 0.0)
