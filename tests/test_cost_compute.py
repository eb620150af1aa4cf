"""Roofline: the slower of arithmetic and memory, plus the launch; operation counts against brute counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colrow.cost_models.compute import attention_flops, flops_per_s, matmul_bytes, matmul_flops, operator_s
from colrow.cost_models.hardware import hardware_names, load_hardware

HARDWARE = st.sampled_from(hardware_names()).map(load_hardware)
AMOUNT = st.floats(0, 1e18)
DTYPE = st.sampled_from(["bfloat16", "float16", "float32", "float64", "int64", "float8_e4m3fn"])


@given(HARDWARE, DTYPE, AMOUNT, AMOUNT, st.floats(1, 10))
def test_time_grows_with_work_and_is_at_least_the_launch(hardware, dtype, flops, nbytes, factor) -> None:
    base = operator_s(flops, nbytes, dtype, hardware)
    assert base >= hardware.launch_overhead_s > 0
    assert operator_s(flops * factor, nbytes, dtype, hardware) >= base
    assert operator_s(flops, nbytes * factor, dtype, hardware) >= base


def test_a_large_matmul_is_bound_by_arithmetic_and_a_vector_by_memory() -> None:
    hardware = load_hardware("h100-sxm")
    square = operator_s(matmul_flops(8192, 8192, 8192), matmul_bytes(8192, 8192, 8192, 2), "bfloat16", hardware)
    assert square == pytest.approx(2 * 8192**3 / (989.4e12 * 0.78) + hardware.launch_overhead_s)
    vector = operator_s(matmul_flops(1, 8192, 8192), matmul_bytes(1, 8192, 8192, 2), "bfloat16", hardware)
    assert vector == pytest.approx(2 * (8192**2 + 2 * 8192) / (3350e9 * 0.88) + hardware.launch_overhead_s)


def test_an_unlisted_dtype_runs_at_the_float32_rate() -> None:
    hardware = load_hardware("a100-sxm")
    assert flops_per_s("int64", hardware) == flops_per_s("float32", hardware) < flops_per_s("bfloat16", hardware)


@given(*[st.integers(1, 5)] * 4)
def test_matmul_counts_every_multiplication_and_addition(m, n, k, batch) -> None:
    operations = sum(2 for _ in range(batch) for _ in range(m) for _ in range(n) for _ in range(k))
    assert matmul_flops(m, n, k, batch) == operations
    assert matmul_bytes(m, n, k, 2, batch) == 2 * batch * (m * k + k * n + m * n)


@given(st.integers(1, 3), st.integers(1, 3), st.integers(1, 6), st.integers(0, 6), st.integers(1, 4), st.booleans())
def test_attention_counts_the_pairs_it_computes(batch, heads, query_len, past, head_dim, causal) -> None:
    key_len = past + query_len
    pairs = sum(1 for query in range(query_len) for key in range(key_len) if not causal or key <= past + query)
    expected = 2 * matmul_flops(1, 1, head_dim, batch * heads * pairs)
    assert attention_flops(batch, heads, query_len, key_len, head_dim, causal=causal) == expected
