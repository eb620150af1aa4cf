"""The curve through a table: meets monotone rows, never falls, jumps nowhere, honest about rows left out."""

from itertools import combinations_with_replacement
from math import log
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from colrow.cost_models.fit_profiles import load_table
from colrow.cost_models.measured_curve import curve_through, left_out_errors, monotone

ROWS = st.dictionaries(st.integers(0, 2**34), st.floats(1e-6, 10), min_size=2, max_size=25).map(
    lambda rows: sorted(rows.items())
)


@given(ROWS, st.integers(0, 2**35), st.integers(0, 2**35))
def test_it_never_falls_and_is_positive(rows, one, other) -> None:
    line = curve_through(rows).line()
    low, high = sorted((one, other))
    assert 0 < line.seconds(low) <= line.seconds(high) * (1 + 1e-12)


@given(ROWS)
def test_it_meets_every_monotone_row(rows) -> None:
    curve = curve_through(rows)
    rising = monotone([seconds for _, seconds in rows])
    assert rising == sorted(rising)
    for (size, _), seconds in zip(rows, rising, strict=True):
        assert curve.line().seconds(size) == pytest.approx(seconds, rel=1e-4, abs=1e-9)


def test_a_disturbed_row_gives_way_to_its_neighbours() -> None:
    curve = curve_through([(512, 6.5e-6), (1024, 17.7e-6), (2048, 7.0e-6), (3072, 7.2e-6), (4096, 9.0e-6)])
    assert curve.line().seconds(1024) == pytest.approx(7.2e-6) == pytest.approx(curve.line().seconds(3072))
    assert curve.max_rel_error == pytest.approx(1 - 7.2 / 17.7, abs=1e-4)
    assert curve.line().seconds(3584) == pytest.approx(8.1e-6)


@given(st.lists(st.floats(1e-6, 10), min_size=2, max_size=5))
def test_monotone_is_nearest_of_all_rising_sequences(times) -> None:
    def error(rising):
        return sum(abs(log(a) - log(b)) for a, b in zip(rising, times, strict=True))

    every = combinations_with_replacement(sorted(times), len(times))  # an optimum has only measured values
    assert error(monotone(times)) <= min(map(error, every)) + 1e-9


def test_below_and_beyond_the_rows() -> None:
    line = curve_through([(100, 1.0), (200, 2.0), (400, 4.0), (800, 6.0)]).line()
    assert line.seconds(0) == line.seconds(100) == 1.0
    # The last factor of four: from 200 bytes and 2 s to 800 bytes and 6 s.
    assert line.seconds(1400) == pytest.approx(6 + 600 * 4 / 600)


def test_left_out_rows_are_predicted_from_the_others() -> None:
    rows = [(1, 1.0), (2, 2.0), (3, 6.0), (5, 10.0)]
    # 2 between (1, 1) and (3, 6): 3.5 for 2; 3 between (2, 2) and (5, 10): 4.667 for 6.
    assert left_out_errors(rows) == pytest.approx([0.75, 1 - 14 / 3 / 6], rel=1e-4)
    assert curve_through(rows[:2]).left_out_median_rel_error is None


@pytest.mark.parametrize(
    ("rows", "complaint"),
    [
        ([(1024, 1e-5)], "two or more distinct sizes"),
        ([(1024, 1e-5), (1024, 2e-5)], "two or more distinct sizes"),
        ([(1024, 1e-5), (2048, 0.0)], "times above 0 s"),
        ([(1024, 1e-5), (2048, float("nan"))], "times above 0 s"),
        ([(-1, 1e-5), (2048, 1e-5)], "at least 0 bytes"),
    ],
)
def test_bad_rows_are_refused(rows, complaint) -> None:
    with pytest.raises(ValueError, match=complaint):
        curve_through(rows)


@pytest.mark.parametrize("name", ["h100-sxm", "a100-sxm", "h200-sxm", "b200-sxm"])
def test_left_out_sizes_of_the_nvswitch_tables_are_within_three_percent(name: str) -> None:
    table, every = load_table(name), []
    for by_size in table["collectives"].values():
        for rows in by_size.values():
            every += left_out_errors([(nbytes, us * 1e-6) for nbytes, us in rows])
    assert len(every) > 200 and median(every) < 0.03
