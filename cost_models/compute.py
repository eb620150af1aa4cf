"""Seconds of one operator on one rank, by the roofline, and the operation counts that feed it.

The roofline (S. Williams, A. Waterman, D. Patterson, CACM 52(4), 2009): an operator takes as long as the slower of its
arithmetic and its memory traffic. On top comes what it costs to launch it, so nothing shrinks in proportion: on an H100
[1, 4096] @ [4096, 4096] takes 15 us and an eighth of its columns 4.6 us, not 1.9.

A matmul's share of the peak depends on its shape (`occupancy`): a result of few tiles leaves multiprocessors idle,
which splitting the contracted dim only partly mends.

``time = launch + start + max(flops / (peak * efficiency * occupancy), bytes / (bandwidth * efficiency))``

The exponent of `occupancy` is one constant for all GPUs, chosen on 188,000 bf16 shapes on A100, H100, H200, B200, L40S
and RTX PRO 6000 (aiconfigurator's gemm tables, commit 095f58a51c4c, Apache-2.0): with two efficiencies and a start
fitted per GPU the median error is 8 to 13 %, the 90th percentile 26 to 70 %. Without it matmuls on a fifth of an H100
come out 35 % too fast. Exponents of 0.2 and 0.3 differ by half a point. Counting whole tiles and waves lowered the
median by two points on two of the six GPUs, raised it on three, and made time fall where a result grows past a tile's
edge.
"""

from __future__ import annotations

from .hardware import Hardware

TILE_ELEMENTS = 128 * 128
"""Elements of a result one multiprocessor works on at a time (cuBLAS's and CUTLASS's usual tile)."""

OCCUPANCY_EXPONENT = 0.2


def operator_s(flops: float, nbytes: float, dtype: str, hardware: Hardware, *, eager: bool = False) -> float:
    """Predicted seconds of one operator: ``max(flops / (peak * eff), bytes / (bandwidth * eff)) + launch``.

    Args:
        flops: Floating-point operations of this rank, an addition and a multiplication counting one each.
        nbytes: Bytes this rank reads and writes in device memory, inputs, weights and outputs once each.
        dtype: Name of the arithmetic's torch dtype without ``torch.``, e.g. ``bfloat16``. One the profile does not
            list runs at its float32 rate.
        hardware: The profile.
        eager: Launched from Python, not from a CUDA graph: at least ``eager_dispatch_s``, which the host needs for each
            operator while the device works on earlier ones.
    """
    return _launched(max(flops / flops_per_s(dtype, hardware), memory_s(nbytes, hardware)), hardware, eager)


def matmul_s(
    flops: float, nbytes: float, result_elements: float, dtype: str, hardware: Hardware, *, eager: bool = False
) -> float:
    """Predicted seconds of one matmul or batch of them (formula: module docstring).

    Args:
        flops: As in `operator_s`; `matmul_flops`.
        nbytes: As in `operator_s`; `matmul_bytes`.
        result_elements: Elements of this rank's result, all of the batch.
        dtype: As in `operator_s`.
        hardware: The profile.
        eager: As in `operator_s`.
    """
    arithmetic_s = flops / (flops_per_s(dtype, hardware) * occupancy(result_elements, hardware))
    start_s = hardware.compute.matmul_start_s
    return _launched(start_s + max(arithmetic_s, memory_s(nbytes, hardware)), hardware, eager)


def occupancy(result_elements: float, hardware: Hardware) -> float:
    """Share of the arithmetic rate a matmul with so large a result can use: ``(tiles / units) ** 0.2``, at most 1.

    Tiles are a fraction, not counted up, so that time rises with the work.
    """
    tiles = max(result_elements, 1) / TILE_ELEMENTS
    return float(min(1.0, tiles / hardware.compute.units) ** OCCUPANCY_EXPONENT)


def memory_s(nbytes: float, hardware: Hardware) -> float:
    """Seconds to stream ``nbytes`` from or to device memory."""
    return nbytes / (hardware.memory.bandwidth_bytes_per_s * hardware.memory.efficiency)


def optimizer_step_s(parameter_bytes: float, state_bytes: float, hardware: Hardware) -> float:
    """Predicted seconds of an optimiser's step over all parameters of a rank, fused into few kernels.

    It reads parameters, gradients (as large) and state, and writes parameters and state: memory traffic alone, as an
    optimiser does a few operations per element.

    Args:
        parameter_bytes: This rank's trained parameters.
        state_bytes: Its optimiser state (`memory.adamw_bytes`).
        hardware: The profile.
    """
    return memory_s(3 * parameter_bytes + 2 * state_bytes, hardware) + hardware.launch_overhead_s


def _launched(device_s: float, hardware: Hardware, eager: bool) -> float:
    launched_s = hardware.launch_overhead_s + device_s
    return max(launched_s, hardware.eager_dispatch_s or 0.0) if eager else launched_s


def flops_per_s(dtype: str, hardware: Hardware) -> float:
    """Achievable operations per second of a dtype: the vendor's dense peak times the measured efficiency."""
    rates = hardware.compute
    peak = rates.peak_flops_per_s.get(dtype, rates.peak_flops_per_s["float32"])
    return peak * rates.efficiency.get(dtype, rates.efficiency["float32"])


def matmul_flops(m: int, n: int, k: int, batch: int = 1) -> int:
    """Operations of ``batch`` products ``[m, k] @ [k, n]``: ``2 * batch * m * n * k``.

    Source: G. Golub, C. Van Loan, "Matrix Computations", section 1.1.11 (one multiplication and one addition for each
    of the m * n * k terms).
    """
    return 2 * batch * m * n * k


def matmul_bytes(m: int, n: int, k: int, itemsize: int, batch: int = 1) -> int:
    """Bytes of ``batch`` products ``[m, k] @ [k, n]``, each operand read once and the result written once.

    Args:
        m: Rows of the left operand.
        n: Columns of the right operand.
        k: The contracted dim.
        itemsize: Bytes per element.
        batch: Number of independent products.
    """
    return batch * itemsize * (m * k + k * n + m * n)


def attention_flops(batch: int, heads: int, query_len: int, key_len: int, head_dim: int, *, causal: bool) -> int:
    """Operations of the two products of scaled dot-product attention; the softmax is not counted.

    ``2 * 2 * batch * heads * head_dim * pairs``, where ``pairs`` counts the (query, key) pairs that are computed: all
    of them, or with ``causal`` those with key position <= query position, the queries being the last ``query_len`` of
    ``key_len`` positions (a fused kernel skips the rest).

    Source: T. Dao et al., "FlashAttention", NeurIPS 2022, appendix B; halving under a causal mask as in T. Dao,
    "FlashAttention-2", 2023, section 4.1.
    """
    pairs = query_len * key_len
    if causal:
        pairs -= query_len * (query_len - 1) // 2
    return 4 * batch * heads * head_dim * pairs
