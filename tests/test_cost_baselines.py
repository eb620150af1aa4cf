"""What the bench compares with: the one-line fit against brute force, NCCL's formulas against NCCL's own constants."""

import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

BENCH = str(Path(__file__).parent / "bench")


@pytest.fixture(scope="module")
def baselines():
    sys.path.insert(0, BENCH)
    try:
        import costs_baselines

        return costs_baselines
    finally:
        sys.path.remove(BENCH)


@given(
    st.dictionaries(st.integers(1, 2**20), st.floats(1e-6, 1.0), min_size=2, max_size=8),
    st.floats(0, 2),
    st.floats(0, 1e-5),
)
@settings(max_examples=200)
def test_no_line_fits_better_than_the_alpha_beta_line(baselines, rows, latency_s, slope) -> None:
    rows = sorted(rows.items())

    def error(line):
        return sum(abs((line[0] + line[1] * nbytes) / seconds - 1) for nbytes, seconds in rows)

    best = baselines.alpha_beta(rows)
    assert min(best) >= 0 and error(best) <= error((latency_s, slope)) * (1 + 1e-9)


def test_log_log_meets_rows_and_powers(baselines) -> None:
    rows = [(1, 3.0), (4, 6.0), (16, 12.0)]
    assert [baselines.log_log(rows, n) for n in (1, 2, 4, 8, 16)] == pytest.approx([3, 3 * 2**0.5, 6, 6 * 2**0.5, 12])


def test_nccls_formulas_for_an_empty_message(baselines) -> None:
    # LL ring: 6.6 us and 0.6 us a step of 2 (n - 1); the tree's 6.8 us and 1.2 us a rank are more.
    for size, us in ((2, 7.8), (4, 10.2), (8, 15.0)):
        assert baselines.nccl_tuning_s("all_reduce", size, 0, baselines.HOPPER) == pytest.approx(us * 1e-6)
    assert baselines.nccl_tuning_s("all_to_all", 8, 0, baselines.HOPPER) is None


def test_nccls_formulas_for_a_large_message(baselines) -> None:
    # Without NVLS the Simple ring at the rate of its channels: 240 GB/s of bus bandwidth.
    seconds = baselines.nccl_tuning_s("all_gather", 8, 1e12, baselines.AMPERE)
    assert 1e12 * 7 / 8 / seconds == pytest.approx(240e9, rel=1e-3)
