"""Roofline: the slower of arithmetic and memory, plus the launch; operation counts against brute counts."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colrow.cost_models.compute import (
    attention_flops,
    flops_per_s,
    matmul_bytes,
    matmul_flops,
    matmul_s,
    occupancy,
    operator_s,
    optimizer_step_s,
)
from colrow.cost_models.hardware import Hardware, hardware_names, load_hardware

HARDWARE = st.sampled_from(hardware_names()).map(load_hardware)


def matmul(m: int, n: int, k: int, hardware: Hardware) -> float:
    """Seconds of one bfloat16 product."""
    return matmul_s(matmul_flops(m, n, k), matmul_bytes(m, n, k, 2), m * n, "bfloat16", hardware)


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
    start = hardware.launch_overhead_s + hardware.compute.matmul_start_s
    square = matmul(8192, 8192, 8192, hardware)
    assert square == pytest.approx(2 * 8192**3 / (989.4e12 * 0.8) + start)
    vector = matmul(1, 8192, 8192, hardware)
    assert vector == pytest.approx(2 * (8192**2 + 2 * 8192) / (3350e9 * 0.847) + start)


@given(HARDWARE, st.sampled_from([1, 16, 512, 4096]), st.sampled_from([1024, 4096, 14336]))
def test_an_eighth_of_the_width_takes_more_than_an_eighth_of_the_time(hardware, m, n) -> None:
    assert matmul(m, n // 8, 4096, hardware) > matmul(m, n, 4096, hardware) / 8
    h100 = load_hardware("h100-sxm")
    assert matmul(1, 512, 4096, h100) > 2 * matmul(1, 4096, 4096, h100) / 8


@given(HARDWARE, st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 9000), st.integers(1, 3000))
def test_a_matmul_takes_no_less_when_a_dim_grows(hardware, m, n, k, more) -> None:
    base = matmul(m, n, k, hardware) * (1 - 1e-12)
    assert base <= min(
        matmul(m + more, n, k, hardware), matmul(m, n + more, k, hardware), matmul(m, n, k + more, hardware)
    )


def test_few_tiles_leave_units_idle() -> None:
    hardware = load_hardware("h100-sxm")
    assert occupancy(132 * 128 * 128, hardware) == 1.0 == occupancy(1e9, hardware)
    assert occupancy(33 * 128 * 128, hardware) == pytest.approx(0.25**0.2)
    assert occupancy(1, load_hardware("gloo-cpu")) == pytest.approx((1 / 16384) ** 0.2)


def test_python_launches_no_operator_faster_than_it_can() -> None:
    hardware = load_hardware("h100-sxm")
    assert hardware.eager_dispatch_s is not None
    assert operator_s(0, 1024, "bfloat16", hardware, eager=True) == hardware.eager_dispatch_s
    assert operator_s(0, 1024, "bfloat16", hardware) < hardware.eager_dispatch_s / 5
    long_s = operator_s(0, 1e12, "bfloat16", hardware)
    assert operator_s(0, 1e12, "bfloat16", hardware, eager=True) == long_s
    gloo = load_hardware("gloo-cpu")  # without the field nothing is added
    assert operator_s(0, 1024, "float32", gloo, eager=True) == operator_s(0, 1024, "float32", gloo)


def test_an_optimiser_reads_and_writes_everything_once() -> None:
    hardware = load_hardware("a100-sxm")
    streamed = optimizer_step_s(2e9, 4e9, hardware) - hardware.launch_overhead_s
    assert streamed == pytest.approx((3 * 2e9 + 2 * 4e9) / (2039e9 * 0.713))


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
