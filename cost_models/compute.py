"""Seconds of one operator on one rank, by the roofline, and the operation counts that feed it.

The roofline (S. Williams, A. Waterman, D. Patterson, CACM 52(4), 2009): an operator takes as long as the slower of its
arithmetic and its memory traffic. On top comes what it costs to launch it.
"""

from __future__ import annotations

from .hardware import Hardware


def operator_s(flops: float, nbytes: float, dtype: str, hardware: Hardware) -> float:
    """Predicted seconds of one operator: ``max(flops / (peak * eff), bytes / (bandwidth * eff)) + launch``.

    Args:
        flops: Floating-point operations of this rank, an addition and a multiplication counting one each.
        nbytes: Bytes this rank reads and writes in device memory, inputs, weights and outputs once each.
        dtype: Name of the arithmetic's torch dtype without ``torch.``, e.g. ``bfloat16``. One the profile does not
            list runs at its float32 rate.
        hardware: The profile.
    """
    arithmetic_s = flops / flops_per_s(dtype, hardware)
    memory_s = nbytes / (hardware.memory.bandwidth_bytes_per_s * hardware.memory.efficiency)
    return max(arithmetic_s, memory_s) + hardware.launch_overhead_s


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
